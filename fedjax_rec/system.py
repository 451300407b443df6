"""Facts about the machine and the libraries, for results."""

from __future__ import annotations

import ctypes
import importlib.metadata
import platform
import resource
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
import psutil

from fedjax_rec import __version__

MAPS, MOST_MAPS = Path("/proc/self/maps"), Path("/proc/sys/vm/max_map_count")
CGROUP = Path("/sys/fs/cgroup")
CGROUP_FILES = (
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
)
"""Of version 2 and of version 1: limit, use, and where and under what name the use tells the cache that can go."""
LIBRARIES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def versions() -> dict[str, str]:
    """Versions of Python and the libraries a result depends on."""
    own = {"fedjax_rec": __version__, "python": platform.python_version()}
    return own | {name: importlib.metadata.version(name) for name in LIBRARIES}


def device_name() -> str:
    return f"{jax.devices()[0].device_kind} ({jax.default_backend()})"


def available_bytes(devices: Sequence) -> int | None:
    """Free memory of `devices` together, each counted as the fullest one (CPU: of the machine or container), or None
    where the backend does not say."""
    if jax.default_backend() == "cpu":
        return min([psutil.virtual_memory().available, *cgroup_bytes()])
    stats = [device.memory_stats() for device in devices]
    if any(s is None or "bytes_limit" not in s for s in stats):
        return None
    # what is spread is spread evenly
    return len(stats) * min(s["bytes_limit"] - s.get("bytes_in_use", 0) for s in stats)


def cgroup_bytes(root: Path = CGROUP) -> list[int]:
    """What is free below each limit of the process's control group; the system's figures are those of the host."""
    free = []
    for limit, used, stat, cache in CGROUP_FILES:
        try:
            most, taken = ((root / name).read_text().strip() for name in (limit, used))
            kept = dict(line.split() for line in (root / stat).read_text().splitlines())
        except OSError:
            continue
        if most != "max":
            free.append(max(int(most) - int(taken) + int(kept.get(cache, 0)), 0))
    return free


def peak_memory_bytes() -> int:
    """Largest device memory so far; on the CPU, of the process."""
    if jax.default_backend() != "cpu":
        stats = [device.memory_stats() or {} for device in jax.devices()]
        return sum(s.get("peak_bytes_in_use", 0) for s in stats)
    scale = 1 if sys.platform == "darwin" else 1024  # kilobytes on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def return_free_memory() -> None:
    """Gives memory that is free within the process back to the system, where the C library is glibc.

    What a checkpoint is written through is freed in many pieces by many threads, and glibc keeps as much as the state
    takes for later, beside the state itself.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def spare_maps() -> None:
    """Drops JAX's compiled functions where they hold half of the memory maps the system lets a process have.

    On the CPU every compiled function keeps some maps for good, thousands for a whole run. Beyond Linux's limit (65,530
    as installed) the next compilation crashes the process, so about a dozen runs in one process would. What is still
    needed is compiled again.
    """
    if not MOST_MAPS.exists():  # not Linux: no such limit
        return
    with MAPS.open("rb") as maps:
        held = sum(1 for _ in maps)
    if held > int(MOST_MAPS.read_text()) // 2:
        jax.clear_caches()
