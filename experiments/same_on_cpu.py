"""Does this machine's accelerator train what the CPU trains? Short runs of both, side by side, as Markdown.

    python experiments/same_on_cpu.py --out=runs/same_on_cpu

Every method runs twice through launch.py with one seed on the embedded data set: on the devices JAX takes by itself,
and on the CPU. Both draw the same samples and noise, and differ in the order of sums alone, so the first round's losses
should agree to float32's rounding; a first round that is off by a percent is a defect. Later ones stay near, and most
clients' ranks are the same, but where a method diverges, or chooses by close calls (CoFedRec's clusters).

    loss       the last round's training loss on the device
    first, largest  relative difference to the CPU's loss, in the first round and over all
    NDCG@10    of the test targets, on the device and on the CPU
    same rank  share of the clients whose test target has the same rank on both
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from absl import app, flags

from fedjax_rec import compare
from fedjax_rec.validate import in_one_line
from fedjax_rec.workdir import read_json

FLAGS = flags.FLAGS
METHODS = (
    "fedavg", "fcf", "fedmf", "fedncf", "pfedrec", "fedrap", "fedrkg", "plgc", "gpfedrec", "cofedrec", "feddae",
    "fedvlr", "mlp_fusion", "fedvbpr", "mdifffr", "ipfedrec",
)  # fmt: skip
COLD = "mdifffr", "ipfedrec"
flags.DEFINE_string("out", "runs/same_on_cpu", "Folder of the workdirs and same_on_cpu.md.")
flags.DEFINE_list("methods", list(METHODS), "Which methods.")
flags.DEFINE_integer("rounds", 10, "Rounds of every run.")
flags.DEFINE_integer("jobs", 1, "CPU runs at a time, beside one on the device.")
flags.DEFINE_multi_string("override", [], "A flag handed to every run, e.g. --dataset=ku.")

TINY = np.finfo(np.float32).tiny  # EASE's loss is 0
LAUNCH = Path(__file__).resolve().parent.parent / "launch.py"
HEAD = ["method", "loss", "first", "largest", "NDCG@10", "on the CPU", "same rank", "device"]


def train(method: str, where: str) -> Path:
    """The workdir of a finished run; `where` is `device` or `cpu`.

    Raises:
        ValueError: if the run failed, with the last line it said.
    """
    workdir = Path(FLAGS.out) / where / method
    command = [sys.executable, str(LAUNCH), f"--method={method}", f"--workdir={workdir}", f"--rounds={FLAGS.rounds}"]
    command += [f"--eval_every={FLAGS.rounds}", "--cpu_devices=1", "--noplots", "--noprogress"]
    command += ["--split=cold_items"] * (method in COLD) + FLAGS.override
    environment = {"JAX_PLATFORMS": "cpu"} if where == "cpu" else {}
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["nothing said"])[-1]
        raise ValueError(f"{method} on the {where}: exit code {done.returncode}, {said}")
    return workdir


def row(method: str, device: Path, cpu: Path) -> list[str]:
    """A line of the table."""
    losses, ndcg, ranks = [], [], []
    for workdir in (device, cpu):
        lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
        losses.append(np.array([line["loss"] for line in lines]))
        ndcg.append(read_json(workdir / "summary.json")["test"]["NDCG@10"])
        ranks.append(compare.read_per_client(workdir, "test_rank")["test_rank"])
    apart = np.abs(losses[0] - losses[1]) / np.maximum(np.abs(losses[1]), TINY)
    judged = ~np.isnan(ranks[1])
    same = np.mean(ranks[0][judged] == ranks[1][judged])
    name = read_json(device / "summary.json")["device"]
    differences = f"{apart[0]:.1e}", f"{apart.max():.1e}"
    return [method, f"{losses[0][-1]:.4f}", *differences, *(f"{x:.4f}" for x in ndcg), f"{same:.1%}", name]


def tables() -> str:
    """All methods; those that are finished stand in OUT/same_on_cpu.md at any time."""
    rows, text = [], ""
    # one at a time on the device: processes that share an accelerator wait for each other at every step
    with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(FLAGS.jobs) as some:
        runs = [(one.submit(train, m, "device"), some.submit(train, m, "cpu")) for m in FLAGS.methods]
        for method, pair in zip(FLAGS.methods, runs, strict=True):
            rows.append(row(method, *(run.result() for run in pair)))
            print(" ".join(rows[-1]), file=sys.stderr, flush=True)
            text = compare.markdown(f"### After {FLAGS.rounds} rounds", HEAD, rows)
            (Path(FLAGS.out) / "same_on_cpu.md").write_text(text)
    return text


if __name__ == "__main__":
    app.run(lambda _: in_one_line("same_on_cpu.py", tables))
