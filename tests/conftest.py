"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import quick

from fedjax_rec.data.readers import DATASETS
from fedjax_rec.system import spare_maps

quick.in_this_process()  # before any device is used

REAL_DATA = Path(os.environ.get("FEDJAX_REC_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data")


@pytest.fixture(scope="session")
def real_data() -> Callable[..., Path]:
    """`real_data(name)`: the folder of a real data set; the test is skipped where its file is absent.

    `real_data(name, file)` asks for that file of the folder instead, and returns its path.
    """

    def find(name: str, file: str | None = None) -> Path:
        folder = REAL_DATA / name
        patterns = (file,) if file else DATASETS[name].files
        if not any(any(folder.glob(pattern)) for pattern in patterns):
            pytest.skip(f"real data: {folder / patterns[0]} is missing; set FEDJAX_REC_DATA to the data directory")
        return folder / file if file else folder

    return find


@pytest.fixture(autouse=True)
def no_crash_from_too_many_compiled_functions() -> None:
    spare_maps()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A file's tests stay together on one worker; of the laws, those of one case, which share compiled engines."""
    group = {item: _case(item) or item.path.name for item in items}
    first = {name: place for place, name in reversed(list(enumerate(group.values())))}
    items.sort(key=lambda item: first[group[item]])
    for item in items:
        item.add_marker(pytest.mark.xdist_group(group[item]))


def _case(item: pytest.Item) -> str:
    """The `case` a law is about, or ""."""
    call = getattr(item, "callspec", None)
    return str(call.params["case"]) if call and item.path.name == "test_laws.py" and "case" in call.params else ""
