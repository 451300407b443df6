"""Interactions -> train, valid and test pairs: pure functions of (interactions, seed)."""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from fedjax_rec.data.interactions import SPLIT_PARTS, DataError, Filters, Interactions, refuse
from fedjax_rec.data.readers import read_csv

TIE_RULES: Mapping[str, str] = {
    "later_row": "of a user's pairs with equal time, the one later in the file is the newer.",
    "earlier_row": "of a user's pairs with equal time, the one earlier in the file is the newer.",
}
"""How leave-one-out orders equal times. `earlier_row` is the released FedRKG code: it ranks times in descending
order with method="first"."""

NO_TIME = "there is no time column: the order of rows stands for time."

COLD_FILES = ("ifedrec_train.csv", "ifedrec_vali.csv", "ifedrec_test.csv")
"""Published cold-item parts beside a data set: header uid,iid, raw ids, item sets disjoint."""


class Pairs(NamedTuple):
    """Distinct (user, item) pairs, sorted by user, then item; both int32 [pairs]."""

    user: np.ndarray
    item: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Split:
    """Disjoint parts that together hold every pair of the interactions.

    Attributes:
        name: leave_one_out, given or cold_items.
        num_users: users of the interactions; some may be absent from a part.
        num_items: size of the full catalogue.
        train: pairs to learn from.
        valid: pairs to select on.
        test: pairs to report on.
        candidates: cold_items: bool [items] for each of "train" (the warm items), "valid" and "test" (the items
            that compete there). None: the full catalogue competes.
        tie_rule: how ties were broken, one sentence; or that there was no time.
    """

    name: str
    num_users: int
    num_items: int
    train: Pairs
    valid: Pairs
    test: Pairs
    candidates: dict[str, np.ndarray] | None
    tie_rule: str

    def competing(self, part: str) -> int | None:
        """How many items compete in "valid" or "test"; None: the full catalogue, without a user's own."""
        return None if self.candidates is None else int(self.candidates[part].sum())

    def __repr__(self) -> str:
        sizes = ", ".join(f"{part} {len(getattr(self, part).user):,}" for part in ("train", "valid", "test"))
        return f"Split({self.name}, {self.num_users:,} users, {self.num_items:,} items, pairs: {sizes})"


def leave_one_out(interactions: Interactions, ties: str = "later_row") -> Split:
    """Each user's newest pair is test, the second newest valid, the rest train.

    Args:
        interactions: at least 3 pairs per user.
        ties: a key of TIE_RULES.

    Raises:
        DataError: a user has fewer than 3 pairs, or `ties` is unknown.
    """
    _known(ties, TIE_RULES, "ties")
    per_user = np.bincount(interactions.user, minlength=interactions.num_users)
    short = np.flatnonzero(per_user < 3)
    if len(short):
        # min_user cannot remove a user who has rows enough: they repeat items, or another filter took them afterwards.
        plain = not interactions.counts.get("duplicates") and interactions.filters == Filters()
        remedy = (
            "set --filter min_user=3 or more (it counts rows, duplicates included)"
            if plain
            else "set --filter min_pairs=3 or more (it counts distinct items; min_user counts rows)"
        )
        raise DataError(
            f"{interactions.name}: {len(short)} of {interactions.num_users} users have fewer than 3 pairs, e.g. "
            f"user {interactions.user_ids[short[0]]} has {per_user[short[0]]}, expected one pair each for train, "
            f"valid and test; {remedy}"
        )
    row = np.arange(len(interactions))
    oldest_first = np.lexsort((row if ties == "later_row" else -row, interactions.time, interactions.user))
    newest = np.cumsum(per_user) - 1
    part = np.zeros(len(interactions), np.int8)
    part[oldest_first[newest - 1]] = 1
    part[oldest_first[newest]] = 2
    return _split("leave_one_out", interactions, part, TIE_RULES[ties] if interactions.timed else NO_TIME)


def given(interactions: Interactions) -> Split:
    """The split that the file brings as labels 0 train, 1 valid, 2 test.

    That no pair stands in two parts was checked on reading (`from_frame`), where the lines are known.

    Raises:
        DataError: the file has no labels, or a part is empty.
    """
    if interactions.split_label is None:
        raise DataError(
            f"{interactions.name}: no column split_label, expected 0, 1 or 2 per row; use --split=leave_one_out"
        )
    _check_no_part_empty(interactions.name, np.bincount(interactions.split_label, minlength=3), "split_label")
    return _split("given", interactions, interactions.split_label, "the labels of the file decide, no time is used.")


def cold_items(
    interactions: Interactions,
    seed: int = 0,
    ratios: Sequence[int] = (6, 1, 3),
    parts: np.ndarray | None = None,
) -> Split:
    """Items are parted, and all pairs of an item go with it: valid and test items are unseen in training.

    Args:
        interactions: any.
        seed: of the draw of items; unused where `parts` are given.
        ratios: shares of items in train, valid, test; the bounds are rounded down.
        parts: int8 [items], 0 train, 1 valid, 2 test, instead of a draw.

    Raises:
        DataError: a part is left without items, or `parts` does not fit the items.
    """
    if parts is None:
        parts, origin = _drawn_parts(interactions.num_items, seed, ratios), f"items drawn by seed {seed}"
    else:
        parts, origin = np.asarray(parts), "items parted as published with the data"
    if parts.shape != (interactions.num_items,) or not np.isin(parts, (0, 1, 2)).all():
        raise DataError(
            f"{interactions.name}: parts of shape {parts.shape}, expected 0, 1 or 2 for each of "
            f"{interactions.num_items} items; give one part per item"
        )
    _check_no_part_empty(interactions.name, np.bincount(parts, minlength=3), "parting the items")
    candidates = {name: parts == label for label, name in enumerate(SPLIT_PARTS)}
    tie_rule = f"{origin}, no time is used."
    return _split("cold_items", interactions, parts[interactions.item], tie_rule, candidates)


def given_cold_parts(interactions: Interactions, folder: str | os.PathLike) -> np.ndarray:
    """Reads the published cold-item parts, COLD_FILES in `folder`, as int8 [items] for `cold_items`.

    Raises:
        DataError: a file is missing or broken, an item stands in two files, an item of the files is unknown
            (unless filters removed rows), or an item of the interactions is in no file.
    """
    parts = np.full(interactions.num_items, -1, np.int8)
    # As text: whether a column is numbers or text is decided file by file.
    index_of = pd.Index(interactions.item_ids.astype(str))
    for label, path in enumerate(Path(folder) / name for name in COLD_FILES):
        raw = read_csv(path)["item"]
        item = index_of.get_indexer(raw.astype(str))
        if (item < 0).any() and not interactions.counts.get("rows_filtered"):
            refuse(raw, str(path), item < 0, f"an item of {interactions.name}")
        raw, item = raw[item >= 0], item[item >= 0]
        taken = (parts[item] >= 0) & (parts[item] != label)
        if taken.any():
            refuse(raw, str(path), taken, f"an item that is not in {COLD_FILES[parts[item][taken][0]]} too")
        parts[item] = label
    if (parts < 0).any():
        raise DataError(
            f"{folder}: {(parts < 0).sum()} items of {interactions.name}, e.g. "
            f"{interactions.item_ids[np.argmax(parts < 0)]}, are in none of {', '.join(COLD_FILES)}, expected every "
            "item in one; get the files again"
        )
    return parts


SPLITS = ("leave_one_out", "given", "cold_items")


def make(
    interactions: Interactions,
    name: str,
    seed: int = 0,
    data_dir: str | os.PathLike | None = None,
    *,
    ties: str = "later_row",
    ratios: Sequence[int] = (6, 1, 3),
) -> Split:
    """The split of that name.

    Args:
        interactions: what to split.
        name: one of SPLITS.
        seed: of the draw of cold items. With 0, `cold_items` takes the published parts where there are some.
        data_dir: where the data folders lie: the published parts are COLD_FILES in the folder of this data set there;
            None: always draw.
        ties: see `leave_one_out`.
        ratios: see `cold_items`.

    Raises:
        DataError: an unknown name, or what the split itself raises.
    """
    _known(name, SPLITS, "split")
    if name == "leave_one_out":
        return leave_one_out(interactions, ties)
    if name == "given":
        return given(interactions)
    folder = None if data_dir is None else Path(data_dir) / interactions.name
    published = not seed and folder is not None and (folder / COLD_FILES[0]).is_file()
    parts = given_cold_parts(interactions, folder) if published else None
    return cold_items(interactions, seed, ratios, parts)


def describe(interactions: Interactions, split: Split) -> str:
    """A few aligned lines about the data and the split, for people."""
    history = np.bincount(split.train.user, minlength=split.num_users)
    seen = np.bincount(split.train.item, minlength=split.num_items) > 0
    unseen_targets = int((~seen[split.test.item]).sum())
    pairs = len(interactions)
    lines = {
        "data set": interactions.name,
        "users": f"{split.num_users:,}",
        "items": f"{split.num_items:,}",
        "pairs": f"{pairs:,} (density {pairs / (split.num_users * split.num_items):.4%})",
        "filters": f"{interactions.filters} ({interactions.counts.get('rows_filtered', 0):,} rows removed)",
        "duplicates": f"{interactions.counts.get('duplicates', 0):,} removed",
        "split": f"{split.name}: {' / '.join(f'{len(part.user):,}' for part in _parts(split))} pairs",
        "history": f"median {np.median(history):g}, max {history.max()} train pairs per user",
        "users without": f"{(history == 0).sum():,} have no train pair",
        "unseen items": f"{(~seen).sum():,} have no train pair",
        "unseen targets": f"{unseen_targets:,} of {len(split.test.user):,} test pairs",
        "ties": split.tie_rule,
    }
    if split.candidates is not None:
        sizes = " / ".join(f"{split.candidates[part].sum():,}" for part in SPLIT_PARTS)
        lines["candidates"] = f"{sizes} items in {' / '.join(SPLIT_PARTS)}"
    width = max(map(len, lines))
    return "\n".join(f"{label:<{width}}  {text}" for label, text in lines.items())


def _parts(split: Split) -> tuple[Pairs, Pairs, Pairs]:
    return split.train, split.valid, split.test


def _split(
    name: str,
    interactions: Interactions,
    part: np.ndarray,
    tie_rule: str,
    candidates: dict[str, np.ndarray] | None = None,
) -> Split:
    """Deals the pairs out by `part`, 0, 1 or 2 [rows]."""
    order = np.lexsort((interactions.item, interactions.user))
    user, item, part = interactions.user[order], interactions.item[order], part[order]
    train, valid, test = (Pairs(user[part == label], item[part == label]) for label in range(3))
    return Split(name, interactions.num_users, interactions.num_items, train, valid, test, candidates, tie_rule)


def _drawn_parts(num_items: int, seed: int, ratios: Sequence[int]) -> np.ndarray:
    """Part of each item, int8 [items]."""
    if len(ratios) != 3 or min(ratios) <= 0:
        raise DataError(f"ratios are {tuple(ratios)}, expected three numbers > 0, e.g. (6, 1, 3)")
    bounds = num_items * np.cumsum(ratios)[:2] // sum(ratios)
    parts = np.empty(num_items, np.int8)
    order = np.random.default_rng(seed).permutation(num_items)
    parts[order] = np.searchsorted(bounds, np.arange(num_items), side="right")
    return parts


def _check_no_part_empty(name: str, sizes: np.ndarray, origin: str) -> None:
    if not sizes[:3].all():
        empty = SPLIT_PARTS[int(np.argmin(sizes[:3]))]
        raise DataError(
            f"{name}: {origin} leaves the {empty} part empty, expected something in train, valid and test; "
            "use another --split"
        )


def _known(name: str, known: Sequence[str] | Mapping[str, str], what: str) -> None:
    if name not in known:
        near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.0)[0]
        raise DataError(f"unknown {what} '{name}', did you mean '{near}'? Known: {', '.join(known)}")
