"""The one form in which feedback enters the simulator: distinct (user, item) pairs, validated once."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from numbers import Real
from typing import NoReturn

import numpy as np
import pandas as pd

from fedjax_rec.validate import nearest

ITEM_SHUFFLE_SEED = 20240229
"""Item ids are shuffled by this fixed seed: in several public files a low id means a popular item, so that
ties broken by index would leak popularity."""

SPLIT_PARTS = ("train", "valid", "test")
"""What the split labels 0, 1 and 2 of a file mean."""

TIME_NAMES = ("timestamp", "time", "unixreviewtime")
"""Names of the time column, compared as `canonical`; of two that are present the first listed is used."""

_LIKE_A_TIME = re.compile(r"(?:.*_)?(?:ts|dt|epoch|(?!candidate|update)[a-z0-9]*(?:date|time|timestamp))(?:_.*)?|.+_at")
_TIME = "a time as a number, or as ISO text like 2020-03-01T10:00:00"


class DataError(ValueError):
    """Bad input data: one line that names the file, the line where there is one, and the remedy."""


@dataclasses.dataclass(frozen=True)
class Filters:
    """Which raw rows are kept. Filters but `min_pairs` count raw rows, before duplicates are removed.

    The order is: ratings, then one pass of minimum counts, then the iterated core, then distinct items per user.

    Attributes:
        min_user: keep users with at least this many rows. Single pass: `min_user` and `min_item` count the
            same rows, and neither count is repeated after the other has removed some.
        min_item: keep items with at least this many rows, in the same single pass.
        user_core: with `item_core`, users and items below their count are removed until none is left.
        item_core: see `user_core`.
        min_rating: rows with a smaller rating are no feedback; None: every row is a positive.
        min_pairs: keep users with at least this many distinct items, counted as if duplicates had been removed.
    """

    min_user: int = 0
    min_item: int = 0
    user_core: int = 0
    item_core: int = 0
    min_rating: float | int | None = None
    min_pairs: int = 0

    def __new__(cls, *values: object, **settings: object) -> Filters:
        known = [field.name for field in dataclasses.fields(cls)]
        for name, value in {**dict(zip(known, values, strict=False)), **settings}.items():
            if name not in known:
                raise DataError(f"unknown filter {name!r}: expected one of {', '.join(known)}{nearest(name, known)}")
            if name == "min_rating":
                if value is not None and not _is_number(value):
                    raise DataError(f"filter min_rating is {value!r}, expected a number; give one, or leave it unset")
            elif not _is_number(value) or value < 0 or value % 1:
                raise DataError(f"filter {name} is {value!r}, expected a whole number >= 0; give one")
        return super().__new__(cls)

    def __str__(self) -> str:
        """The filters that are set, e.g. `min_user=10`, or `none`."""
        settings = ((field, getattr(self, field.name)) for field in dataclasses.fields(self))
        return " ".join(f"{field.name}={value}" for field, value in settings if value != field.default) or "none"


def _is_number(value: object) -> bool:
    """A finite one: True is none, nor is "5"."""
    return isinstance(value, Real) and not isinstance(value, bool) and bool(np.isfinite(value))


@dataclasses.dataclass(frozen=True, eq=False)
class Interactions:
    """Positive feedback of all users, one row per distinct (user, item) pair.

    Attributes:
        name: data set name, as printed in results.
        user: int32 [rows], in 0..num_users-1, in order of first appearance of the raw id.
        item: int32 [rows], in 0..num_items-1, shuffled once by ITEM_SHUFFLE_SEED.
        time: int64 [rows]; larger is later. Rows stand in file order, which breaks ties.
        split_label: int8 [rows] (0 train, 1 valid, 2 test) where the file brings a split, else None.
        user_ids: raw user id of each index, [num_users].
        item_ids: raw item id of each index, [num_items].
        counts: what reading and filtering did: rows_read, rows_filtered (removed by the filters), rows (left
            by them), duplicates (removed after that), pairs, users, items.
        filters: the filters that were applied.
        timed: whether the file has a time; where it has none, `time` numbers its rows.
    """

    name: str
    user: np.ndarray
    item: np.ndarray
    time: np.ndarray
    split_label: np.ndarray | None
    user_ids: np.ndarray
    item_ids: np.ndarray
    counts: Mapping[str, int]
    filters: Filters = Filters()
    timed: bool = True

    def __repr__(self) -> str:
        return (
            f"Interactions({self.name}, {self.num_users:,} users, {self.num_items:,} items, {len(self.user):,} pairs)"
        )

    @property
    def num_users(self) -> int:
        return len(self.user_ids)

    @property
    def num_items(self) -> int:
        return len(self.item_ids)

    def __len__(self) -> int:
        return len(self.user)


def from_frame(
    frame: pd.DataFrame,
    name: str,
    filters: Filters | None = None,
    *,
    source: str = "DataFrame",
    user: str = "user",
    item: str = "item",
    timestamp: str = "timestamp",
    rating: str = "rating",
    split_label: str = "split_label",
) -> Interactions:
    """Validates, filters, de-duplicates and re-indexes a table of raw feedback.

    The steps run in this order. Filters act on raw rows. Of rows with the same user and item the first by
    time is kept, the first in the file where times are equal. Users are numbered in order of first appearance
    and items by a fixed shuffle of the sorted raw ids, so that an item's index depends on the set of raw ids
    only, not on the order of rows.

    Args:
        frame: one row per event, in file order. Ids are whole numbers >= 0 or text. An index named `line`
            holds the lines of the file, for error messages; otherwise they count rows from 1.
        name: data set name.
        filters: which rows to keep; None keeps all.
        source: file name (or other origin) that error messages start with.
        user, item: names of the id columns.
        timestamp: name of the time column (by default any of TIME_NAMES): numbers in any unit, of which fractional
            ones are replaced by their rank, dates, or ISO text. A frame without it is in file order: row r has
            time r.
        rating: name of the rating column; needed only by `Filters.min_rating`.
        split_label: name of a column with 0 train, 1 valid, 2 test; may be absent.

    Returns:
        Validated interactions, rows in file order.

    Raises:
        DataError: a column or value is missing or unfit, there is no time column but one that looks like it, one
            pair carries two split labels, or nothing is left after the filters.
    """
    filters = filters or Filters()
    if timestamp == "timestamp" and timestamp not in frame:
        names = {canonical(str(name)): name for name in reversed(frame.columns)}
        timestamp = next((names[name] for name in TIME_NAMES if name in names), timestamp)
    columns = {
        "user": user,
        "item": item,
        "timestamp": timestamp,
        "rating": rating,
        "split_label": split_label,
    }
    raw = _validated(frame, columns, filters, source)
    kept = raw[_passing(raw, filters)]
    if kept.empty:
        raise DataError(f"{source}: the filters ({filters}) remove all {len(raw)} rows; lower them")
    pairs = _deduplicated(kept, source)

    user_index, user_ids = pd.factorize(pairs["user"])
    item_index, item_ids = _shuffled(pairs["item"])
    return Interactions(
        name=name,
        user=user_index.astype(np.int32),
        item=item_index.astype(np.int32),
        time=pairs["timestamp"].to_numpy(),
        split_label=pairs["split_label"].to_numpy() if "split_label" in pairs else None,
        user_ids=_id_array(user_ids),
        item_ids=item_ids,
        timed=timestamp in frame,
        counts={
            "rows_read": len(raw),
            "rows_filtered": len(raw) - len(kept),
            "rows": len(kept),
            "duplicates": len(kept) - len(pairs),
            "pairs": len(pairs),
            "users": len(user_ids),
            "items": len(item_ids),
        },
        filters=filters,
    )


def canonical(name: str) -> str:
    """A column name as aliases are compared: lower case, without `_`."""
    return name.strip().strip('"').lower().replace("_", "")


def refuse_unused_times(names: Iterable[object], source: str) -> None:
    """Raises a DataError about the first unused column that looks like a time, where no column was taken for it."""
    for name in names:
        words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|[\W_]+", "_", str(name)).strip("_").lower()
        if _LIKE_A_TIME.fullmatch(words):
            raise DataError(
                f"{source}: column '{name}' looks like a time, expected times in a column 'timestamp'; rename it to "
                "timestamp, or drop it (the order of rows is then the order in time)"
            )


def whole_numbers(column: pd.Series, source: str) -> np.ndarray:
    """Reads a column of ids, numbers or text, as int64 [rows]; 12.0 counts as 12.

    Raises:
        DataError: a value is missing, not a number, fractional, negative or beyond int64, or a float so large that
            it stands for several whole numbers.
    """
    values = numbers(column, source, expected="a whole number >= 0")
    whole = (values >= 0) & (values < 2**63)
    if values.dtype.kind == "f":
        whole &= values == np.floor(values)
    if not whole.all():
        refuse(column, source, ~whole, "a whole number >= 0")
    if values.dtype.kind == "f":
        held = getattr(column.dtype, "numpy_dtype", column.dtype)
        bits = np.finfo(held if held in (np.float16, np.float32) else np.float64).nmant + 1
        if (values >= 2**bits).any():
            expected = f"a float below 2**{bits}, beyond which two ids may be one float"
            refuse(column, source, values >= 2**bits, expected, "read the ids as int64 or as text")
    return values.astype(np.int64)


def numbers(column: pd.Series, source: str, expected: str = "a number", optional: bool = False) -> np.ndarray:
    """Reads a column, numbers or text, as an int or float array [rows].

    Args:
        column: values as read from the file; its name and index serve the error message.
        source: file name for the error message.
        expected: what the error message says should stand there.
        optional: whether values may be missing (NaN in the result).

    Raises:
        DataError: a value is not a finite number.
    """
    if pd.api.types.is_bool_dtype(column):
        refuse(column, source, np.ones(len(column), bool), expected)
    values = pd.to_numeric(column, errors="coerce").to_numpy()
    if values.dtype.kind not in "iu":
        values = values.astype(np.float64)
        bad = ~np.isfinite(values) if not optional else ~np.isfinite(values) & column.notna().to_numpy()
        if bad.any():
            refuse(column, source, bad, expected)
    return values


def refuse(
    column: pd.Series,
    source: str,
    bad: np.ndarray,
    expected: str,
    remedy: str = "correct or remove that line",
) -> NoReturn:
    """Raises the DataError about the first value of `column` that is marked in `bad`, bool [rows]."""
    row = int(np.argmax(bad))
    value = column.iloc[row]
    found = "is empty" if pd.isna(value) or value == "" else f"holds {_shortened(value)}"
    raise DataError(
        f"{source}, {place(column.index, row)}: column '{column.name}' {found}, expected {expected}; {remedy}"
    )


def place(index: pd.Index, row: int) -> str:
    """Where a row stands: its line where the index holds lines of a file, else its number from 1."""
    return f"line {index[row]}" if index.name == "line" else f"row {row + 1}"


def _shortened(value: object) -> str:
    text = repr(value.item() if isinstance(value, np.generic) else value)
    return text if len(text) <= 40 else text[:37] + "..."


def _validated(frame: pd.DataFrame, columns: Mapping[str, str], filters: Filters, source: str) -> pd.DataFrame:
    """The columns of `frame` under their own names, checked; ids int64 or text, timestamp int64."""
    optional = {"timestamp", "rating", "split_label"}
    missing = [name for role, name in columns.items() if name not in frame and (role not in optional or name != role)]
    if missing:
        raise DataError(
            f"{source}: no column '{missing[0]}' among {[str(name) for name in frame.columns]}; "
            "rename the column, or pass its name"
        )
    repeated = [name for name in columns.values() if (frame.columns == name).sum() > 1]
    if repeated:
        raise DataError(
            f"{source}: {(frame.columns == repeated[0]).sum()} columns are named '{repeated[0]}', expected one; "
            "rename or drop the others"
        )
    if frame.empty:
        raise DataError(f"{source}: holds no rows, expected one per interaction; get the file again")
    present = {role: frame[name] for role, name in columns.items() if name in frame}
    if "timestamp" not in present:
        refuse_unused_times([name for name in frame if name not in columns.values()], source)

    table = pd.DataFrame(index=frame.index)
    table["user"] = _ids(present["user"], source)
    table["item"] = _ids(present["item"], source)
    table["timestamp"] = _times(present["timestamp"], source) if "timestamp" in present else np.arange(len(frame))
    if "rating" in present:
        table["rating"] = numbers(present["rating"], source, optional=filters.min_rating is None)
    elif filters.min_rating is not None:
        raise DataError(f"{source}: no ratings for the filter min_rating; leave min_rating unset")
    if "split_label" in present:
        table["split_label"] = _split_labels(present["split_label"], source)
    return table


def _ids(column: pd.Series, source: str) -> np.ndarray:
    """Raw ids as int64 [rows], or as text (object [rows]) where the column is text."""
    if isinstance(column.dtype, pd.CategoricalDtype):
        if column.isna().any():
            refuse(column, source, column.isna().to_numpy(), "an id")
        column = column.astype(column.cat.categories.dtype)
    if pd.api.types.is_numeric_dtype(column):
        return whole_numbers(column, source)
    expected = "an id (all text or all whole numbers)"
    absent = (column.isna() | (column == "")).to_numpy()
    if absent.any():
        refuse(column, source, absent, expected)
    kind = pd.api.types.infer_dtype(column)
    if kind == "integer":
        return whole_numbers(column, source)
    if kind != "string":
        text = column.map(lambda value: isinstance(value, str)).to_numpy()
        refuse(column, source, ~text, expected)
    return column.to_numpy(dtype=object)


def _times(column: pd.Series, source: str) -> np.ndarray:
    """Times as int64 [rows]; fractional ones as their rank, which keeps order and ties."""
    if column.isna().any():
        refuse(column, source, column.isna().to_numpy(), _TIME)
    if pd.api.types.is_datetime64_any_dtype(column):
        return pd.DatetimeIndex(column).asi8
    if not pd.api.types.is_numeric_dtype(column) and pd.isna(pd.to_numeric(column.iloc[:1], errors="coerce")).all():
        dates = pd.to_datetime(column.astype(str), format="ISO8601", utc=True, errors="coerce")
        if dates.isna().any():
            refuse(column, source, dates.isna().to_numpy(), _TIME)
        return pd.DatetimeIndex(dates).asi8
    values = numbers(column, source, _TIME)
    if values.dtype.kind == "f" and ((values != np.floor(values)) | (np.abs(values) >= 2**63)).any():
        return np.unique(values, return_inverse=True)[1].astype(np.int64)
    return values.astype(np.int64)


def _split_labels(column: pd.Series, source: str) -> np.ndarray:
    labels = whole_numbers(column, source)
    if (labels > 2).any():
        refuse(column, source, labels > 2, "0 (train), 1 (valid) or 2 (test)")
    return labels.astype(np.int8)


def _passing(table: pd.DataFrame, filters: Filters) -> np.ndarray:
    """Which rows the filters keep, bool [rows]."""
    alive = np.ones(len(table), bool)
    if filters.min_rating is not None:
        alive &= (table["rating"] >= filters.min_rating).to_numpy()
    users, items = pd.factorize(table["user"])[0], pd.factorize(table["item"])[0]

    def frequent(alive: np.ndarray, at_least_user: int, at_least_item: int) -> np.ndarray:
        per_user, per_item = np.bincount(users[alive]), np.bincount(items[alive])
        kept = alive.copy()
        kept[alive] = (per_user[users[alive]] >= at_least_user) & (per_item[items[alive]] >= at_least_item)
        return kept

    alive = frequent(alive, filters.min_user, filters.min_item)
    while filters.user_core or filters.item_core:
        core = frequent(alive, filters.user_core, filters.item_core)
        if core.sum() == alive.sum():
            break
        alive = core
    if filters.min_pairs:
        distinct = alive.copy()
        distinct[alive] = ~table.loc[alive, ["user", "item"]].duplicated().to_numpy()
        alive &= np.bincount(users[distinct], minlength=len(table))[users] >= filters.min_pairs
    return alive


def _deduplicated(table: pd.DataFrame, source: str) -> pd.DataFrame:
    """One row per pair: the first by time, then by file order; rows stay in file order."""
    _check_one_label_per_pair(table, source)
    by_time = np.argsort(table["timestamp"].to_numpy(), kind="stable")
    repeated = np.empty(len(table), bool)
    repeated[by_time] = table[["user", "item"]].iloc[by_time].duplicated().to_numpy()
    return table[~repeated]


def _check_one_label_per_pair(table: pd.DataFrame, source: str) -> None:
    if "split_label" not in table:
        return
    conflict = table.duplicated(["user", "item"]) & ~table.duplicated(["user", "item", "split_label"])
    if not conflict.any():
        return
    row = int(np.argmax(conflict.to_numpy()))
    event = table.iloc[row]
    first = int(np.argmax(((table["user"] == event["user"]) & (table["item"] == event["item"])).to_numpy()))
    parts = [SPLIT_PARTS[int(table["split_label"].iloc[at])] for at in (first, row)]
    raise DataError(
        f"{source}, {place(table.index, row)}: user {event['user']} and item {event['item']} are in the "
        f"{parts[1]} part, expected {parts[0]} as in {place(table.index, first)}; "
        "remove one of the two lines, or drop the split_label column"
    )


def _shuffled(raw_items: pd.Series) -> tuple[np.ndarray, np.ndarray]:
    """Item indices [rows] and the raw id of each index [items], a function of the set of raw ids."""
    first_seen, uniques = pd.factorize(raw_items)
    unique_ids = _id_array(uniques)
    order = np.argsort(unique_ids, kind="stable")
    order = order[np.random.default_rng(ITEM_SHUFFLE_SEED).permutation(len(order))]
    index_of = np.empty_like(order)
    index_of[order] = np.arange(len(order))
    return index_of[first_seen], unique_ids[order]


def _id_array(uniques: pd.Index | np.ndarray) -> np.ndarray:
    """Raw ids as int64 or fixed-width text, which NumPy saves and sorts without objects."""
    values = np.asarray(uniques)
    return values if values.dtype.kind == "i" else values.astype(str)
