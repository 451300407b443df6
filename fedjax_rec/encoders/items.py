"""The items to encode: a csv of raw ids with titles, or with one image file each."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd

from fedjax_rec.data.interactions import DataError
from fedjax_rec.data.readers import read_items

MISSING_TITLE = "The title is missing."
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


@dataclasses.dataclass(frozen=True, eq=False)
class Items:
    """Items of a file, in its order.

    Attributes:
        source: the file.
        raw_ids: int64 or text [items], distinct.
        inputs: a text or an image file per item; None where nothing can be encoded.
        problems: row -> why the item's own title or image is missing, e.g. `no title`.
        fingerprint: SHA-256 of ids and texts, or of ids, names and sizes of the image files.
    """

    source: str
    raw_ids: np.ndarray
    inputs: list[str] | list[Path | None]
    problems: dict[int, str]
    fingerprint: str


def text_items(path: str | Path, id_column: str, text_column: str) -> Items:
    """Titles of a csv; an empty one is replaced by MISSING_TITLE, as FedVLR does.

    Raises:
        DataError: a broken file or column, or no title at all.
    """
    frame = read_items(Path(path), id_column, [text_column])
    titles = frame[text_column].str.strip().tolist()
    problems = {row: "no title" for row, title in enumerate(titles) if not title}
    if len(problems) == len(titles):
        raise DataError(f"{path}: column '{text_column}' is empty in all {len(titles)} rows; give --text_column")
    inputs = [title or MISSING_TITLE for title in titles]
    raw_ids = _id_array(frame["item"])
    return Items(str(path), raw_ids, inputs, problems, _fingerprint(zip(raw_ids.tolist(), inputs, strict=True)))


def image_items(path: str | Path, id_column: str, folder: str | Path, image_column: str | None = None) -> Items:
    """Image files of a csv's items: `folder/<raw id>.jpg` (or IMAGE_SUFFIXES, in that order), or by a column.

    Args:
        path: the csv.
        id_column: its column of raw ids.
        folder: where the images lie.
        image_column: column with the image's path, relative to `folder` or absolute, for files not named by id.

    Raises:
        DataError: a broken file or column, no such folder, or no image for any item.
    """
    folder = Path(folder)
    frame = read_items(Path(path), id_column, [image_column] if image_column else [])
    if not folder.is_dir():
        raise DataError(f"{folder}: there is no such folder, expected the items' images in it; give --images")
    raw_ids = _id_array(frame["item"])
    if image_column:
        names = frame[image_column].str.strip().tolist()
        # os.path: Path.is_file raises on names that no file system takes
        inputs = [folder / name if name and os.path.isfile(folder / name) else None for name in names]
        expected = [f"no file {name}" if name else f"no path in column '{image_column}'" for name in names]
    else:
        # Listed once, the preferred suffix last: a look-up per id and suffix is slow on network disks.
        files = [file for file in folder.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES]
        files.sort(key=lambda file: (-IMAGE_SUFFIXES.index(file.suffix.lower()), file.name))
        named = {file.stem: file for file in files}
        found = [named.get(str(raw_id)) for raw_id in raw_ids.tolist()]
        inputs = [file if file and os.path.isfile(file) else None for file in found]  # links may lead nowhere
        expected = [f"no file {raw_id}{IMAGE_SUFFIXES[0]}" for raw_id in raw_ids.tolist()]
    if not any(inputs):
        raise DataError(
            f"{folder}: holds no image of any of the {len(raw_ids)} items of {path} ({expected[0]}), expected files "
            f"named by raw id with {', '.join(IMAGE_SUFFIXES)}; give --images, or --image_column for other names"
        )
    problems = {row: expected[row] for row, file in enumerate(inputs) if file is None}
    sizes = [[os.path.relpath(file, folder), os.path.getsize(file)] if file else None for file in inputs]
    return Items(str(path), raw_ids, inputs, problems, _fingerprint(zip(raw_ids.tolist(), sizes, strict=True)))


def _id_array(ids: pd.Series) -> np.ndarray:
    """Raw ids as int64 or fixed-width text, which NumPy saves without objects."""
    values = ids.to_numpy()
    return values if values.dtype.kind == "i" else values.astype(str)


def _fingerprint(rows: Iterable[tuple]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row).encode() + b"\n")
    return digest.hexdigest()
