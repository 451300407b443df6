"""Runs beside each other: mean and spread over seeds, and paired differences client by client.

    python -m fedjax_rec.compare runs/pfedrec runs/fedmf [--metrics=NDCG@10,HR@10]

A workdir is that of one run, a folder of seeds (`launch.py --seeds`), or a file of kept results
(`experiments/tables.py --keep`). Differences are taken to the first workdir, client by client, and their mean is shown
with its 95 % interval for other clients and other seeds (`metrics.paired_difference`).
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import hashlib
import json
import os
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedjax_rec import metrics
from fedjax_rec.data import readers
from fedjax_rec.validate import in_one_line, one_of
from fedjax_rec.workdir import IMMATERIAL, UsageError, differences, read_config, read_json, strict, write_npz

SEED_FOLDER = "seed_{}"
LAYOUT = frozenset({"devices", "block_size", "block_sizes", "max_buckets"})
"""Settings that only order a run's sums."""
MAY_DIFFER = IMMATERIAL | LAYOUT | {"seed"}
"""What seeds of one configuration may differ in."""


@dataclasses.dataclass(frozen=True)
class Runs:
    """The finished runs of one workdir: their folders, configurations and summaries, by seed."""

    name: str
    folders: list[Path]
    configs: list[dict[str, Any]]
    summaries: list[dict[str, Any]]

    def by_client(self, metric: str) -> np.ndarray:
        """One test metric by run and client, [seeds, users]; NaN for clients that were not evaluated."""
        return np.stack([read_per_client(folder, metric)[metric] for folder in self.folders])

    @functools.cached_property
    def metrics(self) -> list[str]:
        """The names that `by_client` takes."""
        return [name for name in read_per_client(self.folders[0]) if name == "MRR" or "@" in name]

    @functools.cached_property
    def tasks(self) -> list[str]:
        """What each run ranked, as a hash of its users and their test items."""
        held = [read_per_client(folder, "user_id", "test_item") for folder in self.folders]
        return [
            hashlib.sha256("\n".join([*one["user_id"], *one["test_item"].ravel()]).encode()).hexdigest() for one in held
        ]


@dataclasses.dataclass(frozen=True)
class Kept(Runs):
    """What `keep` has written of a folder of seeds: each client's metrics, without ids."""

    held: dict[str, np.ndarray]

    def by_client(self, metric: str) -> np.ndarray:
        """As of Runs."""
        return self.held[metric].astype(np.float64)

    @functools.cached_property
    def metrics(self) -> list[str]:
        """Those that a table shows."""
        return list(self.held)

    @functools.cached_property
    def tasks(self) -> list[str]:
        """As of Runs."""
        return [said["task"] for said in self.summaries]


KEPT_OF_A_SUMMARY = (
    "method", "backbone", "rounds", "best_round", "test", "test_seen", "test_unseen", "valid", "reference_rankers",
    "versions",
)  # fmt: skip
AGAIN = "remove it, and run them again with --keep"


def shown(split: str, ks: Sequence[int]) -> list[str]:
    """The metrics that a table has. Users of cold items have several targets, others mostly one."""
    return [f"{name}@{k}" for k in ks for name in ("Recall" if split == "cold_items" else "HR", "NDCG")]


def keep(runs: Runs, path: Path, asked: Sequence[str]) -> None:
    """Writes a small file that holds what tables and claims need of finished runs.

    Each client's metrics by seed, in the data set's order of users, without ids: of these and of test items there is a
    hash. Seeds that are there and not among the runs stay.

    Args:
        asked: the flags that made the runs.

    Raises:
        UsageError: the data set is a path, or what is there is of other flags, another configuration or other items.
    """
    configs = [{k: v for k, v in config.items() if k not in IMMATERIAL} for config in runs.configs]
    if readers.is_path(configs[0]["dataset"]):
        raise UsageError(
            f"{runs.name}: its data set is a file; expected one that has a name, for others to compare with"
        )
    summaries = [
        {"task": task, **{part: said[part] for part in KEPT_OF_A_SUMMARY}}
        for task, said in zip(runs.tasks, runs.summaries, strict=True)
    ]
    ks = cut_offs([runs])
    held = {name: runs.by_client(name) for name in shown(configs[0]["split"], ks)}
    there, others = _stays(runs, path, asked) if path.exists() else (None, [])
    if others:
        ks = [k for k in ks if k in cut_offs([there])]
        if not ks:
            raise UsageError(f"{path}: has the cut-offs {cut_offs([there])}, none of which these runs have; {AGAIN}")
        configs = [there.configs[i] for i in others] + configs
        summaries = [there.summaries[i] for i in others] + summaries
        held = {
            name: np.concatenate([there.by_client(name)[others], held[name]]) for name in there.metrics if name in held
        }
    order = np.argsort([config["seed"] for config in configs])
    said = {
        "asked": list(asked),
        "configs": [{**configs[i], "ks": ks} for i in order],
        "summaries": [summaries[i] for i in order],
    }
    for later in said["summaries"][1:]:  # of the rankers those of the first seed stand in a table
        later.pop("reference_rankers", None)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = np.frombuffer(json.dumps(strict(said)).encode(), np.uint8)
    values = {name: held[name][order].astype(np.float32) for name in shown(configs[0]["split"], ks)}
    write_npz(path, {"said": text, **values})


def _stays(runs: Runs, path: Path, asked: Sequence[str]) -> tuple[Kept, list[int]]:
    """What is kept under a name, and which of its seeds are not among the runs."""
    there = read_kept(path, asked)
    given = {config["seed"] for config in runs.configs}
    others = [i for i, config in enumerate(there.configs) if config["seed"] not in given]
    if others:
        differing = differences(there.configs[0], runs.configs[0], "there", "given", MAY_DIFFER | {"ks"})
        if differing:
            raise UsageError(f"{path}: kept of runs with another configuration ({'; '.join(differing)}); {AGAIN}")
        check_comparable([there, runs])
    return there, others


def read_kept(path: Path, asked: Sequence[str] | None = None) -> Kept:
    """What `keep` has written.

    Args:
        asked: the flags that are expected to have made it; None: any.

    Raises:
        UsageError: it is damaged, no such file, or of other flags.
    """
    if path.exists() and not zipfile.is_zipfile(path):
        raise UsageError(f"{path}: expected a workdir, or a file of experiments/tables.py --keep")
    held = _read_npz(path, (), "a file of experiments/tables.py --keep", AGAIN)
    try:
        said = json.loads(held.pop("said").tobytes())
        made_by, configs, summaries = said["asked"], said["configs"], said["summaries"]
        name, folders = str(path), [path / SEED_FOLDER.format(config["seed"]) for config in configs]
        shown(configs[0]["split"], cut_offs([Kept(name, folders, configs, summaries, held)]))
    except (KeyError, ValueError, TypeError, IndexError) as error:
        raise UsageError(f"{path}: holds no kept results ({error!r}); expected a file of tables.py --keep") from None
    if asked is not None and sorted(asked) != sorted(made_by):
        apart = ", ".join(sorted({*asked} ^ {*made_by}))
        raise UsageError(f"{path}: kept of runs with other flags ({apart}); {AGAIN}")
    return Kept(name, folders, configs, summaries, held)


def label(workdir: Path) -> str:
    """A short name of a run's folder that also tells runs of one seed of several recipes apart."""
    seed = workdir.name.startswith(SEED_FOLDER.format(""))
    return f"{workdir.resolve().parent.name}_{workdir.name}" if seed else workdir.name


def read_runs(workdir: str | os.PathLike) -> Runs:
    """The finished run, or runs of several seeds, in a workdir or a file of kept results.

    Raises:
        UsageError: there is none, or there are runs of several configurations.
    """
    folder = Path(workdir)
    if folder.is_file():
        return read_kept(folder)
    folders = [path for path in [folder, *seed_folders(folder)] if (path / "summary.json").exists()]
    if not folders:
        raise UsageError(f"{folder}: holds no finished run (no summary.json, no {SEED_FOLDER.format('<n>')}/ with one)")
    if folders[0] == folder and len(folders) > 1:
        raise UsageError(
            f"{folder} holds a run and beside it {', '.join(path.name for path in folders[1:])}; expected one run or "
            "seeds of one configuration: move one of them to a workdir of its own"
        )
    configs = [read_config(path) for path in folders]
    for path, config in zip(folders, configs, strict=True):
        differing = differences(configs[0], config, folders[0].name, path.name, MAY_DIFFER)
        if differing:
            raise UsageError(
                f"{folder}: {folders[0].name} and {path.name} are not seeds of one configuration "
                f"({'; '.join(differing)}); move each configuration's seeds to a workdir of their own"
            )
    summaries = [read_json(path / "summary.json") for path in folders]
    return Runs(str(workdir), folders, configs, summaries)


def seed_folders(folder: Path) -> list[Path]:
    """The folders of seeds in a workdir, by seed."""
    return sorted(folder.glob(SEED_FOLDER.format("*")), key=lambda path: (len(path.name), path.name))


def cut_offs(runs: Sequence[Runs]) -> list[int]:
    """The cut-offs that all runs have."""
    return sorted(set.intersection(*(set(config["ks"]) for one in runs for config in one.configs)))


def spread(values: Sequence[float | int | None]) -> str:
    """mean ± standard deviation over seeds, which one seed has none of; - where there are no values."""
    known = [value for value in values if value is not None and np.isfinite(value)]
    if not known:
        return "-"
    return f"{np.mean(known):.4f}" + (f" ± {np.std(known, ddof=1):.4f}" if len(known) > 1 else "")


def read_per_client(folder: Path, *names: str) -> dict[str, np.ndarray]:
    """The arrays of per_client.npz; only those named, where some are (the test items of a cold split are large).

    Raises:
        UsageError: there is none, or it is damaged.
    """
    return _read_npz(
        folder / "per_client.npz",
        names,
        "a finished run; start it again to go on",
        "remove it, and start the run again",
    )


def _read_npz(path: Path, names: Sequence[str], expected: str, remedy: str) -> dict[str, np.ndarray]:
    try:
        with path.open("rb") as file, np.load(file) as held:  # of a damaged file np.load leaves its own open
            return {name: held[name] for name in names or held.files}
    except FileNotFoundError:
        raise UsageError(f"{path} does not exist: expected {expected}") from None
    except (zipfile.BadZipFile, ValueError, EOFError, OSError) as error:
        raise UsageError(f"{path}: damaged ({error}); {remedy}") from None


def paired(a: np.ndarray, b: np.ndarray) -> str:
    """Mean of a - b with its 95 % interval; a and b [seeds, users]."""
    mean, low, high = metrics.paired_difference(a, b)
    return f"{mean:+.4f} [{low:+.4f}, {high:+.4f}]"


def check_comparable(runs: Sequence[Runs]) -> None:
    """That all runs rank the same test items of the same users in the same way, some of them in all runs.

    Raises:
        UsageError: names the first run that differs from the first of all, and how.
    """
    first, judged = runs[0], True
    for other in runs:
        for folder, config, task in zip(other.folders, other.configs, other.tasks, strict=True):
            for name in ("dataset", "split", "ranking"):  # what filters leave shows in users and items
                if config[name] != first.configs[0][name]:
                    raise UsageError(
                        f"{folder} cannot be compared with {first.folders[0]}: {name} is {config[name]!r} there and "
                        f"{first.configs[0][name]!r} here; compare runs on the same data and split"
                    )
            if task != first.tasks[0]:
                raise UsageError(
                    f"{folder} cannot be compared with {first.folders[0]}: their users or test items differ; compare "
                    "runs on the same data and split"
                )
        ndcg = shown(other.configs[0]["split"], cut_offs([other]))[-1]
        judged = judged & np.isfinite(other.by_client(ndcg)).all(0)
        if not judged.any():
            raise UsageError(
                f"{other.name} cannot be compared with {first.name} and those between: no evaluated client in common; "
                "run them again with one --eval_clients"
            )


def compare(workdirs: Sequence[str | os.PathLike], names: Sequence[str] = ()) -> str:
    """A table of two or more workdirs.

    Args:
        workdirs: the first is what the others are compared with.
        names: test metrics; none: HR and NDCG at the cut-offs of the first run.

    Raises:
        UsageError: fewer than two workdirs, one without a finished run, or runs that cannot be compared.
        ValueError: a metric that the runs do not have.
    """
    if len(workdirs) < 2:
        raise UsageError(f"{len(workdirs)} workdirs given, expected two or more to compare")
    runs = [read_runs(workdir) for workdir in workdirs]
    check_comparable(runs)
    known = runs[0].metrics
    names = list(names) or [name for name in known if name.startswith(("HR@", "NDCG@"))]
    for one in runs:
        for name in names:
            one_of("metric", name, [n for n in known if n in one.metrics])
    head = ["", "seeds", *names, *(f"{name} - first" for name in names)]
    base = {name: runs[0].by_client(name) for name in names}
    rows = []
    for i, one in enumerate(runs):
        cells = [spread([said["test"][name] for said in one.summaries]) for name in names]
        cells += [paired(one.by_client(name), base[name]) if i else "" for name in names]
        rows.append([f"{one.name} ({one.summaries[0]['method']})", str(len(one.folders)), *cells])
    config = runs[0].configs[0]
    protocols = sorted({config["protocol"] for one in runs for config in one.configs})
    title = (
        f"{config['dataset']}, {config['split']}, protocol {' and '.join(protocols)}, {config['ranking']} ranking\n"
        "test metrics, mean ± standard deviation over seeds; paired difference to the first, 95 % interval"
    )
    return "\n".join([title, *aligned([head, *rows])])


def markdown(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown under its title, with an empty line at the end."""
    lines = [title, "", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows), ""])


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table: first column to the left, the others to the right, a rule under the head."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    ]
    return [lines[0], "-" * len(lines[0]), *lines[1:]]


def main(argv: Sequence[str] | None = None) -> int:
    """The command; exit codes as launch.py."""
    parser = argparse.ArgumentParser(prog="python -m fedjax_rec.compare", description=__doc__.split("\n")[0])
    parser.add_argument("workdirs", nargs="+", help="workdirs of runs or of seeds; the first is compared with")
    parser.add_argument("--metrics", default="", help="test metrics, like HR@10,NDCG@10")
    given = parser.parse_args(argv)
    names = [name for name in given.metrics.split(",") if name]
    return in_one_line("compare", lambda: compare(given.workdirs, names))


if __name__ == "__main__":
    sys.exit(main())
