"""Chooses hyper-parameters on validation: the same number of random trials for every method and data set.

    python experiments/tune.py --data_dir=DATA --out=runs/tune --datasets=ku,ml-100k --methods=fedmf,fedrap

Every trial is one line of a file in OUT, so that an interrupted search goes on where it was;
--shard=i/n takes every n-th trial, for several processes. Test metrics are recorded but never looked at to choose.
--choose prints the best settings of what is there, as lines of a flagfile.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import app, flags

from fedjax_rec import run

FLAGS = flags.FLAGS
flags.DEFINE_string("data_dir", None, "Folder that holds the data set folders.")
flags.DEFINE_string("out", "runs/tune", "Folder of the trials.")
flags.DEFINE_list("datasets", ["ku", "filmtrust", "amazon-video", "ml-100k"], "Data sets.")
flags.DEFINE_list("methods", ["fedmf", "fedncf", "pfedrec", "fedrap"], "Methods.")
flags.DEFINE_integer("trials", 10, "Trials per method and data set.")
flags.DEFINE_string("shard", "0/1", "Which part of the trials this process runs.")
flags.DEFINE_float("minutes", 1e9, "Start no trial after so many minutes.")
flags.DEFINE_integer("cpu_devices", 2, "Virtual CPU devices.")
flags.DEFINE_bool("choose", False, "Only print the best settings.")

ROUNDS, EVAL_EVERY, PATIENCE, SEED = 300, 10, 50, 1000


def protocol_of(dataset: str) -> dict[str, Any]:
    """KU is judged at 50, as in the papers; the others at 10."""
    if dataset == "ku":
        return {"split": "given", "select_metric": "NDCG@50"}
    return {"split": "leave_one_out", "select_metric": "NDCG@10"}


def log_uniform(rng, low: float, high: float) -> float:
    return float(np.exp(rng.uniform(np.log(low), np.log(high))))


def draw_settings(method: str, trial: int) -> dict[str, Any]:
    """One trial's settings, a function of (method, trial)."""
    rng = np.random.default_rng([trial, sum(map(ord, method))])
    lr = log_uniform(rng, 0.05, 8.0)
    item_lr = log_uniform(rng, 0.25, 10.0)  # times the clients: the step that the server's mean is made of
    settings = {
        "lr": round(lr, 4),
        "item_lr_scale": round(item_lr / lr, 5),
        "negatives": int(rng.choice([1, 2, 4, 8])),
        "local_epochs": int(rng.choice([1, 1, 2])),
    }
    if method in ("fedmf", "fedncf"):
        settings["user_init_std"] = float(rng.choice([0.01, 0.1]))
    else:
        settings["client_init"] = str(rng.choice(["random", "shared"]))
    if method == "pfedrec":
        # the table moves by item_lr_scale * server_lr; a small local share makes the local tuning gentle
        share = float(rng.choice([1, 10, 100]))
        settings["item_lr_scale"] = round(settings["item_lr_scale"] / share, 7)
        settings["server_lr"] = share
        settings["evaluate_at"] = str(rng.choice(["post_local", "post_aggregate"]))
    if method == "fedncf":
        settings["branches"] = str(rng.choice(["mlp", "neumf"]))
        settings["network_lr_scale"] = round(log_uniform(rng, 0.1, 10), 3)
    if method == "fedrap":
        settings["own_lr_scale"] = round(log_uniform(rng, 0.01, 100) / lr, 5)
        settings["independence"] = round(log_uniform(rng, 1e-4, 1.0), 6)
        settings["sparsity"] = round(log_uniform(rng, 1e-4, 1.0), 6)
    return settings


def run_trial(dataset: str, method: str, trial: int, data: tuple) -> dict[str, Any]:
    settings = draw_settings(method, trial)
    config = run.RunConfig(
        method=method, settings=settings, dataset=dataset, data_dir=FLAGS.data_dir, rounds=ROUNDS, seed=SEED,
        eval_every=EVAL_EVERY, patience=PATIENCE, max_buckets=2, **protocol_of(dataset),
    )  # fmt: skip
    began = time.perf_counter()
    line = {"dataset": dataset, "method": method, "trial": trial, "settings": settings}
    try:
        summary = run.train(config, data=data, references=False)
        kept = {part: summary[part] for part in ("valid", "test", "best_round", "rounds")}
        line |= {**kept, "score": summary["valid"][config.select_metric]}
    except FloatingPointError as error:
        line |= {"score": -1.0, "error": str(error)}
    return {**line, "seconds": time.perf_counter() - began}


def done_trials(path: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in path.read_text().splitlines()] if path.exists() else []


def choose(folder: Path) -> None:
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for path in sorted(folder.glob("*.jsonl")):
        for line in done_trials(path):
            found.setdefault((line["dataset"], line["method"]), []).append(line)
    for (dataset, method), lines in sorted(found.items()):
        best = max(lines, key=lambda line: line["score"])
        print(f"# {dataset} {method}: trial {best['trial']} of {len(lines)}, validation {best['score']:.4f}")
        print("\n".join(f"--set={name}={value}" for name, value in best["settings"].items()))


def main(argv) -> None:
    folder = Path(FLAGS.out)
    folder.mkdir(parents=True, exist_ok=True)
    if FLAGS.choose:
        return choose(folder)
    jax.config.update("jax_num_cpu_devices", FLAGS.cpu_devices)
    part, parts = map(int, FLAGS.shard.split("/"))
    began = time.perf_counter()
    data = {
        name: run.load_data(run.RunConfig(dataset=name, data_dir=FLAGS.data_dir, **protocol_of(name)))
        for name in FLAGS.datasets
    }
    lines = [line for path in folder.glob("*.jsonl") for line in done_trials(path)]
    done = {(line["dataset"], line["method"], line["trial"]) for line in lines}
    # trial by trial over all data sets, so that a search that is cut short has searched all of them alike
    jobs = [(t, d, m) for t in range(FLAGS.trials) for d in FLAGS.datasets for m in FLAGS.methods]
    for trial, dataset, method in jobs[part::parts]:
        if (dataset, method, trial) in done or time.perf_counter() - began > 60 * FLAGS.minutes:
            continue
        line = run_trial(dataset, method, trial, data[dataset])
        with (folder / f"{part}.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(dataset, method, trial, f"{line['score']:.4f}", f"{line['seconds']:.1f} s", flush=True)


if __name__ == "__main__":
    app.run(main)
