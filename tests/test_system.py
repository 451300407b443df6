"""What the library asks of the machine."""

from __future__ import annotations

import jax
import pytest

from fedjax_rec import system


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
