"""Item features from tags: latent directions of the weighted item-tag matrix, as an .npz for --features.

    python experiments/tag_features.py --tags=DATA/citeulike-a/item-tag.dat --out=tags.npz
    python launch.py --dataset=citeulike-a --split=cold_items --data_dir=DATA --method=cs_fcf --features=tags=tags.npz

The file has one line per item: how many tags, then their ids (citeulike-a's item-tag.dat); an item's raw id is its
line, counted from 0. A tag weighs log(items / items that have it), tags of few items are left out, and rows have length
1 before and after the truncated singular value decomposition.

The interactions are not read. But CiteULike's tags were given by users who saved the article, held-out users among
them: an item that is really new has none yet, so figures with tags tell of items that somebody has described.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import scipy.sparse
import scipy.sparse.linalg
from absl import app, flags

from fedjax_rec.data.interactions import DataError
from fedjax_rec.validate import in_one_line

FLAGS = flags.FLAGS
flags.DEFINE_string("tags", None, "File of the tags.", required=True)
flags.DEFINE_string("out", "tags.npz", "The .npz to write.")
flags.DEFINE_integer("min_items", 5, "Tags of fewer items are left out.")
flags.DEFINE_integer("width", 300, "Directions kept.")


def read_tags(path: Path) -> scipy.sparse.csr_array:
    """Item-tag matrix of ones, [items, tags].

    Raises:
        DataError: for a line that is not a count and as many ids.
    """
    rows, columns = [], []
    lines = path.read_text().splitlines()
    for item, line in enumerate(lines):
        fields = line.split()
        if not all(field.isdigit() for field in fields) or not fields or int(fields[0]) != len(fields) - 1:
            raise DataError(
                f"{path}, line {item + 1}: {line[:40]!r}; expected a count and as many tag ids; fetch the file again"
            )
        columns += map(int, fields[1:])
        rows += [item] * (len(fields) - 1)
    shape = (len(lines), max(columns, default=0) + 1)
    found = scipy.sparse.coo_array((np.ones(len(rows)), (rows, columns)), shape=shape).tocsr()
    found.data[:] = 1.0  # a tag that an item has twice
    return found


def unit_rows(x):
    """Rows scaled to length 1; rows of zeros stay."""
    length = np.sqrt((x * x).sum(axis=1))
    return x * (1.0 / np.where(length > 0, length, 1.0))[:, None]


def features(tags: scipy.sparse.csr_array, min_items: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """(latent rows of length 1, float32 [items, width or fewer], zeros for items without tags; which items have some)

    Raises:
        DataError: if no two tags have `min_items` items.
    """
    items_of_tag = np.asarray(tags.sum(axis=0)).ravel()
    kept = np.flatnonzero(items_of_tag >= min_items)
    if len(kept) < 2:
        raise DataError(f"{len(kept)} tags have {min_items} items or more; expected some; lower --min_items")
    weighted = tags[:, kept] @ scipy.sparse.diags_array(np.log(tags.shape[0] / items_of_tag[kept]))
    weighted = unit_rows(weighted.tocsr())
    width = min(width, min(weighted.shape) - 1)
    left, size, _ = scipy.sparse.linalg.svds(weighted, k=width, rng=np.random.default_rng(0))
    order = np.argsort(-size)
    present = np.asarray(weighted.count_nonzero(axis=1)) > 0
    # rows without tags are rounding errors here, which unit_rows would blow up
    return unit_rows(np.where(present[:, None], left[:, order] * size[order], 0.0)).astype(np.float32), present


def write(arguments: list[str]) -> str:
    """Reads, makes, writes; says what is there."""
    if arguments:
        raise ValueError(f"{arguments[0]!r}: expected flags only")
    tags = read_tags(Path(FLAGS.tags))
    values, present = features(tags, FLAGS.min_items, FLAGS.width)
    arrays = {"values": values, "raw_ids": np.arange(len(values)), "present": present}
    with open(FLAGS.out, "wb") as file:  # by name, savez would add .npz
        np.savez(file, model=np.array(f"tags in {FLAGS.min_items} items or more"), **arrays)
    return f"{FLAGS.out}: {len(values)} items, {values.shape[1]} directions, {(~present).sum()} items without tags"


def main(argv) -> int:
    """What was written, or bad usage and bad input as one line on standard error."""
    return in_one_line("tag_features.py", lambda: write(argv[1:]))


if __name__ == "__main__":
    app.run(main)
