"""Facts about the machine and the libraries, for results."""

from __future__ import annotations

import importlib.metadata
import platform
import resource
import sys

import jax
import psutil

from fedjax_rec import __version__

LIBRARIES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def versions() -> dict[str, str]:
    """Versions of Python and the libraries a result depends on."""
    own = {"fedjax_rec": __version__, "python": platform.python_version()}
    return own | {name: importlib.metadata.version(name) for name in LIBRARIES}


def device_name() -> str:
    return f"{jax.devices()[0].device_kind} ({jax.default_backend()})"


def available_bytes() -> int | None:
    """Free memory of all devices together (CPU: of the machine), or None where the backend does not say."""
    if jax.default_backend() == "cpu":
        return psutil.virtual_memory().available
    stats = [device.memory_stats() for device in jax.devices()]
    if any(s is None or "bytes_limit" not in s for s in stats):
        return None
    return sum(s["bytes_limit"] - s.get("bytes_in_use", 0) for s in stats)


def peak_memory_bytes() -> int:
    """Largest device memory so far; on the CPU, of the process."""
    if jax.default_backend() != "cpu":
        stats = [device.memory_stats() or {} for device in jax.devices()]
        return sum(s.get("peak_bytes_in_use", 0) for s in stats)
    scale = 1 if sys.platform == "darwin" else 1024  # kilobytes on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
