"""Saving and restoring: what comes back is what was saved, and half a checkpoint is none."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from fedjax_rec.checkpoint import KEEP, Checkpoints
from fedjax_rec.layout import clients_mesh
from fedjax_rec.workdir import UsageError


@struct.dataclass
class Held:
    table: jax.Array
    rest: tuple


class Pair(NamedTuple):
    a: jax.Array
    b: jax.Array


def tree(seed: int) -> dict:
    """Everything a run's state can hold."""
    rng = np.random.default_rng(seed)
    return {
        "held": Held(
            jnp.asarray(rng.normal(size=(4, 3)), jnp.float32),
            (jnp.int32(seed), {"bias": jnp.float32(0.1)}, Pair(jnp.arange(2), jnp.ones(2, jnp.bfloat16)), ()),
        ),
        "key": jax.random.fold_in(jax.random.key(1), seed),
        "keys": jax.random.split(jax.random.key(seed), 3),
        "ranks": rng.normal(size=(3, 2)).astype(np.float32),
        "with_nan": np.array([1.5, np.nan], np.float32),
        "counts": np.arange(5, dtype=np.int32),
        "mail": (),
    }


def assert_same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape and isinstance(a, np.ndarray) == isinstance(b, np.ndarray)
        if jnp.issubdtype(b.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        np.testing.assert_array_equal(a, b)


def test_round_trip_keeps_values_types_and_structure(tmp_path):
    with Checkpoints(tmp_path) as held:
        held.save(3, tree(3), {"best_round": 2, "best_value": 0.1, "names": ["a"], "none": None})
    with Checkpoints(tmp_path) as held:
        done, found = held.load(tree(0))
        assert held.notes() == {"best_round": 2, "best_value": 0.1, "names": ["a"], "none": None}
    assert done == 3
    assert_same(found, tree(3))


def test_restored_keys_draw_the_same_numbers(tmp_path):
    with Checkpoints(tmp_path) as held:
        held.save(1, tree(1), {})
        _, found = held.load(tree(0))
    draw = lambda key: jax.random.normal(key, (4,))
    np.testing.assert_array_equal(draw(found["key"]), draw(tree(1)["key"]))


def test_arrays_come_back_to_their_devices(tmp_path):
    spread = NamedSharding(clients_mesh(4), P("clients"))
    state = {"clients": jax.device_put(jnp.arange(8.0), spread)}
    with Checkpoints(tmp_path) as held:
        held.save(1, state, {})
        _, found = held.load(state)
    assert found["clients"].sharding == spread
    np.testing.assert_array_equal(found["clients"], state["clients"])


def test_an_empty_folder_has_no_checkpoint(tmp_path):
    with Checkpoints(tmp_path / "new") as held:
        assert held.latest is None


def test_the_newest_counts_and_old_ones_go(tmp_path):
    with Checkpoints(tmp_path) as held:
        for done in (5, 10, 15):
            held.save(done, {"x": jnp.float32(done)}, {"done": done})
        assert held.latest == 15
    with Checkpoints(tmp_path) as held:
        done, found = held.load({"x": jnp.float32(0)})
        assert (done, float(found["x"]), held.notes()) == (15, 15, {"done": 15})
    assert len([p for p in tmp_path.iterdir() if p.is_dir()]) == KEEP


def test_saving_the_same_round_again_keeps_the_first(tmp_path):
    with Checkpoints(tmp_path) as held:
        held.save(5, {"x": jnp.float32(1)}, {})
        held.save(5, {"x": jnp.float32(2)}, {})
        assert float(held.load({"x": jnp.float32(0)})[1]["x"]) == 1


def test_notes_are_not_required(tmp_path):
    with Checkpoints(tmp_path) as held:
        held.save(1, {"x": jnp.float32(1)}, {})
        assert held.notes() == {}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with the checkpoints 1 and 2."""
    folder = tmp_path_factory.mktemp("saved")
    with Checkpoints(folder) as held:
        for done in (1, 2):
            held.save(done, {"x": jnp.full(3, done, jnp.float32)}, {"done": done})
    return folder


@pytest.mark.parametrize("content", ["whole", "empty", "half"])
def test_an_unfinished_checkpoint_is_ignored(saved, tmp_path, content):
    """A kill leaves a folder under a temporary name, more or less full."""
    folder = tmp_path / "run"
    shutil.copytree(saved, folder)
    real = next(path for path in folder.iterdir() if path.name.endswith("2"))
    torn = folder / f"{real.name[:-1]}3.orbax-checkpoint-tmp"
    shutil.copytree(real, torn)
    files = sorted(p for p in torn.rglob("*") if p.is_file())
    for file in files if content == "empty" else files[::2] if content == "half" else []:
        file.unlink()
    with Checkpoints(folder) as held:
        assert held.latest == 2
        np.testing.assert_array_equal(held.load({"x": jnp.zeros(3)})[1]["x"], [2, 2, 2])
        held.save(3, {"x": jnp.full(3, 3.0)}, {"done": 3})  # and its name is free again
    with Checkpoints(folder) as held:
        assert held.latest == 3 and held.notes() == {"done": 3}


def halve(path):
    for file in filter(Path.is_file, path.rglob("*")):
        os.truncate(file, file.stat().st_size // 2)


DAMAGE = {  # not of the arrays alone: Orbax then leaves tasks behind, of which pytest makes failures
    "halved": halve,
    "without state": lambda path: shutil.rmtree(path / "state"),
    "empty": lambda path: [shutil.rmtree(path), path.mkdir()],
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_good(saved, tmp_path, damage):
    folder = tmp_path / "run"
    shutil.copytree(saved, folder)
    DAMAGE[damage](folder / "2")
    said = r"run/2 cannot be read \(.*\); remove it to go on from round 1$"
    with Checkpoints(folder) as held, pytest.raises(UsageError, match=said):
        held.notes()
        held.load({"x": jnp.zeros(3)})
    shutil.rmtree(folder / "2")
    with Checkpoints(folder) as held:
        assert held.load({"x": jnp.zeros(3)})[0] == 1


def test_other_files_in_the_folder_do_not_disturb(saved, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(saved, folder)
    (folder / "notes.txt").write_text("mine")
    (folder / "backup").mkdir()
    with Checkpoints(folder) as held:
        assert held.latest == 2
