"""Raw files -> Interactions: one small reader per raw format, found by data set name or by path.

A reader takes one file and returns its rows in file order as a DataFrame with the columns user, item and,
where the file has them, timestamp, rating and split_label; its index `line` holds the 1-based line of each
row. `interactions.from_frame` then validates, filters, de-duplicates and re-indexes.
"""

from __future__ import annotations

import csv
import difflib
import functools
import gzip
import io
import json
import lzma
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from fedjax_rec.data.interactions import (
    TIME_NAMES,
    DataError,
    Filters,
    Interactions,
    canonical,
    from_frame,
    numbers,
    place,
    refuse,
    refuse_unused_times,
    whole_numbers,
)

__all__ = ["DATASETS", "FILMTRUST_TIMES", "Dataset", "from_frame", "load"]

Reader = Callable[[Path], pd.DataFrame]

ALIASES: Mapping[str, tuple[str, ...]] = {
    "user": ("user", "userid", "uid", "reviewerid"),
    "item": ("item", "itemid", "iid", "parentasin", "asin", "movieid", "artistid", "productid"),
    "timestamp": TIME_NAMES,
    "rating": ("rating", "overall"),
    "split_label": ("splitlabel", "xlabel"),
}
"""Accepted column names, compared as `canonical`; of two that are present the first listed is used."""

TEXT_IDS = {"asin", "parentasin", "reviewerid"}
"""Columns that always hold text: an ASIN may be all digits with leading zeros."""

_INTEGER = r"-?(0|[1-9]\d{0,17})"  # as str(int) writes it, within int64

OPENERS = {".gz": gzip.open, ".xz": lzma.open}

FILMTRUST_TIMES = ("item", "position")
"""FilmTrust has no time; see `read_filmtrust`."""

FETCH_AGAIN = "get the file again"
CORRECT = "correct or remove that line"


def _lines(path: Path) -> Iterator[bytes]:
    """Lines of a plain, .gz or .xz file; a damaged archive names the line it breaks off at."""
    number = 0
    try:
        with OPENERS.get(path.suffix, open)(path, "rb") as file:
            for line in file:
                number += 1
                yield line
    except (EOFError, zlib.error, gzip.BadGzipFile, lzma.LZMAError) as error:
        raise DataError(
            f"{path}, line {number + 1}: the archive breaks off or is damaged ({error}), expected a complete "
            f"{path.suffix} file; {FETCH_AGAIN}"
        ) from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check the path and its rights") from None


def _text(path: Path, encoding: str) -> str:
    """The whole file, without line breaks at its end."""
    content = b"".join(_lines(path))
    if re.match(rb"\s*?(\n|\Z)", content):
        raise DataError(f"{path}, line 1: is empty, expected one interaction per line; {CORRECT}, or {FETCH_AGAIN}")
    try:
        return content.decode(encoding).rstrip("\r\n")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path}, line {line}: byte {content[error.start]:#04x} is not {encoding}, expected text; "
            f"save the file as {encoding}"
        ) from None


def _parsed(
    path: Path, text: str, separator: str, names: tuple[str, ...] | None, as_text: tuple[str, ...] = ()
) -> pd.DataFrame:
    """The table in `text`, first line a header unless `names` are given; index: 1-based lines."""
    first_line = 1 if names else 2
    try:
        frame = pd.read_csv(
            io.StringIO(text),
            sep=separator,
            header=None if names else 0,
            names=names,
            dtype=dict.fromkeys(as_text, str),
            # An id may read NA, and a blank line must keep its place in the line count.
            keep_default_na=False,
            na_values=[""],
            skip_blank_lines=False,
            # tab-separated formats have no quoting: an id that begins with a quote would swallow what follows it
            quoting=csv.QUOTE_NONE if separator == "\t" else csv.QUOTE_MINIMAL,
            low_memory=False,
        )
    except pd.errors.ParserError as error:
        raise DataError(
            f"{path}, line {_line_of(error)}: cannot be split into columns ({str(error).strip()}), expected "
            f"{separator!r} between columns; {CORRECT}"
        ) from None
    if not isinstance(frame.index, pd.RangeIndex):  # pandas took surplus columns for an index
        raise DataError(
            f"{path}, line {first_line}: more than {len(frame.columns)} columns, expected "
            f"{len(frame.columns)} separated by {separator!r}; {CORRECT}"
        )
    if frame.empty:
        raise DataError(f"{path}, line {first_line}: no rows follow the header, expected some; {FETCH_AGAIN}")
    frame.index = pd.RangeIndex(first_line, first_line + len(frame), name="line")
    return frame


def _line_of(error: Exception) -> int:
    """The 1-based line that a message of the pandas parser is about: `in line 3`, or `at row 2` from 0."""
    line, row = re.search(r"in line (\d+)", str(error)), re.search(r"at row (\d+)", str(error))
    return int(line[1]) if line else int(row[1]) + 1 if row else 1


def _without_header(path: Path, separator: str, names: tuple[str, ...], encoding: str = "utf-8-sig") -> pd.DataFrame:
    """A table of numbers without a header; ids must be whole numbers and no field may be empty."""
    text = _text(path, encoding)
    if len(separator) > 1:  # pandas is slow at long separators
        text, separator = text.replace(separator, "\t"), "\t"
    return _numeric(_parsed(path, text, separator, names), path)


def _numeric(frame: pd.DataFrame, path: Path) -> pd.DataFrame:
    """Checks that every column is complete and numeric, ids whole."""
    for name in frame:
        if name in ("user", "item"):
            frame[name] = whole_numbers(frame[name], str(path))
        else:
            frame[name] = numbers(frame[name], str(path))
    return frame


def _with_header(path: Path, text: str, separator: str = ",") -> pd.DataFrame:
    """A table with a header, columns as the file names them; ids are text, so that no leading zero is lost."""
    header = text.split("\n", 1)[0].rstrip("\r").split(separator)
    as_text = tuple(name.strip('"') for name in header if canonical(name) in (*ALIASES["user"], *ALIASES["item"]))
    return _parsed(path, text, separator, None, as_text)


def _roles(names: Iterable[str], path: Path) -> dict[str, str]:
    """Column of the file -> its name here, by ALIASES; user and item must be there."""
    names, roles = list(names), {}
    for role, aliases in ALIASES.items():
        matches = [name for alias in aliases for name in names if canonical(name) == alias]
        if matches:
            roles[matches[0]] = role
        elif role in ("user", "item"):
            merged = len(names) == 1 and any(mark in names[0] for mark in ";|\t,")
            remedy = "separate columns by commas (.inter: tabs)" if merged else "add or rename the column"
            raise DataError(
                f"{path}, line 1: no {role} column among {names}, expected a header with one of "
                f"{', '.join(aliases)}; {remedy}"
            )
    return roles


def _feedback(frame: pd.DataFrame, path: Path) -> pd.DataFrame:
    """The columns of ALIASES under their names here; ids whole numbers unless text (see `_number_ids`)."""
    roles = _roles(frame.columns, path)
    frame = frame[list(roles)].copy()
    for name, role in roles.items():
        if role in ("user", "item") and canonical(name) not in TEXT_IDS:
            frame[name] = _number_ids(frame[name], path)
    return frame.rename(columns=roles)


def _number_ids(ids: pd.Series, path: Path) -> pd.Series:
    """Ids as whole numbers if all of them are (12.0 is 12, but 012 is text), else the text that stands there, without
    blanks around it.

    Raises:
        DataError: among whole numbers one is empty, negative, a fraction or nan.
    """
    if pd.api.types.is_numeric_dtype(ids):
        return pd.Series(whole_numbers(ids, str(path)), ids.index)
    row, distinct = pd.factorize(ids)  # far fewer than rows; -1 is empty
    text = pd.Series(distinct, dtype=str).str.strip()
    whole = text.str.fullmatch(rf"{_INTEGER}(\.0*)?").to_numpy(bool)
    broken = text.str.fullmatch(rf"{_INTEGER}\.\d+|[+-]?(nan|inf)", case=False).to_numpy(bool)
    if not (whole | broken).all():
        known = text.where(text != "", np.nan).to_numpy(object)
        return pd.Series(np.append(known, np.nan)[row], ids.index)
    usable = np.append(whole & ~text.str.startswith("-").to_numpy(bool), False)[row]
    if not usable.all():
        refuse(ids, str(path), ~usable, "a whole number >= 0")
    return pd.Series(text.str.replace(r"\.0*$", "", regex=True).to_numpy(np.int64)[row], ids.index)


def read_csv(path: Path) -> pd.DataFrame:
    """A comma-separated table with a header (see ALIASES)."""
    frame = _with_header(path, _text(path, "utf-8-sig"))
    _check_times(frame.columns, path)
    return _feedback(frame, path)


def _check_times(names: Iterable[str], path: Path) -> None:
    """That no time stands under a name that is unknown here; only in formats whose columns are up to the user."""
    roles = _roles(names, path)
    if "timestamp" not in roles.values():
        refuse_unused_times([name for name in names if name not in roles], f"{path}, line 1")


def read_items(path: Path, id_column: str, text_columns: Iterable[str] = ()) -> pd.DataFrame:
    """A comma-separated table of items with a header, one row an item: the side information of a data set.

    Returns:
        The column `item`, int64 or text by the rule of `read_csv`, so that ids join to interactions, and the
        `text_columns` as text, empty where nothing stands.

    Raises:
        DataError: a column is missing, an id is empty or stands twice, or the file is broken.
    """
    columns = [id_column, *text_columns]
    frame = _parsed(path, _text(path, "utf-8-sig"), ",", None, tuple(columns))
    for name in columns:
        if name not in frame:
            raise DataError(
                f"{path}, line 1: no column '{name}' among {list(frame.columns)}; give the name of one that is there"
            )
    items = frame[id_column]
    if items.isna().any():
        refuse(items, str(path), items.isna().to_numpy(), "an item id")
    if canonical(id_column) not in TEXT_IDS:
        items = _number_ids(items, path).rename(id_column)
    if items.duplicated().any():
        refuse(items, str(path), items.duplicated().to_numpy(), "an id that did not stand before")
    return frame[list(text_columns)].fillna("").assign(item=items)


def read_inter(path: Path) -> pd.DataFrame:
    """A RecBole atomic file: tab-separated, header `user_id:token item_id:token rating:float ...`.

    Tokens become whole numbers where all of a column are, so that they match numeric ids of side files.
    """
    header, newline, rows = _text(path, "utf-8-sig").partition("\n")
    kinds = dict(field.partition(":")[::2] for field in header.rstrip("\r").split("\t"))
    tokens = tuple(name for name, kind in kinds.items() if kind == "token")
    frame = _parsed(path, "\t".join(kinds) + newline + rows, "\t", None, tokens)
    _check_times(frame.columns, path)
    roles = _roles(frame.columns, path)
    frame = frame[list(roles)].rename(columns=roles)
    for role in ("user", "item"):
        if frame[role].astype(str).str.fullmatch(_INTEGER).all():
            frame[role] = whole_numbers(frame[role], str(path))
    return frame


def read_ml_100k(path: Path) -> pd.DataFrame:
    """`u.data`: user, item, rating, unix time; tabs, no header."""
    return _without_header(path, "\t", ("user", "item", "rating", "timestamp"))


def read_ml_1m(path: Path) -> pd.DataFrame:
    """`ratings.dat` (UserID::MovieID::Rating::Timestamp), or `interactions.csv.xz`.

    The latter has the columns user_id, movie_id, position, rating, timestamp; `position` is the chronological
    rank and stands for the time. It is -1 where the order is unknown: such rows come first, so that
    leave-one-out puts them into train.
    """
    if path.suffix == ".dat":
        return _without_header(path, "::", ("user", "item", "rating", "timestamp"), "latin-1")
    frame = _parsed(path, _text(path, "utf-8-sig"), ",", None)
    if "position" not in frame:
        raise DataError(
            f"{path}, line 1: no column 'position' among {list(frame.columns)}, expected the chronological "
            f"rank of each row; {FETCH_AGAIN}"
        )
    frame = frame.drop(columns="timestamp", errors="ignore")
    return _feedback(frame.rename(columns={"position": "timestamp"}), path)


def read_filmtrust(path: Path, time: str = "item") -> pd.DataFrame:
    """`ratings.txt`: user::item::rating (as FedRKG ships it) or user item rating (as LibRec does), no header, no time.

    Args:
        path: the file.
        time: `item`: the rank of the item's first appearance in the whole file, as FedRKG has it (a user's
            newest item is then his latest-introduced one); `position`: the row's position inside the user.
    """
    separator = "::" if b"::" in next(_lines(path), b"::") else " "
    frame = _without_header(path, separator, ("user", "item", "rating"))
    if time == "item":
        frame["timestamp"] = pd.factorize(frame["item"])[0]
    else:
        frame["timestamp"] = frame.groupby("user").cumcount()
    return frame


def read_amazon_video(path: Path) -> pd.DataFrame:
    """`ratings.dat`: user, item, rating, unix time; commas, no header."""
    return _without_header(path, ",", ("user", "item", "rating", "timestamp"))


def read_citeulike(path: Path) -> pd.DataFrame:
    """`users.dat`: line u+1 is user u: the count, then as many 0-based item ids. No time: file order."""
    fields = [line.split() for line in _text(path, "utf-8-sig").split("\n")]
    lines = pd.RangeIndex(1, len(fields) + 1, name="line")
    lengths = np.array([len(line) - 1 for line in fields])
    if (lengths < 0).any():
        refuse(pd.Series("", lines, name="count"), str(path), lengths < 0, "a count, then ids")
    counts = pd.Series([line[0] for line in fields], lines, name="count")
    stated = whole_numbers(counts, str(path))
    if (stated != lengths).any():
        row = int(np.argmax(stated != lengths))
        raise DataError(
            f"{path}, {place(lines, row)}: states {stated[row]} items and lists {lengths[row]}, expected the "
            f"count, then as many item ids; {FETCH_AGAIN}"
        )
    items = pd.Series([item for line in fields for item in line[1:]], lines.repeat(lengths), name="item", dtype=object)
    user = np.repeat(np.arange(len(fields)), lengths)
    return pd.DataFrame({"user": user, "item": whole_numbers(items, str(path))}, index=items.index)


def read_lastfm(path: Path) -> pd.DataFrame:
    """`user_artists.dat`: userID, artistID, weight; tabs, header. No time: file order."""
    return _numeric(_feedback(_with_header(path, _text(path, "latin-1"), "\t"), path), path)


def read_lastfm_tags(path: Path) -> pd.DataFrame:
    """`user_taggedartists.dat`: userID, artistID, tagID, day, month, year; tabs, header.

    One row is one tag assignment. The time is the day, as the number yyyymmdd.
    """
    table = _with_header(path, _text(path, "latin-1"), "\t")
    frame, dates = _numeric(_feedback(table, path), path), table.rename(columns=canonical)
    time = np.zeros(len(frame), np.int64)
    for unit, low, high, factor in (("year", 0, 9999, 10_000), ("month", 1, 12, 100), ("day", 1, 31, 1)):
        if unit not in dates:
            raise DataError(
                f"{path}, line 1: no column '{unit}' among {list(dates.columns)}, expected day, month, year; "
                f"{FETCH_AGAIN}"
            )
        values = whole_numbers(dates[unit], str(path))
        outside = (values < low) | (values > high)
        if outside.any():
            refuse(dates[unit], str(path), outside, f"a {unit} from {low} to {high}")
        time += factor * values
    return frame.assign(timestamp=time)


def read_xing(path: Path) -> pd.DataFrame:
    """Comma-separated user and item ids written as floats (12.0), header optional. No time: file order."""
    text = _text(path, "utf-8-sig")
    if re.match(r"[\s\"]*[A-Za-z_]", text):
        return _numeric(_feedback(_with_header(path, text), path)[["user", "item"]], path)
    return _numeric(_parsed(path, text, ",", ("user", "item")), path)


AMAZON_2018_KEYS = {"reviewerID": "user", "asin": "item", "overall": "rating", "unixReviewTime": "timestamp"}


def read_amazon(path: Path) -> pd.DataFrame:
    """Reviews of one category: 2018 JSON lines (`*.json`, `*.json.gz`), or a 2023 csv with a header."""
    return read_amazon_2018(path) if ".json" in path.suffixes else read_csv(path)


def read_amazon_2018(path: Path) -> pd.DataFrame:
    """JSON lines with reviewerID, asin, overall and unixReviewTime (seconds); other keys are skipped."""
    reviews = [(number, *_review(path, number, line)) for number, line in enumerate(_lines(path), 1) if line.strip()]
    if not reviews:
        raise DataError(f"{path}, line 1: is empty, expected one review per line; {FETCH_AGAIN}")
    return pd.DataFrame(reviews, columns=["line", *AMAZON_2018_KEYS.values()]).set_index("line")


def _review(path: Path, number: int, line: bytes) -> tuple:
    """The values of AMAZON_2018_KEYS in one line."""
    try:
        review = json.loads(line)
    except ValueError as error:
        raise DataError(
            f"{path}, line {number}: is no JSON ({error}), expected one review per line; {FETCH_AGAIN}"
        ) from None
    missing = [key for key in AMAZON_2018_KEYS if not isinstance(review, dict) or key not in review]
    if missing:
        raise DataError(
            f"{path}, line {number}: has no '{missing[0]}', expected a review with "
            f"{', '.join(AMAZON_2018_KEYS)}; {CORRECT}"
        )
    return tuple(review[key] for key in AMAZON_2018_KEYS)


class Dataset(NamedTuple):
    """How a named data set is read.

    Attributes:
        reader: reads one of its files.
        filters: applied unless the caller gives others.
        note: what it is and where it comes from, one line.
        files: patterns looked for in the folder; the first with a match is read.
        several: whether all files that match the pattern are read, by name, one after the other.
    """

    reader: Reader
    filters: Filters
    note: str
    files: tuple[str, ...]
    several: bool = False


DATASETS: Mapping[str, Dataset] = {
    "ku": Dataset(read_csv, Filters(), "KuaiShou videos of NineRec, as the FedVLR release ships them", ("inter.csv",)),
    "filmtrust": Dataset(
        read_filmtrust,
        Filters(min_user=10),
        "FilmTrust ratings, as the FedRKG release and recommender libraries ship them",
        ("ratings.txt",),
    ),
    "amazon-video": Dataset(
        read_amazon_video,
        Filters(),
        "Amazon Instant Video, users with 10 ratings, as the FedRKG release ships it",
        ("ratings.dat",),
    ),
    "ml-100k": Dataset(read_ml_100k, Filters(), "MovieLens 100K, from the GroupLens site", ("u.data",)),
    "ml-1m": Dataset(
        read_ml_1m,
        Filters(),
        "MovieLens 1M, from the GroupLens site",
        ("ratings.dat", "interactions.csv.xz"),
    ),
    "ml-latest-small": Dataset(
        read_csv,
        Filters(min_item=5),
        "MovieLens latest small, from the GroupLens site",
        ("ratings.csv",),
    ),
    "citeulike-a": Dataset(
        read_citeulike, Filters(), "CiteULike libraries, from the citeulike-a repository", ("users.dat",)
    ),
    "citeulike-t": Dataset(
        read_citeulike, Filters(), "CiteULike libraries, from the citeulike-t repository", ("users.dat",)
    ),
    "amazon-beauty": Dataset(
        read_amazon,
        Filters(),
        "Amazon reviews of All_Beauty, from the Amazon review data site",
        ("All_Beauty*.csv.gz", "All_Beauty*.csv", "All_Beauty*.json.gz"),
    ),
    "lastfm-2k": Dataset(read_lastfm, Filters(), "HetRec 2011 Last.FM, from the GroupLens site", ("user_artists.dat",)),
    "lastfm-2k-tags": Dataset(
        read_lastfm_tags,
        Filters(min_user=10),
        "HetRec 2011 Last.FM tag assignments, from the GroupLens site",
        ("user_taggedartists.dat",),
    ),
    "xing": Dataset(
        read_xing,
        Filters(),
        "RecSys Challenge 2017 (XING), as the DropoutNet and Heater releases ship it",
        ("interactions.csv", "*.csv"),
        several=True,
    ),
    "amazon-giftcards": Dataset(
        read_amazon,
        Filters(),
        "Amazon reviews of Gift_Cards, from the Amazon review data site",
        ("Gift_Cards*.json.gz", "Gift_Cards*.csv.gz", "Gift_Cards*.csv"),
    ),
}

PATH_READERS: Mapping[str, Reader] = {
    ".csv": read_csv,
    ".csv.gz": read_csv,
    ".csv.xz": read_csv,
    ".inter": read_inter,
    ".json": read_amazon_2018,
    ".json.gz": read_amazon_2018,
}


def is_path(dataset: str) -> bool:
    """Whether a data set is given by its place, not its name."""
    return dataset != "synthetic" and dataset not in DATASETS


def load(
    name_or_path: str | os.PathLike,
    data_dir: str | os.PathLike | None = None,
    *,
    filters: Filters | None = None,
    filmtrust_time: str = "item",
) -> Interactions:
    """Reads a data set by name, or a file or folder by path.

    Args:
        name_or_path: a key of DATASETS, read from the folder of that name in `data_dir`; `synthetic`, which
            needs no files; or a path: a `.csv` or `.inter` file, an Amazon 2018 `.json.gz`, or a folder
            that holds one.
        data_dir: the folder of the data folders.
        filters: which rows to keep; None: the default of the named data set, for a path none.
        filmtrust_time: `item` or `position`, see `read_filmtrust`.

    Returns:
        Validated interactions.

    Raises:
        DataError: an unknown name, a missing file, or broken input.
    """
    name = os.fspath(name_or_path)
    if name == "synthetic":
        return _synthetic(filters)
    if name in DATASETS:
        return _load_named(name, data_dir, filters, filmtrust_time)
    path = Path(name)
    if path.is_dir():
        return _load_folder(path, filters)
    reader = PATH_READERS.get(_suffix(path))
    if reader is None:
        raise DataError(_unknown(name, path))
    if not path.is_file():
        raise DataError(f"{path}: there is no such file, expected a data file; check the path given as --dataset")
    return from_frame(reader(path), path.name.removesuffix(_suffix(path)), filters, source=str(path))


def _suffix(path: Path) -> str:
    """The ending that tells the format, with the compression: `.csv`, `.json.gz`."""
    endings = path.suffixes[-2:] if path.suffix in (".gz", ".xz") else path.suffixes[-1:]
    return "".join(endings)


def _unknown(name: str, path: Path) -> str:
    known = ["synthetic", *DATASETS]
    if path.exists() or path.suffix or len(path.parts) > 1:
        return (
            f"{path}: neither a data set name nor a readable file, expected a file ending in "
            f"{', '.join(PATH_READERS)} or a folder with an Amazon *.json.gz; check --dataset"
        )
    near = difflib.get_close_matches(name.lower().replace("_", "-"), known, n=1, cutoff=0.0)[0]
    return f"unknown data set '{name}', did you mean '{near}'? Known: {', '.join(known)}, or a path"


def _load_named(
    name: str, data_dir: str | os.PathLike | None, filters: Filters | None, filmtrust_time: str
) -> Interactions:
    dataset = DATASETS[name]
    paths = _files(name, data_dir)
    reader = dataset.reader
    if name == "filmtrust":
        if filmtrust_time not in FILMTRUST_TIMES:
            raise DataError(f"filmtrust_time is '{filmtrust_time}', expected {' or '.join(FILMTRUST_TIMES)}")
        reader = functools.partial(read_filmtrust, time=filmtrust_time)
    filters = dataset.filters if filters is None else filters
    if len(paths) == 1:
        return from_frame(reader(paths[0]), name, filters, source=str(paths[0]))
    frame = pd.concat([reader(path) for path in paths], ignore_index=True)
    return from_frame(frame, name, filters, source=str(paths[0].parent))


def _files(name: str, data_dir: str | os.PathLike | None) -> list[Path]:
    """The files of a named data set that are there; names the one looked for where none is."""
    dataset = DATASETS[name]
    remedy = f"set --data_dir to the folder that holds '{name}/' ({dataset.note})"
    if data_dir is None:
        raise DataError(f"data set '{name}' is read from '{name}/{dataset.files[0]}'; {remedy}")
    folder = Path(data_dir) / name
    for pattern in dataset.files:
        found = sorted(path for path in folder.glob(pattern) if not path.name.startswith("meta_"))
        if len(found) > 1 and not dataset.several:
            names = ", ".join(path.name for path in found)
            raise DataError(f"{folder}: holds {names}, expected one of them; move the others away")
        if found:
            return found
    others = f" (or {', '.join(dataset.files[1:])})" if dataset.files[1:] else ""
    raise DataError(f"{folder / dataset.files[0]}: there is no such file{others}; {remedy}")


def _load_folder(folder: Path, filters: Filters | None) -> Interactions:
    """A folder with one Amazon 2018 review file."""
    found = sorted(path for path in folder.glob("*.json.gz") if not path.name.startswith("meta_"))
    if len(found) == 1:
        return from_frame(read_amazon_2018(found[0]), folder.resolve().name, filters, source=str(found[0]))
    remedy = "give the path of one file"
    if folder.name in DATASETS:
        remedy = f"give --dataset={folder.name} --data_dir={folder.parent}"
    raise DataError(f"{folder}: holds {len(found)} review files *.json.gz, expected one; {remedy}")


def _synthetic(filters: Filters | None) -> Interactions:
    if filters not in (None, Filters()):
        raise DataError(f"data set 'synthetic' takes no filters, found {filters}; leave them unset")
    from fedjax_rec.data import synthetic

    return synthetic.make().interactions
