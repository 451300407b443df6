"""From items to an .npz: batches, resume, imputation. Knows no model and imports no torch."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from fedjax_rec.data.interactions import DataError
from fedjax_rec.encoders.items import Items
from fedjax_rec.encoders.store import batch_file, begin, check_same, read_batch, settings_of, write_npz


class Unreadable(Exception):
    """One input that cannot be read; the item is reported and imputed."""


class Encoder(NamedTuple):
    """A loaded model.

    Attributes:
        settings: all that decides the features, as JSON values; at least `model` and `weights_hash`.
        read: prepares one input, on several threads; raises Unreadable.
        encode: prepared inputs -> float32 [batch, feat].
    """

    settings: Mapping[str, Any]
    read: Callable[[Any], Any]
    encode: Callable[[list], np.ndarray]


def extract(
    encoder: Encoder,
    items: Items,
    out: str | Path,
    *,
    batch_size: int = 64,
    normalise: bool = True,
    progress: bool = True,
) -> None:
    """Encodes the items into `out`, which `fedjax_rec.data.features.load_npz` reads.

    Each batch is kept in the folder `<out>.partial` as soon as it is computed. The same call goes on after the last
    one and gives the same file as an uninterrupted run (on the same kind of device); a finished file is left as it is.

    Keys of the file: `values` float32 [items, feat], `raw_ids` [items] in the order of the items' file, `present` bool
    [items] (False: no readable image, the row is the mean of the others), `missing` bool [items] (the item's own
    image or title is missing), `model`, `weights_hash`, and as JSON `settings` and `problems` (raw id -> reason).

    Args:
        encoder: the model.
        items: what to encode.
        out: the .npz to write.
        batch_size: inputs a batch. It orders floating-point sums, hence is part of the run's identity.
        normalise: scale rows to length 1 before means are taken.
        progress: show a progress bar.

    Raises:
        DataError: `out` or its partial folder belongs to another run, no input is readable, or the model gives
            numbers that are not finite.
    """
    out = Path(out)
    folder = out.with_name(out.name + ".partial")
    settings = {**encoder.settings, "inputs_hash": items.fingerprint, "batch_size": batch_size, "normalise": normalise}
    if out.exists():
        check_same(out, settings_of(out), settings)
        return
    begin(folder, settings)

    # Longest texts first: batches need little padding, and one that exceeds the memory does so at once.
    order = [row for row, value in enumerate(items.inputs) if value is not None]
    order.sort(key=lambda row: -len(items.inputs[row]) if isinstance(items.inputs[row], str) else 0)
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    problems, rows, values = dict(items.problems), [], []
    with (
        ThreadPoolExecutor(max_workers=os.cpu_count()) as pool,
        tqdm(total=len(order), unit="item", disable=not progress, dynamic_ncols=True) as bar,
    ):
        for number, batch in enumerate(batches):
            shard = batch_file(folder, number)
            encoded, unreadable = read_batch(shard) or _encode(shard, encoder, items, batch, normalise, pool)
            problems |= unreadable
            rows += [row for row in batch if row not in unreadable]
            values += [encoded] if len(encoded) else []
            bar.update(len(batch))
    if not rows:
        first = min(problems)
        raise DataError(
            f"{items.source}: none of the {len(items.raw_ids)} items can be encoded, the first ({items.raw_ids[first]})"
            f" because of: {problems[first]}; expected images that Pillow can read"
        )
    write_npz(out, _arrays(items, rows, np.concatenate(values), problems, settings))
    shutil.rmtree(folder)


def problems_of(out: str | Path) -> dict[str, str]:
    """Raw id -> why its image or title is missing, from a finished file."""
    with np.load(out, allow_pickle=False) as file:
        return json.loads(str(file["problems"]))


def _arrays(items: Items, rows: list[int], encoded: np.ndarray, problems: dict[int, str], settings: Mapping) -> dict:
    """The arrays of the file; `encoded` [rows, feat] belongs to the items `rows`."""
    present, missing = np.zeros((2, len(items.raw_ids)), bool)
    present[rows], missing[list(problems)] = True, True
    values = np.empty((len(present), encoded.shape[1]), np.float32)
    values[rows] = encoded
    values[~present] = encoded.mean(axis=0, dtype=np.float64)
    return {
        "values": values,
        "raw_ids": items.raw_ids,
        "present": present,
        "missing": missing,
        "model": np.array(settings["model"]),
        "weights_hash": np.array(settings["weights_hash"]),
        "settings": np.array(json.dumps(settings)),
        "problems": np.array(json.dumps({str(items.raw_ids[row]): problems[row] for row in sorted(problems)})),
    }


def _encode(
    shard: Path, encoder: Encoder, items: Items, batch: list[int], normalise: bool, pool: ThreadPoolExecutor
) -> tuple[np.ndarray, dict[int, str]]:
    """Encodes the items `batch` and writes the shard: features of the readable ones, and why others are not."""

    def attempt(row: int) -> tuple[Any, str | None]:
        try:
            return encoder.read(items.inputs[row]), None
        except Unreadable as error:
            return None, str(error)

    tried = list(pool.map(attempt, batch))
    unreadable = {row: why for row, (_, why) in zip(batch, tried, strict=True) if why is not None}
    readable = [prepared for prepared, why in tried if why is None]
    values = encoder.encode(readable) if readable else np.empty((0, 0), np.float32)
    finite = np.isfinite(values).all(axis=1)
    if not finite.all():
        row = [row for row in batch if row not in unreadable][int(finite.argmin())]
        raise DataError(
            f"{encoder.settings['model']}: features of item {items.raw_ids[row]} are not finite; expected weights that "
            "fit the model; check --weights"
        )
    if normalise:
        values = values / np.maximum(np.linalg.norm(values, axis=1, keepdims=True), np.finfo(np.float32).tiny)
    write_npz(shard, {"values": values, "unreadable": np.array(json.dumps(unreadable))})
    return values, unreadable
