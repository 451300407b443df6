"""Runs flagfiles over several seeds and prints one Markdown table per data set, beside the training-free rankers.

    python experiments/tables.py --data_dir=DATA --out=runs/tables --seeds=5 --against=fedmf experiments/ku_*.flags

Every run is a workdir OUT/<flagfile>/seed_<n>, made by launch.py; finished ones are not run again. A row is named by
its flagfile, without the data set. The last column is the paired difference to --against; --claims=a>b,c>d are judged
below the table at every cut-off: each client's metric is averaged over seeds, and the mean of the per-client
differences is shown with its 95 % interval (see fedjax_rec/compare.py). A claim is true or false where the interval
leaves zero out, else open.
"""

from __future__ import annotations

import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
from absl import app, flags

from fedjax_rec import compare, metrics
from fedjax_rec.compare import Runs

FLAGS = flags.FLAGS
flags.DEFINE_string("data_dir", None, "Folder that holds the data set folders.")
flags.DEFINE_string("out", "runs/tables", "Folder of the workdirs.")
flags.DEFINE_integer("seeds", 5, "Seeds 0 .. n-1 of every flagfile.")
flags.DEFINE_string("against", "fedmf", "Row that the others are compared with, client by client.")
flags.DEFINE_list("claims", [], "Claims to judge, as better>worse by row names.")
flags.DEFINE_list("k", ["10", "50"], "Cut-offs shown.")
flags.DEFINE_multi_string("override", [], "A flag handed to every run after its flagfile, e.g. --rounds=50.")
flags.DEFINE_bool("run", True, "False: only print what is there.")

LAUNCH = Path(__file__).resolve().parent.parent / "launch.py"
DIVERGED = 3  # exit code of launch.py


def run_one(flagfile: Path, seed: int, workdir: Path) -> None:
    if (workdir / "summary.json").exists():
        return
    print(f"{flagfile.stem} seed {seed}", file=sys.stderr, flush=True)
    command = [
        sys.executable, str(LAUNCH), f"--flagfile={flagfile}", f"--seed={seed}", f"--workdir={workdir}",
        f"--data_dir={FLAGS.data_dir}", "--noprogress", "--noplots", "--checkpoint_every=0",
        f"--compile_cache={Path(FLAGS.out) / 'compiled'}", f"--k={','.join(FLAGS.k)}", *FLAGS.override,
    ]  # fmt: skip
    code = subprocess.run(command, stdout=subprocess.DEVNULL).returncode
    if code == DIVERGED:
        print(f"{workdir}: no result (see above); the table counts the seeds that have one", file=sys.stderr)
    elif code:  # refused or stopped: no finding about the method
        sys.exit(code)


def row_name(flagfile: str, dataset: str) -> str:
    return flagfile.removeprefix(f"{dataset.replace('-', '_')}_").removeprefix("cold_items_")


def table(runs: dict[str, Runs]) -> str:
    """Markdown for the rows of one data set."""
    cold = next(iter(runs.values())).configs[0]["split"] == "cold_items"  # users have several targets, all unseen
    names = [f"{name}@{k}" for k in FLAGS.k for name in ("Recall" if cold else "HR", "NDCG")]
    wide = names[-2:]
    parts = () if cold else ("test_seen", "test_unseen")
    head = ["", *names, *(f"{m} {part.removeprefix('test_')}" for m in wide for part in parts), "seeds", "round"]
    head += [f"{wide[1]} - {FLAGS.against}"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for name, one in runs.items():
        said = one.summaries
        cells = [compare.spread([s["test"][m] for s in said]) for m in names]
        cells += [compare.spread([s[part][m] for s in said]) for m in wide for part in parts]
        cells += [str(len(said)), f"{np.mean([s['best_round'] for s in said]):.0f}"]
        cells += [_difference(runs, name, FLAGS.against, wide[1]) if name != FLAGS.against in runs else ""]
        lines.append("| " + " | ".join([name, *cells]) + " |")
    for name, ranker in next(iter(runs.values())).summaries[0]["reference_rankers"].items():
        cells = [f"{ranker['test'][m]:.4f}" for m in names]
        cells += ["-" if ranker[part][m] is None else f"{ranker[part][m]:.4f}" for m in wide for part in parts]
        lines.append("| " + " | ".join([f"*{name}*", *cells, "", "", ""]) + " |")
    claims = [verdict(runs, claim, m) for claim in FLAGS.claims for m in names if set(claim.split(">")) <= set(runs)]
    return "\n".join([*lines, "", *claims])


def _paired(runs: dict[str, Runs], name: str, other: str, metric: str) -> tuple[np.ndarray, np.ndarray]:
    return compare.by_client(runs[name].folders, metric), compare.by_client(runs[other].folders, metric)


def _difference(runs: dict[str, Runs], name: str, other: str, metric: str) -> str:
    return compare.paired(*_paired(runs, name, other, metric))


def verdict(runs: dict[str, Runs], claim: str, metric: str) -> str:
    """A line that says whether the claim holds."""
    better, worse = claim.split(">")
    _, low, high = metrics.paired_difference(*_paired(runs, better, worse, metric))
    holds = "true" if low > 0 else "false" if high < 0 else "open"
    return f"* {better} beats {worse}, {metric}: **{holds}** ({_difference(runs, better, worse, metric)})"


def main(argv) -> None:
    flagfiles = [Path(name) for name in argv[1:]]
    if not flagfiles:
        raise app.UsageError("expected flagfiles, like experiments/ku_*.flags")
    out = Path(FLAGS.out)
    for seed in range(FLAGS.seeds if FLAGS.run else 0):
        for flagfile in flagfiles:
            run_one(flagfile, seed, out / flagfile.stem / compare.SEED_FOLDER.format(seed))
    found: dict[str, dict[str, Runs]] = defaultdict(dict)
    for flagfile in flagfiles:
        if not any((out / flagfile.stem).glob(compare.SEED_FOLDER.format("*") + "/summary.json")):
            continue
        runs = compare.read_runs(out / flagfile.stem)
        config = runs.configs[0]
        found[f"{config['dataset']} {config['protocol']}"][row_name(flagfile.stem, config["dataset"])] = runs
    for runs in found.values():
        compare.check_comparable(list(runs.values()))
        print(table(runs), flush=True)


if __name__ == "__main__":
    app.run(main)
