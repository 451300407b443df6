"""A search over settings: points of a grid, judged on validation alone.

`launch.py --mode=search --grid lr=0.5,1,2 --grid dim=16,32 --trials=4 --workdir=runs/search` plus the flags of any run.
Every trial is one run at the configuration's seed and one line of workdir/trials.jsonl, so an interrupted search goes
on where it was; workdir/best.flags is the best so far as a flagfile. Test metrics are neither shown nor recorded: run
the flagfile once to see them.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from fedjax_rec import metrics, run
from fedjax_rec.experiment import RunConfig, content_hash, data_hash
from fedjax_rec.methods import make_config
from fedjax_rec.workdir import UsageError, claim, read_lines, write_lines, write_text

FAILED = 0.0
"""Score of a trial that diverged, does not fit in memory, or has settings that the data refuse."""


def judge(config: RunConfig, data: tuple) -> dict[str, Any]:
    """What a search may know of one run: `score` (the selection metric on validation at the selected round),
    `best_round`, `seconds`, and `error` for a run that failed. `status` is that of run.train."""
    began = time.perf_counter()
    try:
        summary = run.train(config, data=data, references=False)
        said = {"status": summary["status"]}
        if summary["best_round"] is not None:
            said |= {"score": metrics.read(summary["valid"], config.select_metric), "best_round": summary["best_round"]}
    except (FloatingPointError, ValueError, MemoryError, jax.errors.JaxRuntimeError) as error:
        said = {"status": "done", "score": FAILED, "error": str(error).split("\n")[0] or type(error).__name__}
    return {**said, "seconds": time.perf_counter() - began}


def grid_points(method: str, grid: Mapping[str, str], base: Mapping[str, Any] | None = None) -> list[dict[str, Any]]:
    """All combinations of the grid's values, as settings of the method.

    Args:
        method: a name in METHODS.
        grid: setting -> values between commas; values that hold commas themselves are put between semicolons.
        base: settings that every point starts from.

    Raises:
        ValueError: an empty grid, a setting the method does not have, or a value it cannot take beside the base.
    """
    if not grid:
        raise ValueError("--grid: expected at least one setting with its values, like --grid lr=0.5,1,2")
    values = {name: [v for v in text.split(";" if ";" in text else ",") if v] for name, text in grid.items()}
    for name, given in values.items():
        if not given:
            raise ValueError(f"--grid {name}={grid[name]}: expected values, like {name}=v1,v2")
    points = []
    for combination in itertools.product(*values.values()):
        text = dict(zip(values, combination, strict=True))
        config = make_config(method, {**(base or {}), **text})
        points.append({name: getattr(config, name) for name in text})
    return points


def search(
    config: RunConfig,
    grid: Mapping[str, str],
    workdir: str | os.PathLike,
    *,
    trials: int = 0,
    data: tuple | None = None,
) -> tuple[list[dict[str, Any]], str]:
    """Runs trials that are not in the workdir yet.

    Args:
        config: what every trial starts from; its seed also orders the grid.
        grid: see grid_points; its settings replace those of `config`.
        trials: points at most, 0 for all. The order is a permutation of the grid, so that a larger budget goes on from
            a smaller one.
        data: see run.prepare.

    Returns:
        the lines of trials.jsonl, and run.STOPPED or "done".

    Raises:
        UsageError: the workdir is another search's.
        ValueError: see grid_points; a negative budget.
    """
    if trials < 0:
        raise ValueError(f"--trials={trials}: expected a number of trials, or 0 for the whole grid")
    points = grid_points(config.method, grid, config.settings)
    order = np.random.default_rng(config.seed).permutation(len(points))[: trials or None]
    folder = Path(workdir)
    devices = config.devices or len(jax.devices())
    data = data or run.load_data(config)
    hashes = {"data_hash": data_hash(*data[:2]), **content_hash(config, data[2])}
    claim(folder, {**config.recorded(), **hashes, "devices": devices, "grid": dict(grid)})
    path = folder / "trials.jsonl"
    lines = read_lines(path)
    write_lines(path, lines)  # without what a kill left of a line
    done = {line["trial"] for line in lines}
    for trial in map(int, order):
        if trial in done:
            continue
        settings = {**config.settings, **points[trial]}
        said = judge(dataclasses.replace(config, settings=settings), data)
        if said.pop("status") == run.STOPPED:
            return lines, run.STOPPED
        line = json.loads(json.dumps({"trial": trial, "settings": points[trial], **said}))
        lines.append(line)
        with path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(f"{len(lines)}/{len(order)} {_text(line['settings'])}: {_score(line)}", flush=True)
        best = best_of(lines)
        if "error" not in best:
            write_text(folder / "best.flags", flagfile(config, best, config.select_metric, len(lines)))
    if all("error" in line for line in lines):
        raise UsageError(f"{folder}: every trial failed, the last with: {lines[-1]['error']}")
    return lines, "done"


def best_of(lines: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The trial with the highest score, the earlier of equal ones; one that failed where all did."""
    return max(lines, key=_merit)


def flagfile(config: RunConfig, best: Mapping[str, Any], metric: str, trials: int) -> str:
    """The text of a flagfile that runs the best trial. `data_dir` is left out: it is a place, not a setting."""
    default = RunConfig(split=config.split)
    lines = [
        f"# The best on validation of {trials} trials: {metric} {best['score']:.4f} at round {best['best_round']}.",
        f"--method={config.method}",
    ]
    for field in dataclasses.fields(RunConfig):
        value = getattr(config, field.name)
        apart = field.name in ("method", "settings", "filters", "features", "data_dir")
        usual = RunConfig.split if field.name == "split" else getattr(default, field.name)
        if apart or value == usual:
            continue
        if field.name == "ks":
            lines.append(f"--k={','.join(map(str, value))}")
        else:
            lines.append(f"--{field.name}={value}")
    lines += [f"--filter={name}={value}" for name, value in config.filters.items()]
    lines += [f"--features={name}={path}" for name, path in config.features.items()]
    lines += [f"--set={pair}" for pair in _pairs({**config.settings, **best["settings"]})]
    return "\n".join(lines) + "\n"


def table(config: RunConfig, lines: Sequence[Mapping[str, Any]], most: int = 10) -> str:
    """The best trials, best first, and those that failed."""
    failed = [line for line in lines if "error" in line]
    ranked = sorted((line for line in lines if "error" not in line), key=_merit, reverse=True)
    rows = [f"{_score(line)}  {_text(line['settings'])}" for line in ranked[:most]]
    rows += [f"failed  {_text(line['settings'])}: {line['error']}" for line in failed[:most]]
    rows += [f"{len(failed) - most} more failed"] if len(failed) > most else []
    return "\n".join(["", f"validation {config.select_metric}, best of {len(lines)} trials first", *rows])


def _merit(line: Mapping[str, Any]) -> tuple[bool, float]:
    return "error" not in line, line["score"]


def _pairs(settings: Mapping[str, Any]) -> list[str]:
    text = lambda value: ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return [f"{name}={text(value)}" for name, value in settings.items()]


def _text(settings: Mapping[str, Any]) -> str:
    return " ".join(_pairs(settings))


def _score(line: Mapping[str, Any]) -> str:
    return f"failed ({line['error']})" if "error" in line else f"{line['score']:.4f} (round {line['best_round']})"
