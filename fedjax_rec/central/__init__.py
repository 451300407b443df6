"""Centralised baselines: the server sees everybody's interactions. They run through the same engine and evaluator."""
