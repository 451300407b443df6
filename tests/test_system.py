"""What the library asks of the machine."""

from __future__ import annotations

import types
from pathlib import Path

import jax
import pytest

from fedjax_rec import system


def group(root: Path, version: int, limit: str) -> None:
    """A control group that uses 500 bytes, of which 100 can go."""
    names = ("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes")
    total = "" if version == 2 else "total_"
    (root / "memory").mkdir(exist_ok=True)
    for name, value in zip(names[version == 1], (limit, "500\n"), strict=True):
        (root / name).write_text(value)
    (root / ("memory.stat" if version == 2 else "memory/memory.stat")).write_text(
        f"anon 300\n{total}inactive_file 100\n"
    )


@pytest.mark.parametrize("version", [1, 2])
def test_a_containers_limit_counts_where_it_is_lower_than_the_machine(version, tmp_path, monkeypatch):
    assert system.cgroup_bytes(tmp_path) == []
    group(tmp_path, version, "1000\n")
    assert system.cgroup_bytes(tmp_path) == [600]
    group(tmp_path, version, "200\n")  # was lowered below what is used
    assert system.cgroup_bytes(tmp_path) == [0]
    monkeypatch.setattr(system, "cgroup_bytes", lambda: [600])
    assert system.available_bytes(jax.devices()) == 600
    monkeypatch.setattr(system, "cgroup_bytes", lambda: [2**70])
    assert 600 < system.available_bytes(jax.devices()) < 2**50


def test_a_group_without_a_limit_sets_none(tmp_path):
    group(tmp_path, 2, "max\n")
    assert system.cgroup_bytes(tmp_path) == []


@pytest.mark.parametrize(("most", "dropped"), [(10, True), (10**9, False)])
def test_compiled_functions_are_dropped_before_the_process_runs_out_of_maps(most, dropped, tmp_path, monkeypatch):
    limit = tmp_path / "max_map_count"
    limit.write_text(f"{most}\n")
    monkeypatch.setattr(system, "MOST_MAPS", limit)
    double = jax.jit(lambda x: 2 * x)
    assert double(1.0) == 2 and double._cache_size() == 1
    system.spare_maps()
    assert double._cache_size() == (0 if dropped else 1)
    assert double(2.0) == 4


def test_free_memory_is_returned_where_the_library_can(monkeypatch):
    asked = []
    library = types.SimpleNamespace(malloc_trim=asked.append)
    monkeypatch.setattr(system.ctypes, "CDLL", lambda name: library)
    monkeypatch.setattr(system.sys, "platform", "linux")
    system.return_free_memory()
    assert asked == [0]
    del library.malloc_trim  # musl
    system.return_free_memory()
    monkeypatch.setattr(system.sys, "platform", "darwin")
    system.return_free_memory()
    assert asked == [0]
