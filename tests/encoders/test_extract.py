"""Batches, resume, imputation and the output file, with a small NumPy encoder in place of a network."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest

from fedjax_rec.data.features import load_npz
from fedjax_rec.data.interactions import DataError
from fedjax_rec.encoders.extract import Encoder, Unreadable, extract, problems_of
from fedjax_rec.encoders.items import MISSING_TITLE, Items, text_items

WIDTH = 5


def features_of(text: str) -> np.ndarray:
    """[WIDTH] numbers that only the text decides."""
    return np.frombuffer(hashlib.sha256(text.encode()).digest()[:WIDTH], np.uint8).astype(np.float32)


class Toy:
    """An encoder that records its batches, cannot read `broken`, and is killed before its batch `dies_at`."""

    def __init__(self, dies_at: int | None = None, broken: tuple[str, ...] = (), **settings):
        self.batches: list[list[str]] = []
        self.dies_at, self.broken = dies_at, broken
        self.settings = {"model": "toy", "weights_hash": "ab12", "versions": {"torch": "2"}, **settings}

    def read(self, text: str) -> str:
        if text in self.broken:
            raise Unreadable(f"{text} cannot be read")
        return text

    def encode(self, texts: list[str]) -> np.ndarray:
        if len(self.batches) == self.dies_at:
            raise KeyboardInterrupt
        self.batches.append(texts)
        # The position inside the batch leaves a trace, as it does in the last bits of a real network.
        return np.stack([features_of(text) for text in texts]) + 1e-3 * np.arange(len(texts), dtype=np.float32)[:, None]

    def extract(self, items: Items, out, **options) -> None:
        options = {"batch_size": 3, "progress": False, **options}
        extract(Encoder(self.settings, self.read, self.encode), items, out, **options)


def make_items(tmp_path, titles) -> Items:
    path = tmp_path / "items.csv"
    path.write_text("item,title\n" + "".join(f"{100 + row},{title}\n" for row, title in enumerate(titles)))
    return text_items(path, "item", "title")


@pytest.fixture
def items(tmp_path) -> Items:
    return make_items(tmp_path, ["word " * (row % 7) + str(row) for row in range(20)])


@pytest.mark.parametrize("killed_at", [[1], [0, 3], [1, 1, 1]])
def test_resumed_is_uninterrupted(tmp_path, items, killed_at):
    broken = (items.inputs[4], items.inputs[11])
    whole = Toy(broken=broken)
    whole.extract(items, tmp_path / "whole.npz")

    encoded = []
    for dies_at in [*killed_at, None]:
        toy = Toy(dies_at, broken)
        if dies_at is None:
            toy.extract(items, tmp_path / "resumed.npz")
        else:
            with pytest.raises(KeyboardInterrupt):
                toy.extract(items, tmp_path / "resumed.npz")
            assert not (tmp_path / "resumed.npz").exists()
        encoded += toy.batches
    assert encoded == whole.batches  # nothing twice, nothing left out
    assert (tmp_path / "resumed.npz").read_bytes() == (tmp_path / "whole.npz").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["items.csv", "resumed.npz", "whole.npz"]


@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: b"junk"])
def test_a_damaged_batch_is_computed_again(tmp_path, items, damage):
    Toy().extract(items, tmp_path / "whole.npz")
    with pytest.raises(KeyboardInterrupt):
        Toy(dies_at=4).extract(items, tmp_path / "out.npz")
    shard = tmp_path / "out.npz.partial" / "0000001.npz"
    shard.write_bytes(damage(shard.read_bytes()))
    toy = Toy()
    toy.extract(items, tmp_path / "out.npz")
    assert len(toy.batches) == 7 - 3
    assert (tmp_path / "out.npz").read_bytes() == (tmp_path / "whole.npz").read_bytes()


@pytest.mark.parametrize("finished", [False, True])
@pytest.mark.parametrize(
    ("toy", "options", "key"),
    [
        (Toy(weights_hash="cd34"), {}, "weights_hash ab12, and this run has cd34"),
        (Toy(model="other"), {}, "model toy, and this run has other"),
        (Toy(versions={"torch": "3"}), {}, "versions"),
        (Toy(pooling="cls"), {}, "pooling None, and this run has cls"),
        (Toy(), {"batch_size": 4}, "batch_size 3, and this run has 4"),
        (Toy(), {"normalise": False}, "normalise True, and this run has False"),
    ],
)
def test_another_run_is_refused(tmp_path, items, finished, toy, options, key):
    out = tmp_path / "out.npz"
    if finished:
        Toy().extract(items, out)
    else:
        with pytest.raises(KeyboardInterrupt):
            Toy(dies_at=2).extract(items, out)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(DataError, match=key) as error:
        toy.extract(items, out, **options)
    assert "give another --out" in str(error.value)
    assert toy.batches == []
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_before_the_first_batch_another_run_may_begin(tmp_path, items):
    """A batch that exceeds the memory is the first one: a smaller --batch_size then just works."""
    with pytest.raises(KeyboardInterrupt):
        Toy(dies_at=0).extract(items, tmp_path / "out.npz")
    Toy().extract(items, tmp_path / "out.npz", batch_size=2)
    with np.load(tmp_path / "out.npz") as file:
        assert json.loads(str(file["settings"]))["batch_size"] == 2


def test_batches_of_an_unknown_run_are_refused(tmp_path, items):
    with pytest.raises(KeyboardInterrupt):
        Toy(dies_at=2).extract(items, tmp_path / "out.npz")
    (tmp_path / "out.npz.partial" / "settings.npz").write_bytes(b"")
    with pytest.raises(DataError, match=r"out\.npz\.partial: exists and was not written"):
        Toy().extract(items, tmp_path / "out.npz")


def test_other_items_are_refused(tmp_path, items):
    with pytest.raises(KeyboardInterrupt):
        Toy(dies_at=2).extract(items, tmp_path / "out.npz")
    with pytest.raises(DataError, match="inputs_hash"):
        Toy().extract(make_items(tmp_path, ["another title"] * 20), tmp_path / "out.npz")


def test_a_finished_file_is_left_as_it_is(tmp_path, items):
    Toy().extract(items, tmp_path / "out.npz")
    before = (tmp_path / "out.npz").stat()
    again = Toy()
    again.extract(items, tmp_path / "out.npz")
    assert again.batches == []
    assert (tmp_path / "out.npz").stat().st_mtime_ns == before.st_mtime_ns


@pytest.mark.parametrize("content", [b"", b"mine", None])
def test_a_foreign_file_is_not_overwritten(tmp_path, items, content):
    out = tmp_path / "out.npz"
    if content is None:
        np.savez(out, values=np.ones((1, 1)))
        content = out.read_bytes()
    else:
        out.write_bytes(content)
    with pytest.raises(DataError, match="was not written by an encoder"):
        Toy().extract(items, out)
    assert out.read_bytes() == content


def test_longest_texts_come_first_and_rows_stay_in_place(tmp_path, items):
    toy = Toy()
    toy.extract(items, tmp_path / "out.npz", normalise=False)
    lengths = [len(text) for batch in toy.batches for text in batch]
    assert lengths == sorted(lengths, reverse=True)
    assert [len(batch) for batch in toy.batches] == [3] * 6 + [2]
    with np.load(tmp_path / "out.npz") as file:
        np.testing.assert_array_equal(file["raw_ids"], np.arange(100, 120))
        assert file["values"].dtype == np.float32
        np.testing.assert_allclose(file["values"], [features_of(text) for text in items.inputs], atol=0.01)
        assert file["present"].all()
        assert not file["missing"].any()
        settings = json.loads(str(file["settings"]))
    assert settings == {**toy.settings, "inputs_hash": items.fingerprint, "batch_size": 3, "normalise": False}


def test_unreadable_and_absent_inputs_get_the_mean(tmp_path):
    """Absent before the run (no file) and unreadable in it; the reader finds the same by raw id."""
    texts: list = [f"picture {row}" for row in range(8)]
    texts[5] = None
    items = Items("items.csv", np.arange(200, 208), texts, {5: "no file 205.jpg"}, "f00d")
    toy = Toy(broken=("picture 2", "picture 6"))
    toy.extract(items, tmp_path / "out.npz")

    lost = [2, 5, 6]
    assert problems_of(tmp_path / "out.npz") == {
        "202": "picture 2 cannot be read",
        "205": "no file 205.jpg",
        "206": "picture 6 cannot be read",
    }
    with np.load(tmp_path / "out.npz") as file:
        values = file["values"]
        np.testing.assert_array_equal(np.flatnonzero(~file["present"]), lost)
        np.testing.assert_array_equal(np.flatnonzero(file["missing"]), lost)
    kept = np.delete(values, lost, axis=0)
    np.testing.assert_allclose(np.linalg.norm(kept, axis=1), 1, rtol=1e-6)
    np.testing.assert_allclose(values[lost], np.tile(kept.mean(axis=0), (3, 1)), rtol=1e-6)

    order = np.array([206, 203, 200, 207])
    loaded = load_npz(tmp_path / "out.npz", order)
    np.testing.assert_array_equal(loaded.present, [False, True, True, True])
    np.testing.assert_array_equal(loaded.values[1:], values[order[1:] - 200])
    assert "(toy ab12): by raw item id, 3 of 4 items" in loaded.source


def test_a_missing_title_keeps_its_own_features(tmp_path):
    """It is encoded as a sentence: the reader must not put the mean in its place."""
    items = make_items(tmp_path, ["one", "", "two two"])
    Toy().extract(items, tmp_path / "out.npz", normalise=False)
    loaded = load_npz(tmp_path / "out.npz", [101])
    np.testing.assert_allclose(loaded.values, [features_of(MISSING_TITLE)], atol=0.01)
    assert problems_of(tmp_path / "out.npz") == {"101": "no title"}
    with np.load(tmp_path / "out.npz") as file:
        np.testing.assert_array_equal(file["missing"], [False, True, False])


def test_whole_batches_may_be_unreadable(tmp_path, items):
    longest = tuple(sorted(items.inputs, key=len)[-4:])
    Toy(broken=longest).extract(items, tmp_path / "out.npz")
    assert len(problems_of(tmp_path / "out.npz")) == 4


def test_nothing_readable_is_an_error(tmp_path, items):
    with pytest.raises(DataError, match=r"none of the 20 items .* first \(100\) because of: 0 cannot be read"):
        Toy(broken=tuple(items.inputs)).extract(items, tmp_path / "out.npz")
    assert not (tmp_path / "out.npz").exists()


def test_features_that_are_not_finite_name_the_item(tmp_path, items):
    class Broken(Toy):
        def encode(self, texts):
            return np.array([[np.nan if text == items.inputs[9] else 1.0] for text in texts], np.float32)

    with pytest.raises(DataError, match="features of item 109 are not finite"):
        Broken().extract(items, tmp_path / "out.npz")
    assert not (tmp_path / "out.npz").exists()


def test_progress_counts_all_items_also_after_a_resume(tmp_path, items, capsys):
    with pytest.raises(KeyboardInterrupt):
        Toy(dies_at=3).extract(items, tmp_path / "out.npz")
    assert capsys.readouterr().err == ""
    Toy().extract(items, tmp_path / "out.npz", progress=True)
    assert "20/20" in capsys.readouterr().err
