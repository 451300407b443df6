"""Fixtures shared by all tests."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import quick

from fedjax_rec.data.readers import DATASETS
from fedjax_rec.system import spare_maps

quick.in_this_process()  # before any device is used

LONGEST = ("test_laws.py", "test_experiments.py", "test_privacy.py")
begun = itertools.count()  # tests of this process
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
    if next(begun) % 8 == 0:  # looking takes up to 40 ms, and eight tests leave half of the maps by far
        spare_maps()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Workers take whole files in this order (`--dist=loadfile --no-loadscope-reorder`): long ones first, so that none
    is left alone at the end. In a file, tests of one `case` follow each other, because they share compiled engines."""
    late = lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST)
    place: dict[tuple[str, str], int] = {}
    for n, item in enumerate(items):
        place.setdefault(_case(item), n)
    items.sort(key=lambda item: (late(item), place[_case(item)]))


def _case(item: pytest.Item) -> tuple[str, str]:
    """The file and the `case` a test is about, if it says one."""
    call = getattr(item, "callspec", None)
    return str(item.path), str(call.params.get("case", "")) if call else ""
