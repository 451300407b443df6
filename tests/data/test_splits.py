"""Splits: disjoint and exhaustive, the newest pair is test, the published cold parts, the facts of KU."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from fedjax_rec.data import splits
from fedjax_rec.data.interactions import DataError, Filters, Interactions, from_frame
from fedjax_rec.data.readers import load
from fedjax_rec.data.splits import Pairs, Split

SEEDS = range(5)


def random_interactions(seed: int, labels: bool = False) -> Interactions:
    """40 users with 3 to 12 pairs of 60 items, times with many ties, rows of users mixed."""
    rng = np.random.default_rng(seed)
    rows = [
        (user, item, rng.integers(0, 6))
        for user in range(40)
        for item in rng.choice(60, rng.integers(3, 13), replace=False)
    ]
    frame = pd.DataFrame(rows, columns=["user", "item", "timestamp"]).sample(frac=1, random_state=seed)
    if labels:
        frame["split_label"] = rng.integers(0, 3, len(frame))
    return from_frame(frame.reset_index(drop=True), "toy")


def as_set(pairs: Pairs) -> set[tuple[int, int]]:
    return set(zip(pairs.user.tolist(), pairs.item.tolist(), strict=True))


def every_split(interactions: Interactions) -> list[Split]:
    made = [splits.make(interactions, "leave_one_out", ties=ties) for ties in splits.TIE_RULES]
    return [*made, splits.make(interactions, "given"), splits.make(interactions, "cold_items", seed=3)]


@pytest.mark.parametrize("seed", SEEDS)
def test_parts_are_disjoint_exhaustive_and_sorted(seed):
    interactions = random_interactions(seed, labels=True)
    everything = as_set(Pairs(interactions.user, interactions.item))
    for split in every_split(interactions):
        parts = [split.train, split.valid, split.test]
        assert sum(len(part.user) for part in parts) == len(interactions)
        assert set.union(*map(as_set, parts)) == everything
        for part in parts:
            assert (part.user.dtype, part.item.dtype) == (np.int32, np.int32)
            assert np.array_equal(np.lexsort((part.item, part.user)), np.arange(len(part.user)))
        assert (split.num_users, split.num_items) == (interactions.num_users, interactions.num_items)


@pytest.mark.parametrize("seed", SEEDS)
def test_newest_is_test_and_second_newest_valid(seed):
    interactions = random_interactions(seed)
    frame = pd.DataFrame({"user": interactions.user, "item": interactions.item, "time": interactions.time})
    newest = {
        "later_row": frame.groupby("user")["time"].rank(method="first", ascending=True),
        "earlier_row": -frame.groupby("user")["time"].rank(method="first", ascending=False),
    }
    for ties, rank in newest.items():
        split = splits.leave_one_out(interactions, ties)
        by_age = frame.assign(rank=rank).sort_values(["user", "rank"])
        assert np.array_equal(split.test.item, by_age.groupby("user")["item"].last())
        assert np.array_equal(split.valid.item, by_age.groupby("user")["item"].nth(-2))
        assert np.array_equal(split.test.user, np.arange(interactions.num_users))


def test_ties_go_by_file_order():
    interactions = from_frame(pd.DataFrame({"user": [1] * 4, "item": [4, 5, 6, 7], "timestamp": 8}), "toy")
    raw_test = {
        ties: interactions.item_ids[splits.leave_one_out(interactions, ties).test.item[0]] for ties in splits.TIE_RULES
    }
    assert raw_test == {"later_row": 7, "earlier_row": 4}
    with pytest.raises(DataError, match="unknown ties 'later', did you mean 'later_row'"):
        splits.leave_one_out(interactions, "later")


def test_without_time_the_order_of_rows_is_named():
    frame = pd.DataFrame({"user": [1] * 4, "item": [4, 5, 6, 7]})
    interactions = from_frame(frame, "toy")
    for ties in splits.TIE_RULES:
        split = splits.leave_one_out(interactions, ties)
        assert interactions.item_ids[split.test.item[0]] == 7
        assert "no time column: the order of rows" in split.tie_rule
        assert split.tie_rule in splits.describe(interactions, split)
    assert "no time" not in splits.leave_one_out(from_frame(frame.assign(timestamp=1), "toy")).tie_rule


def test_short_histories_name_the_remedy():
    frame = pd.DataFrame({"user": [7, 7, 7, 8, 8], "item": [1, 2, 3, 1, 2]})
    message = r"toy: 1 of 2 users have fewer than 3 pairs, e\.g\. user 8 has 2, .*set --filter min_user=3"
    with pytest.raises(DataError, match=message):
        splits.leave_one_out(from_frame(frame, "toy"))
    assert len(splits.leave_one_out(from_frame(frame, "toy", Filters(min_user=3))).train.user) == 1


def test_short_histories_with_repeated_items_name_min_pairs():
    frame = pd.DataFrame({"user": [7, 7, 7] + [8] * 20, "item": [1, 2, 3] + [1] * 20})
    for filters in (Filters(), Filters(min_user=10)):
        with pytest.raises(DataError, match=r"user 8 has 1, .*set --filter min_pairs=3"):
            splits.leave_one_out(from_frame(frame, "toy", filters))
    with pytest.raises(DataError, match=r"user 8 has 1, .*set --filter min_pairs=3"):
        frame = pd.DataFrame({"user": [8, 8, 8, 7, 7, 7, 6, 6, 6], "item": [1, 4, 5, 1, 2, 3, 1, 2, 3]})
        splits.leave_one_out(from_frame(frame, "toy", Filters(min_user=3, min_item=2)))
    split = splits.leave_one_out(from_frame(frame, "toy", Filters(min_item=2, min_pairs=3)))
    assert len(split.train.user) == split.num_users == 2


def test_given_needs_labels_in_every_part():
    with pytest.raises(DataError, match=r"no column split_label.*--split=leave_one_out"):
        splits.given(random_interactions(0))
    frame = pd.DataFrame({"user": [1, 1], "item": [1, 2], "split_label": [0, 2]})
    with pytest.raises(DataError, match=r"split_label leaves the valid part empty.*another --split"):
        splits.given(from_frame(frame, "toy"))


@pytest.mark.parametrize("seed", SEEDS)
def test_cold_items_share_no_item(seed):
    interactions = random_interactions(seed)
    split = splits.cold_items(interactions, seed)
    for name, part in (("train", split.train), ("valid", split.valid), ("test", split.test)):
        assert np.array_equal(np.unique(part.item), np.flatnonzero(split.candidates[name]))
    assert sum(split.candidates.values()).tolist() == [1] * interactions.num_items
    again, other = splits.cold_items(interactions, seed), splits.cold_items(interactions, seed + 1)
    assert np.array_equal(split.test.item, again.test.item)
    assert not np.array_equal(split.candidates["test"], other.candidates["test"])


@pytest.mark.parametrize(
    ("items", "sizes"),
    [(14_199, [8_519, 1_420, 4_260]), (25_584, [15_350, 2_558, 7_676]), (10, [6, 1, 3])],
)
def test_cold_item_shares_are_rounded_down(items, sizes):
    interactions = from_frame(pd.DataFrame({"user": 1, "item": np.arange(items)}), "toy")
    candidates = splits.cold_items(interactions).candidates
    assert [int(candidates[part].sum()) for part in ("train", "valid", "test")] == sizes


def test_cold_items_checks_its_parts():
    interactions = from_frame(pd.DataFrame({"user": [1] * 3, "item": [1, 2, 3]}), "toy")
    with pytest.raises(DataError, match=r"parting the items leaves the valid part empty.*another --split"):
        splits.cold_items(from_frame(pd.DataFrame({"user": [1, 1], "item": [1, 2]}), "toy"))
    with pytest.raises(DataError, match=r"parts of shape \(2,\), expected 0, 1 or 2 for each of 3 items"):
        splits.cold_items(interactions, parts=np.zeros(2, np.int8))
    with pytest.raises(DataError, match="expected three numbers > 0"):
        splits.cold_items(interactions, ratios=(6, 4))
    split = splits.cold_items(interactions, parts=np.array([2, 0, 1], np.int8))
    assert split.test.item.tolist() == [0]


@pytest.fixture
def published(tmp_path):
    """Interactions of items 1 to 4 and a writer of the three part files."""
    interactions = from_frame(pd.DataFrame({"user": 5, "item": [1, 2, 3, 4]}), "toy")
    (tmp_path / "toy").mkdir()

    def write(*parts: list[int], seed: int = 0):
        for file, items in zip(splits.COLD_FILES, parts, strict=True):
            rows = "".join(f"5,{item}\n" for item in items)
            (tmp_path / "toy" / file).write_text("uid,iid\n" + rows)
        return splits.make(interactions, "cold_items", seed, data_dir=tmp_path)

    return interactions, write


def test_published_cold_parts_are_used_where_present(published):
    interactions, write = published
    split = write([1, 4], [3, 3], [2])
    assert interactions.item_ids[split.valid.item].tolist() == [3]
    assert interactions.item_ids[split.test.item].tolist() == [2]
    assert "published" in split.tie_rule
    with pytest.raises(DataError, match="parting the items"):  # four items are too few for a draw
        write([1, 4], [3, 3], [2], seed=1)


def test_published_cold_parts_may_type_ids_otherwise(tmp_path):
    items = ["07", "8", "9", "10"]
    interactions = from_frame(pd.DataFrame({"user": 5, "item": items}), "toy")
    for file, part in zip(splits.COLD_FILES, (["07", "10"], ["8"], ["9"]), strict=True):
        (tmp_path / file).write_text("uid,iid\n" + "".join(f"5,{item}\n" for item in part))
    parts = splits.given_cold_parts(interactions, tmp_path)
    assert dict(zip(interactions.item_ids.tolist(), parts.tolist(), strict=True)) == {"07": 0, "8": 1, "9": 2, "10": 0}


def test_broken_cold_parts_name_file_line_and_remedy(published):
    _, write = published
    with pytest.raises(DataError, match=r"ifedrec_test.csv, line 3: column 'item' holds 9, expected an item of toy; c"):
        write([1], [3], [2, 9])
    with pytest.raises(DataError, match=r"ifedrec_vali.csv, line 2: .* holds 1, .* not in ifedrec_train.csv too; c"):
        write([1], [1], [2])
    with pytest.raises(DataError, match=r"1 items of toy, e.g. 4, are in none of .*; get the files again"):
        write([1], [2], [3])


def test_unknown_split_names_the_nearest():
    with pytest.raises(DataError, match=r"unknown split 'cold', did you mean 'cold_items'\? Known: leave_one_out"):
        splits.make(random_interactions(0), "cold")


def test_ku_facts(real_data):
    interactions = load("ku", real_data("ku").parent)
    split = splits.make(interactions, "given")
    assert interactions.counts["duplicates"] == 5
    assert [len(part.user) for part in (split.train, split.valid, split.test)] == [3_076, 204, 204]
    unseen = np.setdiff1d(np.arange(560), split.train.item)
    assert len(unseen) == 16
    assert np.isin(split.test.item, unseen).sum() == 88
    history = np.sort(np.bincount(split.train.user))
    assert history[-10:].sum() / history.sum() == pytest.approx(0.73, abs=0.005)
    chronological = splits.make(interactions, "leave_one_out")
    assert np.array_equal(chronological.test.item, split.test.item)
    assert np.array_equal(chronological.valid.item, split.valid.item)


def test_ku_description(real_data):
    interactions = load("ku", real_data("ku").parent)
    lines = dict(line.split("  ", 1) for line in splits.describe(interactions, splits.given(interactions)).split("\n"))
    text = {label: value.strip() for label, value in lines.items()}
    assert text["pairs"] == "3,484 (density 3.0497%)"
    assert text["history"] == "median 4, max 251 train pairs per user"
    assert text["unseen items"] == "16 have no train pair"
    assert text["unseen targets"] == "88 of 204 test pairs"
    assert text["duplicates"] == "5 removed"
    assert text["filters"] == "none (0 rows removed)"


def test_citeulike_a_published_parts(real_data):
    folder = real_data("citeulike-a", "ifedrec_train.csv").parent.parent
    interactions = load("citeulike-a", folder)
    split = splits.make(interactions, "cold_items", data_dir=folder)
    sizes = [int(split.candidates[part].sum()) for part in ("train", "valid", "test")]
    assert sizes == [13_584, 1_018, 2_378]
    assert "13,584 / 1,018 / 2,378 items" in splits.describe(interactions, split)
    assert "items drawn by seed 1" in splits.make(interactions, "cold_items", seed=1).tie_rule


def test_ml_1m_rows_of_unknown_order_are_train(real_data):
    interactions = load("ml-1m", real_data("ml-1m").parent)
    split = splits.make(interactions, "leave_one_out")
    unknown = interactions.time == -1
    held_out = as_set(split.valid) | as_set(split.test)
    assert not held_out & as_set(Pairs(interactions.user[unknown], interactions.item[unknown]))


def test_filmtrust_time_changes_what_is_unseen(real_data):
    folder = real_data("filmtrust").parent
    unseen = {}
    for time in ("item", "position"):
        split = splits.make(load("filmtrust", folder, filmtrust_time=time), "leave_one_out")
        unseen[time] = int((~np.isin(split.test.item, split.train.item)).sum())
    assert unseen == {"item": 147, "position": 12}
