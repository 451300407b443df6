"""Item features: one matrix per modality, aligned to the item index by raw item id."""

from __future__ import annotations

import dataclasses
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from fedjax_rec.data.interactions import DataError, Interactions


@dataclasses.dataclass(frozen=True, eq=False)
class Features:
    """One modality's item features.

    Attributes:
        values: float32 [items, feat], row i belongs to ``Interactions.item_ids[i]``.
        present: bool [items]; where it is False the row is the mean of the present rows (FedVLR's rule).
        source: the file and how it was aligned, one line.
    """

    values: np.ndarray
    present: np.ndarray
    source: str

    @property
    def num_missing(self) -> int:
        """How many items had no features and got the mean."""
        return int((~self.present).sum())


@dataclasses.dataclass(frozen=True)
class FeatureFile:
    """Where one modality lies, relative to the data directory, and the raw item id of each of its rows.

    Attributes:
        values: ``.npy`` file, [rows, feat].
        ids: file that names the rows.
        read_ids: reads ``ids`` into raw item ids, [rows].
        present: ``.npy`` file of bool [rows], or None where every row is present.
    """

    values: str
    ids: str
    read_ids: Callable[[Path], np.ndarray]
    present: str | None = None


def _keys(ids: Sequence | np.ndarray) -> np.ndarray:
    """Raw ids as strings, so that 7, 7.0 and "7" are the same item: files differ in how they type an id."""
    ids = np.asarray(ids)
    if ids.dtype.kind == "f" and np.isfinite(ids).all() and (ids == np.floor(ids)).all():
        ids = ids.astype(np.int64)
    return ids.astype(str)


def align(
    values: np.ndarray,
    raw_ids: Sequence | np.ndarray,
    item_ids: Sequence | np.ndarray,
    *,
    source: str,
    present: np.ndarray | None = None,
) -> Features:
    """Joins feature rows to the items by raw id and fills missing rows with the mean of the present ones.

    The mean is taken over the items of the data set, not over rows of the file that no item uses.

    Args:
        values: [rows, feat], any float type; rows that are not present may hold anything.
        raw_ids: [rows] raw item ids, ints or strings, distinct.
        item_ids: [items] raw item ids in index order, i.e. ``Interactions.item_ids``.
        source: the file, for messages and for ``Features.source``.
        present: bool [rows], or None if every row is present.

    Raises:
        DataError: wrong shapes, duplicate ids, non-finite present rows, or no item with a feature row.
    """
    values, keys, items = np.asarray(values), _keys(raw_ids), _keys(item_ids)
    present = np.ones(len(keys), bool) if present is None else np.asarray(present).astype(bool)
    _check(values, keys, present, source)

    row_of = {key: row for row, key in enumerate(keys.tolist())}
    rows = np.array([row_of.get(key, -1) for key in items.tolist()], dtype=np.int64)
    found = rows >= 0
    found[found] = present[rows[found]]
    if not found.any():
        raise DataError(
            f"{source}: none of the {len(items)} items has a feature row; expected raw item ids like "
            f"{items[:1].tolist()}, the file has {keys[:1].tolist()}; use the features of this data set"
        )
    aligned = np.empty((len(items), values.shape[1]), np.float32)
    aligned[found] = values[rows[found]]
    aligned[~found] = aligned[found].mean(axis=0)
    counted = f"{found.sum()} of {len(items)} items, {(~found).sum()} filled with the mean"
    return Features(values=aligned, present=found, source=f"{source}: by raw item id, {counted}")


def _check(values: np.ndarray, keys: np.ndarray, present: np.ndarray, source: str) -> None:
    """Raises the DataError of `align` for rows that cannot be joined."""
    if values.ndim != 2 or values.dtype.kind not in "fiu":
        raise DataError(
            f"{source}: features are {values.dtype} {list(values.shape)}; expected numbers [rows, feat]; "
            "write one row per item"
        )
    for what, rows in {"raw item ids": keys, "presence flags": present}.items():
        if rows.shape != values.shape[:1]:
            raise DataError(
                f"{source}: {len(values)} feature rows but {what} of shape {list(rows.shape)}; expected one "
                "per row; extract the features again from the same item file"
            )
    unique, counts = np.unique(keys, return_counts=True)
    if len(unique) < len(keys):
        raise DataError(
            f"{source}: raw item id {str(unique[counts.argmax()])!r} stands {counts.max()} times; expected "
            "distinct ids; keep one row per item"
        )
    bad = present & ~np.isfinite(values).all(axis=1)
    if bad.any():
        raise DataError(
            f"{source}: {bad.sum()} rows are not finite, the first is row {bad.argmax()} (raw item id "
            f"{str(keys[bad.argmax()])!r}); expected finite numbers; mark such rows as not present"
        )


def _column(name: str) -> Callable[[Path], np.ndarray]:
    """Reads one column of a comma-separated file with a header."""
    return lambda path: pd.read_csv(path, usecols=[name])[name].to_numpy()


def _first_field(separator: str) -> Callable[[Path], np.ndarray]:
    """Reads the leading integer of each line of a latin-1 file."""

    def read(path: Path) -> np.ndarray:
        with open(path, encoding="latin-1", newline="\n") as lines:
            return np.array([int(line.split(separator, 1)[0]) for line in lines if line.strip()])

    return read


def _line_number(path: Path) -> np.ndarray:
    """The 0-based number of each line; bytes, because some titles hold other line-breaking characters."""
    with open(path, "rb") as lines:
        return np.arange(sum(1 for _ in lines))


def _ku_ids(path: Path) -> np.ndarray:
    """KU's features are indexed by itemID itself, whatever the order of the mapping file."""
    return np.sort(_column("itemID")(path))


_ML_1M_POSTER = FeatureFile(
    "ml-1m/poster_features.npy", "ml-1m/movies.dat", _first_field("::"), present="ml-1m/poster_present.npy"
)

FEATURES: dict[str, dict[str, FeatureFile]] = {
    "ku": {
        "image": FeatureFile("ku/image_features.npy", "ku/i_id_mapping.csv", _ku_ids),
        "text": FeatureFile("ku/text_features.npy", "ku/i_id_mapping.csv", _ku_ids),
    },
    "ml-100k": {
        "text": FeatureFile("ml-100k/text_features_minilm.npy", "ml-100k/u.item", _first_field("|")),
    },
    "ml-latest-small": {
        # MovieLens ids are shared between releases, so the posters of ml-1m serve here too.
        "image": _ML_1M_POSTER,
        "text": FeatureFile(
            "ml-latest-small/text_features_minilm.npy", "ml-latest-small/movies.csv", _column("movieId")
        ),
    },
    "ml-1m": {
        "image": _ML_1M_POSTER,
        "text": FeatureFile("ml-1m/text_features_minilm.npy", "ml-1m/movies.dat", _first_field("::")),
    },
    "citeulike-a": {
        "text": FeatureFile("citeulike-a/text_features_minilm.npy", "citeulike-a/titles.txt", _line_number),
    },
    "amazon-beauty": {
        "text": FeatureFile(
            "amazon-beauty/text_features_minilm.npy", "amazon-beauty/item_meta.csv", _column("parent_asin")
        ),
    },
}
"""What each data set folder offers: data set -> modality -> file."""


def load_features(dataset_name: str, data_dir: str | Path, interactions: Interactions) -> dict[str, Features]:
    """Loads every modality of FEATURES[dataset_name] whose feature file is there.

    Features are optional for most methods, so a data set without any gives an empty dict; a method that
    needs a modality names the file in FEATURES.

    Args:
        dataset_name: a key of FEATURES; any other name has no features here (those of the synthetic data set
            are in `Synthetic.features`).
        data_dir: the folder that holds the data set folders.
        interactions: gives the items and their order.

    Raises:
        DataError: a feature file without its id or presence file, an unreadable file, or as in `align`.
    """
    root = Path(data_dir)
    files = FEATURES.get(dataset_name, {})
    return {
        modality: _load(root, file, interactions.item_ids)
        for modality, file in files.items()
        if (root / file.values).is_file()
    }


def _load(root: Path, file: FeatureFile, item_ids: np.ndarray) -> Features:
    for needed in filter(None, (file.ids, file.present)):
        if not (root / needed).is_file():
            raise DataError(
                f"{root / file.values}: {needed} is missing; expected it to name the feature rows; put it "
                "back or move the features away"
            )
    values = _read_npy(root / file.values)
    present = _read_npy(root / file.present) if file.present else None
    try:
        raw_ids = file.read_ids(root / file.ids)
    except ValueError as error:
        raise DataError(
            f"{root / file.ids}: item ids cannot be read ({_one_line(error)}); expected the file as "
            "published; fetch it again"
        ) from error
    return align(values, raw_ids, item_ids, source=str(root / file.values), present=present)


def _read_npy(path: Path) -> np.ndarray:
    try:
        return np.load(path, allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise DataError(
            f"{path}: not a readable array ({_one_line(error)}); expected a .npy file of numbers; fetch it again"
        ) from error


def load_npz(path: str | Path, item_ids: Sequence | np.ndarray) -> Features:
    """Loads the ``.npz`` that the encoders write.

    Keys: ``values`` [rows, feat], ``raw_ids`` [rows] and, optional, ``present`` bool [rows], ``model`` and
    ``weights_hash`` (strings; they go into ``Features.source``).

    Raises:
        DataError: an unreadable file, a missing key, or as in `align`.
    """
    path = Path(path)
    try:
        # Opened here: np.load leaves the file open where it is no complete zip archive.
        with open(path, "rb") as handle, np.load(handle, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
    except (ValueError, EOFError, OSError, AttributeError, TypeError, zipfile.BadZipFile) as error:
        raise DataError(
            f"{path}: not a readable feature file ({_one_line(error)}); expected an .npz without pickled "
            "objects; run the encoder again"
        ) from error
    missing = [key for key in ("values", "raw_ids") if key not in arrays]
    if missing:
        raise DataError(
            f"{path}: no key {missing[0]!r} among {sorted(arrays)}; expected values and raw_ids; run the encoder again"
        )
    origin = " ".join(str(arrays[key]) for key in ("model", "weights_hash") if key in arrays)
    source = f"{path} ({origin})" if origin else str(path)
    return align(arrays["values"], arrays["raw_ids"], item_ids, source=source, present=arrays.get("present"))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
