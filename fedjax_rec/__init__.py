"""fedjax_rec: a vectorised simulator of federated recommendation on JAX.

The names of `__all__` are the short way in (README, "As a library"); the modules below are the long one. Names are
loaded when they are first asked for, and nothing here touches a device: a program can still choose its number of
virtual CPU devices after `import fedjax_rec`.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "load": "data.readers",
    "from_frame": "data.interactions",
    "Filters": "data.interactions",
    "Interactions": "data.interactions",
    "leave_one_out": "data.splits",
    "given": "data.splits",
    "cold_items": "data.splits",
    "METHODS": "methods",
    "build": "methods",
    "RunConfig": "experiment",
    "fit": "library",
    "load_run": "library",
    "Run": "library",
    "train": "run",
    "train_seeds": "seeds",
}
"""Public name -> the module that holds it."""

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'fedjax_rec' has no attribute {name!r}")
    return getattr(importlib.import_module(f"fedjax_rec.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
