"""Models that only the server trains: they see item rows and item features, never a client's data."""
