"""The files of a run: config.json, metrics.jsonl, summary.json, per_client.npz. All writes survive a kill."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fedjax_rec.data import readers
from fedjax_rec.methods import METHODS, make_config

IMMATERIAL = frozenset({"data_dir", "features", "checkpoint_every"})
"""Settings that may change between two starts of a run: no result depends on them (on where features lie; what is in
them is `features_hash`)."""


class UsageError(ValueError):
    """Bad usage: one line that says what was given, what was expected, what to do."""


def strict(value: Any) -> Any:
    """The value with every number that JSON cannot hold (no targets, no mean) as null."""
    if isinstance(value, Mapping):
        return {key: strict(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [strict(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: Path, value: Any) -> None:
    """Writes JSON under its name only when complete."""
    write_text(path, json.dumps(strict(value), indent=1, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes text under its name only when complete."""
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(text)
    os.replace(temporary, path)


def write_npz(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    temporary = path.with_name(path.name + ".part")
    with temporary.open("wb") as file:
        np.savez_compressed(file, **arrays)
    os.replace(temporary, path)


def claim(folder: Path, config: Mapping[str, Any]) -> None:
    """Makes the folder this run's, or checks that it already is.

    Raises:
        UsageError: if the folder belongs to a run with another configuration (names every difference), or cannot
            be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{folder}: cannot be a workdir ({error.strerror}); use another --workdir") from None
    path = folder / "config.json"
    if not path.exists():
        if any(folder.glob("seed_*/config.json")):
            raise UsageError(
                f"{folder} holds runs of several seeds: use another --workdir, or --seeds=n to go on with it"
            )
        write_json(path, config)
        return
    differing = differences(read_config(folder), config, "there", "given")
    if differing:
        raise UsageError(
            f"{folder} holds a run with another configuration ({'; '.join(differing)}): "
            "use another --workdir, or the settings that are there"
        )


def differences(
    a: Mapping[str, Any], b: Mapping[str, Any], of_a: str, of_b: str, immaterial: frozenset[str] = IMMATERIAL
) -> list[str]:
    """In what two configurations differ, beside what is immaterial."""
    for name in ("data_hash", "content_hash"):  # where one is missing, an earlier version told nothing of its data
        if name not in a or name not in b:
            immaterial = immaterial | {name}
    same_data = "data_hash" in a and a["data_hash"] == b.get("data_hash")
    if same_data and all(readers.is_path(config["dataset"]) for config in (a, b)):  # a file that has moved
        immaterial = immaterial | {"dataset"}
    a, b = (flat(json.loads(json.dumps(with_defaults(config)))) for config in (a, b))  # with lists for tuples
    return [
        f"{name}: {a.get(name)!r} {of_a}, {b.get(name)!r} {of_b}"
        for name in sorted(a.keys() | b.keys())
        if a.get(name) != b.get(name) and name.split(".")[0] not in immaterial
    ]


def with_defaults(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The configuration with the settings that its method has got since it was recorded, at their defaults."""
    name, settings = config.get("method"), config.get("settings", {})
    if name not in METHODS:
        return config
    known = {field.name for field in dataclasses.fields(METHODS[name].config)}
    try:
        made = make_config(name, {k: v for k, v in settings.items() if k in known})
    except ValueError:  # no longer possible: only what is recorded can be compared
        return config
    return {**config, "settings": {**dataclasses.asdict(made), **settings}}


def flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration with nested settings as `settings.name`."""
    flat = {}
    for name, value in config.items():
        flat |= {f"{name}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {name: value}
    return flat


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a run.

    Raises:
        UsageError: if there is none, or it cannot be read.
    """
    path = folder / "config.json"
    try:
        return read_json(path)
    except (FileNotFoundError, NotADirectoryError):
        raise UsageError(f"{path} does not exist: expected the workdir of a run; train one first") from None


def read_json(path: Path) -> dict[str, Any]:
    """What write_json wrote.

    Raises:
        UsageError: if it is damaged.
    """
    try:
        held = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise UsageError(f"{path} line {error.lineno}: not JSON ({error.msg}); restore or remove it") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not UTF-8 text (byte {error.start}); restore or remove it") from None
    if not isinstance(held, dict):
        raise UsageError(f"{path}: holds no JSON object, expected one like {{...}}; restore or remove it")
    return held


class MetricsLog:
    """metrics.jsonl: one line a round, in order. What timing a round had stands under its key `seconds`."""

    def __init__(self, folder: Path, rounds_done: int):
        """Keeps the lines of the first `rounds_done` rounds and drops what a killed run wrote beyond them.

        Raises:
            UsageError: if these lines are not there; the file stays as it is.
        """
        self.path = folder / "metrics.jsonl"
        self.lines = read_lines(self.path)[:rounds_done]
        for round_ in range(1, rounds_done + 1):
            found = self.lines[round_ - 1].get("round") if round_ <= len(self.lines) else "the end"
            if found != round_:
                raise UsageError(
                    f"{self.path} line {round_}: expected round {round_} of the {rounds_done} that the checkpoint has, "
                    f"found {found!r}; restore the file, or use another --workdir"
                )
        write_lines(self.path, self.lines)
        self._file = self.path.open("a")

    def append(self, line: dict[str, Any]) -> None:
        self.lines.append(line)
        self._file.write(json.dumps(strict(line), allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    """Writes one JSON line per entry, under its name only when complete."""
    write_text(path, "".join(json.dumps(line) + "\n" for line in lines))


def read_lines(path: Path) -> list[dict[str, Any]]:
    """JSON lines, without a last one that a kill left incomplete; none where there is no file.

    Raises:
        UsageError: if any other line is damaged.
    """
    lines: list[dict[str, Any]] = []
    texts = path.read_bytes().splitlines() if path.exists() else []
    for number, text in enumerate(texts, start=1):
        try:
            line = json.loads(text.decode())
        except ValueError:  # no JSON, or no UTF-8
            if number == len(texts):
                break
            line = None
        if not isinstance(line, dict):
            raise UsageError(f"{path} line {number}: not a JSON object; restore or remove it")
        lines.append(line)
    return lines
