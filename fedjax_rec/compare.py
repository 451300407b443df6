"""Runs beside each other: mean and spread over seeds, and paired differences client by client.

    python -m fedjax_rec.compare runs/pfedrec runs/fedmf [--metrics=NDCG@10,HR@10]

A workdir is that of one run, or a folder of seeds (`launch.py --seeds`). Differences are taken to the first workdir:
each client's metric is averaged over the seeds of a workdir, and the mean of the per-client differences is shown with
its 95 % interval (normal approximation over clients). The interval is about clients; the spread tells of seeds.
"""

from __future__ import annotations

import argparse
import os
import sys
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fedjax_rec import metrics
from fedjax_rec.validate import in_one_line, one_of
from fedjax_rec.workdir import IMMATERIAL, UsageError, differences, read_config, read_json

SEED_FOLDER = "seed_{}"
LAYOUT = frozenset({"devices", "block_size", "block_sizes", "max_buckets"})
"""Settings that only order a run's sums."""
MAY_DIFFER = IMMATERIAL | LAYOUT | {"seed"}
"""What seeds of one configuration may differ in."""


class Runs(NamedTuple):
    """The finished runs of one workdir: their folders, configurations and summaries, by seed."""

    name: str
    folders: list[Path]
    configs: list[dict[str, Any]]
    summaries: list[dict[str, Any]]


def label(workdir: Path) -> str:
    """A short name of a run's folder that also tells runs of one seed of several recipes apart."""
    seed = workdir.name.startswith(SEED_FOLDER.format(""))
    return f"{workdir.resolve().parent.name}_{workdir.name}" if seed else workdir.name


def read_runs(workdir: str | os.PathLike) -> Runs:
    """The finished run, or runs of several seeds, in a workdir.

    Raises:
        UsageError: there is none, or there are runs of several configurations.
    """
    folder = Path(workdir)
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


def by_client(folders: Sequence[Path], metric: str) -> np.ndarray:
    """One test metric by run and client, [seeds, users]."""
    return np.stack([read_per_client(folder, metric)[metric] for folder in folders])


def read_per_client(folder: Path, *names: str) -> dict[str, np.ndarray]:
    """The arrays of per_client.npz; only those named, where some are (the test items of a cold split are large).

    Raises:
        UsageError: there is none, or it is damaged.
    """
    path = folder / "per_client.npz"
    try:
        with np.load(path) as held:
            return {name: held[name] for name in names or held.files}
    except FileNotFoundError:
        raise UsageError(f"{path} does not exist: expected a finished run; start it again to go on") from None
    except (zipfile.BadZipFile, ValueError, EOFError, OSError) as error:
        raise UsageError(f"{path}: damaged ({error}); remove it, and start the run again") from None


def paired(a: np.ndarray, b: np.ndarray) -> str:
    """Mean of a - b over clients with its 95 % interval; a and b [seeds, users]."""
    mean, low, high = metrics.paired_difference(a, b)
    return f"{mean:+.4f} [{low:+.4f}, {high:+.4f}]"


def check_comparable(runs: Sequence[Runs]) -> None:
    """That all runs rank the same test items of the same users in the same way, some of them in all runs.

    Raises:
        UsageError: names the first run that differs from the first of all, and how.
    """
    first = runs[0]
    held = read_per_client(first.folders[0])
    users, targets, judged = held["user_id"], held["test_item"], _judged(held)
    for other in runs:
        for folder, config in zip(other.folders, other.configs, strict=True):
            for name in ("dataset", "split", "ranking"):  # what filters leave shows in users and items
                if config[name] != first.configs[0][name]:
                    raise UsageError(
                        f"{folder} cannot be compared with {first.folders[0]}: {name} is {config[name]!r} there and "
                        f"{first.configs[0][name]!r} here; compare runs on the same data and split"
                    )
            held = read_per_client(folder)
            same = np.array_equal(held["user_id"], users) and np.array_equal(held["test_item"], targets)
            judged = judged & _judged(held) if same else judged
            if not same:
                raise UsageError(
                    f"{folder} cannot be compared with {first.folders[0]}: their users or test items differ; compare "
                    "runs on the same data and split"
                )
            if not judged.any():
                raise UsageError(
                    f"{folder} cannot be compared with {first.folders[0]} and those between: no evaluated client in "
                    "common; run them again with one --eval_clients"
                )


def _judged(held: Mapping[str, np.ndarray]) -> np.ndarray:
    """Which clients of per_client.npz were evaluated on test items."""
    return np.isfinite(held["test_rank"]).any(1)


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
    known = [name for name in read_per_client(runs[0].folders[0]) if name == "MRR" or "@" in name]
    names = list(names) or [name for name in known if name.startswith(("HR@", "NDCG@"))]
    for one in runs:
        for name in names:
            one_of("metric", name, [n for n in known if n in one.summaries[0]["test"]])
    head = ["", "seeds", *names, *(f"{name} - first" for name in names)]
    base = {name: by_client(runs[0].folders, name) for name in names}
    rows = []
    for i, one in enumerate(runs):
        cells = [spread([said["test"][name] for said in one.summaries]) for name in names]
        cells += [paired(by_client(one.folders, name), base[name]) if i else "" for name in names]
        rows.append([f"{one.name} ({one.summaries[0]['method']})", str(len(one.folders)), *cells])
    config = runs[0].configs[0]
    protocols = sorted({config["protocol"] for one in runs for config in one.configs})
    title = (
        f"{config['dataset']}, {config['split']}, protocol {' and '.join(protocols)}, {config['ranking']} ranking\n"
        "test metrics, mean ± standard deviation over seeds; paired difference to the first over clients, 95 % interval"
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
