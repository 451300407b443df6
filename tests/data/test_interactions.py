"""from_frame: the order of its steps, its re-indexing, its errors."""

from __future__ import annotations

import copy
import dataclasses
import pickle

import numpy as np
import pandas as pd
import pytest

from fedjax_rec.data.interactions import DataError, Filters, from_frame

SEEDS = range(5)


def random_frame(seed: int, rows: int = 300, text: bool = False) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    frame = pd.DataFrame(
        {
            "user": rng.integers(100, 130, rows),
            "item": rng.integers(0, 60, rows) * 7,
            "timestamp": rng.integers(0, 50, rows),
            "rating": rng.integers(1, 6, rows) / 1.0,
        }
    )
    return frame.astype({"user": str, "item": str}) if text else frame


def raw_pairs(interactions) -> list[tuple]:
    return list(
        zip(
            interactions.user_ids[interactions.user].tolist(),
            interactions.item_ids[interactions.item].tolist(),
            strict=True,
        )
    )


@pytest.mark.parametrize("text", [False, True])
@pytest.mark.parametrize("seed", SEEDS)
def test_indices_are_a_bijection_of_raw_ids(seed, text):
    frame = random_frame(seed, text=text)
    made = from_frame(frame, "toy")
    assert set(raw_pairs(made)) == set(zip(frame["user"], frame["item"], strict=True))
    assert len(set(raw_pairs(made))) == len(made)
    assert sorted(set(made.user_ids.tolist())) == sorted(frame["user"].unique())
    assert sorted(set(made.item_ids.tolist())) == sorted(frame["item"].unique())
    assert set(made.item) == set(range(made.num_items))
    assert (made.user.dtype, made.item.dtype, made.time.dtype) == (np.int32, np.int32, np.int64)


@pytest.mark.parametrize("seed", SEEDS)
def test_users_are_numbered_by_first_appearance(seed):
    made = from_frame(random_frame(seed), "toy")
    assert np.array_equal(pd.unique(made.user), np.arange(made.num_users))


@pytest.mark.parametrize("seed", SEEDS)
def test_item_shuffle_depends_on_the_set_of_raw_ids_only(seed):
    frame = random_frame(seed)
    items = from_frame(frame, "toy").item_ids
    other = from_frame(frame.sample(frac=1, random_state=seed).reset_index(drop=True), "toy").item_ids
    assert np.array_equal(items, other)
    assert not np.array_equal(items, np.sort(items))


@pytest.mark.parametrize("seed", SEEDS)
def test_of_duplicates_the_first_by_time_then_by_row_is_kept(seed):
    frame = random_frame(seed)
    made = from_frame(frame, "toy")
    expected = frame.reset_index().sort_values(["timestamp", "index"]).drop_duplicates(["user", "item"])
    expected = expected.sort_values("index")
    assert raw_pairs(made) == list(zip(expected["user"], expected["item"], strict=True))
    assert np.array_equal(made.time, expected["timestamp"])
    assert made.counts["duplicates"] == len(frame) - len(expected) > 0


@pytest.mark.parametrize("seed", SEEDS)
def test_filters_count_raw_rows_before_duplicates_go(seed):
    frame = random_frame(seed)
    made = from_frame(frame, "toy", Filters(min_user=9, min_item=5))
    per_user = frame.groupby("user")["item"].transform("size")
    per_item = frame.groupby("item")["user"].transform("size")
    kept = frame[(per_user >= 9) & (per_item >= 5)]
    assert made.counts["rows"] == len(kept) == len(frame) - made.counts["rows_filtered"]
    assert made.counts["pairs"] == len(kept.drop_duplicates(["user", "item"])) == len(made)
    assert (made.counts["users"], made.counts["items"]) == (made.num_users, made.num_items)


def test_a_user_with_duplicates_passes_on_rows():
    frame = pd.DataFrame({"user": [1, 1, 1, 2, 2], "item": [5, 5, 5, 5, 6]})
    made = from_frame(frame, "toy", Filters(min_user=3))
    assert made.user_ids.tolist() == [1]
    assert made.counts == {
        "rows_read": 5,
        "rows_filtered": 2,
        "rows": 3,
        "duplicates": 2,
        "pairs": 1,
        "users": 1,
        "items": 1,
    }


@pytest.mark.parametrize("seed", SEEDS)
def test_core_is_stable_and_largest(seed):
    frame = random_frame(seed)
    made = from_frame(frame, "toy", Filters(user_core=6, item_core=4))
    left = frame
    while True:  # one offender at a time: a different route to the same unique core
        users, items = left["user"].value_counts(), left["item"].value_counts()
        if users.min() < 6:
            left = left[left["user"] != users.idxmin()]
        elif items.min() < 4:
            left = left[left["item"] != items.idxmin()]
        else:
            break
    assert made.counts["rows"] == len(left) < len(frame)


def test_min_rating_comes_first():
    frame = pd.DataFrame({"user": [1, 1, 2, 2], "item": [1, 2, 1, 2], "rating": [5, 1, 4, 4]})
    made = from_frame(frame, "toy", Filters(min_rating=4, min_user=2))
    assert made.user_ids.tolist() == [2]
    assert len(from_frame(frame, "toy")) == 4


def test_without_timestamps_rows_are_in_file_order():
    made = from_frame(pd.DataFrame({"user": [3, 1, 3], "item": [1, 1, 2]}), "toy")
    assert made.time.tolist() == [0, 1, 2]
    assert made.user_ids.tolist() == [3, 1]


DAYS = ["2020-03-02", "2020-03-01T10:00:00", "2020-03-01"]


@pytest.mark.parametrize(
    "times",
    [
        DAYS,
        pd.Categorical(DAYS),
        pd.to_datetime(DAYS, format="ISO8601"),
        pd.to_datetime(DAYS, format="ISO8601").tz_localize("Asia/Tokyo"),
        np.array(DAYS, "datetime64[ns]") + np.arange(3),
        pd.Series(DAYS, dtype="datetime64[s]").dt.date,
        ["2020-03-02T00:00:00.1Z", "2020-03-02 01:00:00+02:00", "20200301"],
    ],
    ids=["text", "categories", "dates", "zone", "nanoseconds", "days", "offsets"],
)
def test_times_may_be_dates(times):
    made = from_frame(pd.DataFrame({"user": 1, "item": range(3), "timestamp": times}), "toy")
    assert made.time.dtype == np.int64 and made.timed
    assert made.time[0] > made.time[1] >= made.time[2]


@pytest.mark.parametrize("name", ["time", "Time", "unixReviewTime"])
def test_a_frame_may_name_its_time_as_a_csv_does(name):
    made = from_frame(pd.DataFrame({"user": 1, "item": [1, 2], name: [8, 7]}), "toy")
    assert made.time.tolist() == [8, 7] and made.timed


LIKE_A_TIME = ["date", "datetime", "ts", "event_time", "reviewDate", "time_ms", "date added", "created_at"]


@pytest.mark.parametrize("name", LIKE_A_TIME)
def test_an_unused_time_is_refused_unless_there_is_another(name):
    frame = pd.DataFrame({"user": [1], "item": [1], name: [8]})
    with pytest.raises(DataError, match=f"'{name}' looks like a time, .* rename it to timestamp, or drop it"):
        from_frame(frame, "toy")
    assert from_frame(frame, "toy", timestamp=name).time.tolist() == [8]
    assert from_frame(frame.assign(timestamp=7), "toy").time.tolist() == [7]


@pytest.mark.parametrize("name", ["candidate", "update", "sentiment", "category", "times_played", "points", 0])
def test_other_unused_columns_are_none_of_our_business(name):
    assert not from_frame(pd.DataFrame({"user": [1], "item": [1], name: [8]}), "toy").timed


def test_fractional_times_keep_order_and_ties():
    frame = pd.DataFrame({"user": [1] * 4, "item": range(4), "timestamp": [0.5, 0.25, 0.5, 7.0]})
    assert from_frame(frame, "toy").time.tolist() == [1, 0, 1, 2]


def test_columns_can_be_named_and_ids_can_be_categories_or_floats():
    frame = pd.DataFrame({"who": pd.Categorical(["b", "a"]), "what": [12.0, 3.0], "when": [2, 1]})
    made = from_frame(frame, "toy", user="who", item="what", timestamp="when")
    assert made.user_ids.tolist() == ["b", "a"]
    assert sorted(made.item_ids.tolist()) == [3, 12]


def test_filters_name_themselves():
    assert str(Filters()) == "none"
    assert str(Filters(min_user=10, min_rating=0)) == "min_user=10 min_rating=0"
    with pytest.raises(DataError, match="min_item is -1, expected a whole number >= 0"):
        Filters(min_item=-1)


@pytest.mark.parametrize("field", ["min_user", "min_item", "user_core", "item_core", "min_pairs"])
@pytest.mark.parametrize("value", ["5", -1, 2.5, np.nan, np.inf, None, True])
def test_filters_expect_whole_numbers(field, value):
    with pytest.raises(DataError, match=f"filter {field} is {value!r}, expected a whole number >= 0"):
        Filters(**{field: value})
    assert getattr(Filters(**{field: 5}), field) == 5


def test_filters_from_python_get_one_line():
    with pytest.raises(
        DataError, match=r"'minuser': expected one of min_user, .*, min_pairs \(did you mean min_user\?"
    ):
        dataclasses.replace(Filters(min_item=5), minuser=5)
    with pytest.raises(DataError, match="min_rating is '3', expected a number"):
        Filters(min_rating="3")
    with pytest.raises(DataError, match="min_item is '3', expected a whole number"):
        Filters(5, "3")
    filters = Filters(3, min_rating=0.5)
    assert copy.deepcopy(filters) == pickle.loads(pickle.dumps(filters)) == filters


@pytest.mark.parametrize("seed", SEEDS)
def test_min_pairs_counts_distinct_items_after_the_other_filters(seed):
    frame = random_frame(seed)
    made = from_frame(frame, "toy", Filters(min_rating=2, min_pairs=8))
    kept = frame[frame["rating"] >= 2]
    kept = kept[kept.groupby("user")["item"].transform("nunique") >= 8]
    assert 0 < made.num_users < frame["user"].nunique()
    assert sorted(made.user_ids.tolist()) == sorted(kept["user"].unique())
    assert made.counts["rows_filtered"] == len(frame) - len(kept)
    assert made.counts["pairs"] == len(kept.drop_duplicates(["user", "item"])) == len(made)
    assert str(made.filters) == "min_rating=2 min_pairs=8"


BROKEN = {
    "missing column": ({"user": [1]}, r"log.csv: no column 'item' among \['user'\].*rename"),
    "no rows": ({"user": [], "item": []}, "log.csv: holds no rows.*get the file again"),
    "negative id": ({"user": [1, -1], "item": [1, 1]}, r"row 2: column 'user' holds -1, expected a whole number >= 0"),
    "missing id": ({"user": [1, None], "item": [1, 1]}, "row 2: column 'user' is empty, expected .*; correct"),
    "missing text id": ({"user": ["a", ""], "item": [1, 1]}, "row 2: column 'user' is empty"),
    "fraction": ({"user": [1, 1.5], "item": [1, 1]}, "row 2: column 'user' holds 1.5, expected a whole"),
    "truth value": ({"user": [True], "item": [1]}, "row 1: column 'user' holds True"),
    "mixed ids": ({"user": ["a", 3], "item": [1, 1]}, "row 2: column 'user' holds 3, expected an id .all text"),
    "missing time": ({"user": [1], "item": [1], "timestamp": [np.nan]}, "row 1: column 'timestamp' is empty"),
    "infinite time": ({"user": [1], "item": [1], "timestamp": [np.inf]}, "column 'timestamp' holds inf"),
    "a date": ({"user": [1], "item": [1], "timestamp": ["01/02/2020"]}, "'01/02/2020', expected a time .* ISO text"),
    "a late word": ({"user": [1] * 2, "item": [1] * 2, "timestamp": ["2020-01-01", "x"]}, "row 2: .* holds 'x', expe"),
    "no date": ({"user": [1], "item": [1], "timestamp": [pd.NaT]}, "row 1: column 'timestamp' is empty"),
    "unused date": ({"user": [1], "item": [1], "Date": [3]}, "log.csv: column 'Date' looks like a time, .*rename it"),
    "a word": ({"user": [1], "item": [1], "rating": ["good"]}, "column 'rating' holds 'good', expected a number"),
    "label 3": ({"user": [1], "item": [1], "split_label": [3]}, r"holds 3, expected 0 \(train\), 1 \(valid\) or 2"),
    "missing category": ({"user": pd.Categorical([1, None]), "item": [1, 1]}, "row 2: column 'user' is empty, exp"),
    "missing text category": ({"user": [1, 1], "item": pd.Categorical(["a", None])}, "row 2: column 'item' is empty"),
    "missing nullable": ({"user": pd.array([1, None], "Int64"), "item": [1, 1]}, "row 2: column 'user' is empty"),
    "big float": ({"user": [1.0, 2.0**53], "item": [1, 1]}, r"row 2: .*a float below 2\*\*53.*read the ids as int64"),
    "big float32": ({"user": np.float32([1, 2**24]), "item": [1, 1]}, r"row 2: .*a float below 2\*\*24"),
    "two labels": (
        {"user": [1, 1, 1], "item": [1, 4, 1], "split_label": [0, 0, 2]},
        "row 3: user 1 and item 1 are in the test part, expected train as in row 1; remove",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_frame_gets_one_line(case):
    columns, message = BROKEN[case]
    with pytest.raises(DataError, match=message) as error:
        from_frame(pd.DataFrame(columns), "toy", source="log.csv")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["user", "item", "timestamp", "rating", "split_label"])
def test_columns_of_one_name_are_refused(name):
    frame = pd.DataFrame([[1, 2, 3, 4, 0, 5]], columns=["user", "item", "timestamp", "rating", "split_label", name])
    with pytest.raises(DataError, match=f"log.csv: 2 columns are named '{name}', expected one; rename or drop"):
        from_frame(frame, "toy", source="log.csv")
    assert len(from_frame(frame.set_axis([*frame.columns[:-1], "note"], axis=1).assign(note=0), "toy")) == 1


def test_integers_beyond_floats_are_kept_apart():
    made = from_frame(pd.DataFrame({"user": [2**53, 2**53 + 1], "item": 1}), "toy")
    assert made.user_ids.tolist() == [2**53, 2**53 + 1]


def test_filters_that_need_or_leave_nothing():
    frame = pd.DataFrame({"user": [1, 2], "item": [1, 1]})
    with pytest.raises(DataError, match=r"the filters \(min_user=2\) remove all 2 rows; lower them"):
        from_frame(frame, "toy", Filters(min_user=2))
    with pytest.raises(DataError, match=r"user_core=2 item_core=2\) remove all 2 rows"):
        from_frame(frame, "toy", Filters(user_core=2, item_core=2))
    with pytest.raises(DataError, match="no ratings for the filter min_rating; leave min_rating unset"):
        from_frame(frame, "toy", Filters(min_rating=3))
    with pytest.raises(DataError, match="no column 'when'"):
        from_frame(frame, "toy", timestamp="when")
