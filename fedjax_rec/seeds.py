"""One configuration over several seeds: workdir/seed_<n>, and mean and spread in workdir/seeds.json."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np

from fedjax_rec import run
from fedjax_rec.compare import MAY_DIFFER, SEED_FOLDER, Runs, aligned, read_runs, seed_folders, spread
from fedjax_rec.experiment import Experiment, RunConfig, check_memory, identity
from fedjax_rec.privacy import accounting
from fedjax_rec.validate import positive
from fedjax_rec.workdir import UsageError, claim, differences, read_config, write_json

PARTS = ("valid", "test", "test_seen", "test_unseen")


def train_seeds(
    config: RunConfig,
    workdir: str | os.PathLike,
    count: int,
    *,
    data: tuple | None = None,
    progress: bool = False,
    each: Callable[[dict[str, Any], Path], None] | None = None,
) -> dict[str, Any]:
    """Runs seeds config.seed .. config.seed + count - 1; finished ones are not run again, a stopped one goes on.

    Args:
        config, data, progress: see run.train. More rounds than there lengthen all seeds.
        workdir: seed n goes to workdir/seed_<n>.
        each: called with the summary and the folder of every seed that this call has finished.

    Returns:
        what seeds.json holds: `status` (as of run.train), `seeds` (finished), `failed` {seed: why} (loss or scores
        that stopped being finite), and for each of PARTS every metric's mean, std (over seeds, n - 1) and values.

    Raises:
        UsageError: the folder is that of a single run, or one in it belongs to a run with another configuration.
    """
    positive("seeds", count)
    folder = Path(workdir)
    wanted = {SEED_FOLDER.format(seed): seed for seed in range(config.seed, config.seed + count)}
    _check_no_run(folder)
    ready = run.prepare(config, data)
    given = _check_beside(ready, folder, wanted)
    # all, so that none is averaged as it was, and none where one is refused
    for change in (run.lengthened, run.lengthen) if given else ():
        for name, seed in wanted.items():
            change(folder / name, {**given, "seed": seed})
    failed: dict[str, str] = {}
    status = "done"
    for name, seed in wanted.items():
        chosen, home = ready.with_seed(seed), folder / name
        if (home / "summary.json").exists():
            claim(home, {**given, "seed": seed})  # or it is another run's
            continue
        try:
            summary = run.train(chosen.config, home, ready=chosen, progress=progress)
        except FloatingPointError as error:
            failed[str(seed)] = str(error)
            continue
        if summary["status"] == run.STOPPED:
            status = run.STOPPED
            break
        if each:
            each(summary, home)
    finished = [home for home in seed_folders(folder) if (home / "summary.json").exists()]
    said = {"status": status, "failed": failed, "seeds": []}
    if any(home.name in wanted for home in finished):
        said |= summarise(read_runs(folder), set(wanted))
    write_json(folder / "seeds.json", said)
    return said


def _check_no_run(folder: Path) -> None:
    if (folder / "config.json").exists():
        raise UsageError(
            f"{folder} holds a single run or a search (config.json); expected a folder of seeds: use another --workdir"
        )


def _check_beside(ready: Experiment, folder: Path, wanted: Collection[str]) -> dict[str, Any]:
    """That nothing is in the folder which would be averaged with these seeds; the identity of the runs if any is.
    Wanted ones may have fewer rounds."""
    held = [home for home in seed_folders(folder) if (home / "config.json").exists()]
    if not held:
        return {}
    check_memory(ready.engine)
    accounting.check(ready)
    given = identity(ready)
    for home in held:
        there = read_config(home)
        grown = {"rounds"} if home.name in wanted and there.get("rounds", 0) < given["rounds"] else set()
        differing = differences(there, given, "there", "given", MAY_DIFFER | grown)
        if differing:
            raise UsageError(
                f"{home} holds a run with another configuration ({'; '.join(differing)}): use another --workdir, or "
                "the settings that are there"
            )
    return given


def summarise(runs: Runs, wanted: set[str]) -> dict[str, Any]:
    """Mean and spread over the runs whose folders are wanted."""
    chosen = [said for home, said in zip(runs.folders, runs.summaries, strict=True) if home.name in wanted]
    first = chosen[0]
    keys = ("method", "backbone", "dataset", "protocol", "split", "ranking", "settings", "select_metric")
    named = {key: first[key] for key in keys}
    rounds = [said["best_round"] for said in chosen]
    return {**named, "seeds": [said["seed"] for said in chosen], "best_round": rounds} | {
        part: {name: _over_seeds([said[part][name] for said in chosen]) for name in first[part]} for part in PARTS
    }


def _over_seeds(values: list[float | int | None]) -> dict[str, Any]:
    known = np.array([value for value in values if value is not None], float)
    if not len(known):
        return {"mean": None, "std": None, "values": values}
    std = float(known.std(ddof=1)) if len(known) > 1 else None
    return {"mean": float(known.mean()), "std": std, "values": values}


def table(said: dict[str, Any]) -> str:
    """Mean ± standard deviation of the test metrics, with the training-free parts of the summaries left out."""
    selected_by = said.get("select_metric", "").split("+")
    names = [name for name in said["test"] if name.startswith(("HR@", "NDCG@", "MRR")) or name in selected_by]
    rows = [[part, *(spread(said[part].get(name, {}).get("values", [])) for name in names)] for part in PARTS]
    title = (
        f"{said['method']} on {said['dataset']}, protocol {said['protocol']}: mean ± standard deviation over "
        f"{len(said['seeds'])} seeds ({', '.join(map(str, said['seeds']))})"
    )
    return "\n".join(["", title, *aligned([["", *names], *rows])])
