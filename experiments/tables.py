"""Runs flagfiles over several seeds and prints one Markdown table per data set, beside the training-free rankers.

    python experiments/tables.py --data_dir=DATA --out=runs/tables --seeds=5 --against=fedmf experiments/ku_*.flags

Every run is a workdir OUT/<flagfile>/<seed>, made by launch.py; finished ones are not run again. The last columns give
the paired difference to --against: each client's metric is averaged over seeds, and the mean of the per-client
differences is shown with its 95 % interval (normal approximation over clients).
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags

from fedjax_rec.compare import by_client, paired, spread

FLAGS = flags.FLAGS
flags.DEFINE_string("data_dir", None, "Folder that holds the data set folders.")
flags.DEFINE_string("out", "runs/tables", "Folder of the workdirs.")
flags.DEFINE_integer("seeds", 5, "Seeds 0 .. n-1 of every flagfile.")
flags.DEFINE_string("against", "fedmf", "Method that the others are compared with, client by client.")
flags.DEFINE_list("k", ["10", "50"], "Cut-offs shown.")
flags.DEFINE_multi_string("override", [], "A flag handed to every run after its flagfile, e.g. --rounds=50.")
flags.DEFINE_bool("run", True, "False: only print what is there.")

LAUNCH = Path(__file__).resolve().parent.parent / "launch.py"


def run_one(flagfile: Path, seed: int, workdir: Path) -> None:
    if (workdir / "summary.json").exists():
        return
    command = [
        sys.executable, str(LAUNCH), f"--flagfile={flagfile}", f"--seed={seed}", f"--workdir={workdir}",
        f"--data_dir={FLAGS.data_dir}", "--noprogress", "--noplots", "--checkpoint_every=0",
        f"--compile_cache={Path(FLAGS.out) / 'compiled'}", f"--k={','.join(FLAGS.k)}", *FLAGS.override,
    ]  # fmt: skip
    if subprocess.run(command, stdout=subprocess.DEVNULL).returncode:
        print(f"{workdir}: no result (see above); the table counts the seeds that have one", file=sys.stderr)


def table(dataset: str, runs: dict[str, list[Path]]) -> str:
    """Markdown for one data set: {method: workdirs of its seeds}."""
    names = [f"{name}@{k}" for k in FLAGS.k for name in ("HR", "NDCG")]
    wide = names[-2]
    head = ["", *names, f"{wide} seen", f"{wide} unseen", "seeds", "round", f"{names[1]} - {FLAGS.against}"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    summaries: dict[str, list[dict[str, Any]]] = {
        method: [json.loads((folder / "summary.json").read_text()) for folder in folders]
        for method, folders in runs.items()
    }
    base = by_client(runs[FLAGS.against], names[1]) if FLAGS.against in runs else None
    for method, said in summaries.items():
        cells = [spread([s["test"][name] for s in said]) for name in names]
        cells += [spread([s[part][wide] for s in said]) for part in ("test_seen", "test_unseen")]
        cells += [str(len(said)), f"{np.mean([s['best_round'] for s in said]):.0f}"]
        other = base is not None and method != FLAGS.against
        cells += [paired(by_client(runs[method], names[1]), base) if other else ""]
        lines.append("| " + " | ".join([method, *cells]) + " |")
    first = next(iter(summaries.values()))[0]
    for ranker, said in first["reference_rankers"].items():
        cells = [f"{said['test'][name]:.4f}" for name in names]
        cells += [f"{said[part][wide]:.4f}" for part in ("test_seen", "test_unseen")]
        lines.append("| " + " | ".join([f"*{ranker}*", *cells, "", "", ""]) + " |")
    counts = first["counts"]
    title = (
        f"**{dataset}** ({counts['users']:,} users, {counts['items']:,} items), protocol {first['protocol']}, "
        "mean ± standard deviation over seeds"
    )
    return title + "\n\n" + "\n".join(lines) + "\n"


def main(argv) -> None:
    flagfiles = [Path(name) for name in argv[1:]]
    if not flagfiles:
        raise app.UsageError("expected flagfiles, like experiments/ku_*.flags")
    for seed in range(FLAGS.seeds):
        for flagfile in flagfiles:
            workdir = Path(FLAGS.out) / flagfile.stem / str(seed)
            if FLAGS.run:
                print(f"{flagfile.stem} seed {seed}", file=sys.stderr, flush=True)
                run_one(flagfile, seed, workdir)
    found: dict[str, dict[str, list[Path]]] = defaultdict(lambda: defaultdict(list))
    for flagfile in flagfiles:
        for seed in range(FLAGS.seeds):
            workdir = Path(FLAGS.out) / flagfile.stem / str(seed)
            if (workdir / "summary.json").exists():
                config = json.loads((workdir / "config.json").read_text())
                found[f"{config['dataset']} {config['protocol']}"][config["method"]].append(workdir)
    for name, runs in found.items():
        print(table(name.split()[0], runs), flush=True)


if __name__ == "__main__":
    app.run(main)
