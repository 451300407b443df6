"""fedjax_rec: a vectorised simulator of federated recommendation on JAX."""

__version__ = "0.1.0"
