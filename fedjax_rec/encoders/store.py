"""What an extraction keeps on disk: whose it is, its finished batches, and files written all or nothing."""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fedjax_rec.data.interactions import DataError

DAMAGED = (OSError, ValueError, EOFError, KeyError, AttributeError, TypeError, zipfile.BadZipFile)
"""What reading a file raises that is absent, cut off, or something else."""
BATCHES = "[0-9]*.npz"


def weights_hash(state: Mapping[str, Any]) -> str:
    """SHA-256 of a state dict, whatever file it came from.

    Over the keys in sorted order: `key dtype shape`, a line break, then the tensor's bytes (little endian, C order).

    Args:
        state: name -> torch tensor, in a dtype that NumPy has.
    """
    digest = hashlib.sha256()
    for key in sorted(state):
        values = state[key].detach().cpu().numpy()
        digest.update(f"{key} {values.dtype} {list(values.shape)}\n".encode())
        digest.update(values.tobytes())
    return digest.hexdigest()


def begin(folder: Path, settings: Mapping[str, Any]) -> None:
    """Makes the partial folder; one that holds batches must have been begun with the same settings."""
    note = folder / "settings.npz"
    if any(folder.glob(BATCHES)):
        check_same(folder, settings_of(note), settings)
        return
    folder.mkdir(parents=True, exist_ok=True)
    write_npz(note, {"settings": np.array(json.dumps(settings))})


def check_same(path: Path, found: Mapping[str, Any] | None, wanted: Mapping[str, Any]) -> None:
    """Raises the DataError that names the first setting in which what lies at `path` differs."""
    wanted = json.loads(json.dumps(wanted))
    if found is None:
        raise DataError(f"{path}: exists and was not written by an encoder; expected a new file; give another --out")
    for key in sorted({*found, *wanted}):
        if found.get(key) != wanted.get(key):
            raise DataError(
                f"{path}: was made with {key} {found.get(key)}, and this run has {wanted.get(key)}; expected the same "
                "run; give another --out, or remove it"
            )


def settings_of(out: Path) -> dict[str, Any] | None:
    """The settings in an .npz of this package, or None."""
    try:
        with open(out, "rb") as handle, np.load(handle, allow_pickle=False) as file:
            return json.loads(str(file["settings"]))
    except DAMAGED:
        return None


def write_npz(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes all or nothing: a reader never sees half a file, not even after a power cut."""
    unfinished = path.with_name(path.name + ".tmp")
    with open(unfinished, "wb") as file:
        np.savez(file, **arrays)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)


def batch_file(folder: Path, number: int) -> Path:
    """Where batch `number` is kept."""
    return folder / f"{number:07d}.npz"


def read_batch(shard: Path) -> tuple[np.ndarray, dict[int, str]] | None:
    """Features [readable, feat] and row -> why it is not readable; None where the batch is not finished."""
    try:
        with open(shard, "rb") as handle, np.load(handle, allow_pickle=False) as file:
            return file["values"], {int(row): why for row, why in json.loads(str(file["unreadable"])).items()}
    except DAMAGED:
        return None
