"""Chooses hyper-parameters on validation: the same number of random trials for every method and data set.

    python experiments/tune.py --data_dir=DATA --out=runs/tune --datasets=ku,ml-100k --methods=fedmf,fedrap

Every trial is one line of a file in OUT, so that an interrupted search goes on where it was;
--shard=i/n takes every n-th trial, for several processes. Test metrics are recorded but never looked at to choose.
--choose writes the best settings of what is there as flagfiles.
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
flags.DEFINE_integer("trials", 20, "Trials per method and data set.")
flags.DEFINE_integer("first_trial", 0, "Number of the first one.")
flags.DEFINE_string("shard", "0/1", "Which part of the trials this process runs.")
flags.DEFINE_float("minutes", 1e9, "Start no trial after so many minutes.")
flags.DEFINE_integer("cpu_devices", 2, "Virtual CPU devices.")
flags.DEFINE_bool("choose", False, "Only write the best settings so far as flagfiles.")
flags.DEFINE_string("flags_to", "experiments", "Folder for --choose.")

ROUNDS, EVAL_EVERY, PATIENCE, SEED = 300, 10, 50, 1000
WIDE_TRIALS = 10


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
    # the first trials search widely; the later ones where the first found every method at its best: fast users
    # over a slow table
    wide = trial < WIDE_TRIALS
    lr = log_uniform(rng, 0.05, 8.0) if wide else log_uniform(rng, 0.8, 8.0)
    # times the clients: the step that the server's mean is made of
    item_lr = log_uniform(rng, 0.25, 10.0) if wide else log_uniform(rng, 0.15, 4.0)
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
        settings["own_lr_scale"] = round(log_uniform(rng, 0.01, 100 if wide else 10) / lr, 5)
        settings["independence"] = round(log_uniform(rng, 1e-5, 1.0 if wide else 0.1), 7)
        settings["sparsity"] = round(log_uniform(rng, 1e-5, 1.0 if wide else 0.1), 7)
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
    """Writes the best settings of every data set and method as flagfiles; fcf and fedavg are fedmf with presets."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for path in sorted(folder.glob("*.jsonl")):
        for line in done_trials(path):
            found.setdefault((line["dataset"], line["method"]), []).append(line)
    for (dataset, method), lines in sorted(found.items()):
        best = max(lines, key=lambda line: line["score"])
        for name in (method, "fcf", "fedavg") if method == "fedmf" else (method,):
            write_flags(dataset, name, best, len(lines))


def write_flags(dataset: str, method: str, best: dict[str, Any], trials: int) -> None:
    protocol, k = protocol_of(dataset), 50 if dataset == "ku" else 10
    path = Path(FLAGS.flags_to) / f"{dataset.replace('-', '_')}_{method}.flags"
    tested = ", ".join(f"{name} {best['test'][name]:.3f}" for name in (f"HR@{k}", f"NDCG@{k}"))
    lines = [
        f"# {method} on {dataset}: settings chosen on validation, best of {trials} random trials of fedmf's space."
        if method in ("fcf", "fedavg")
        else f"# {method} on {dataset}: settings chosen on validation, best of {trials} random trials.",
        f"#   python launch.py --flagfile={path} --data_dir=DATA --workdir=runs/{path.stem}",
        f"# Expected: test {tested} or near it (round {best['best_round']} of the trial, seed {SEED}, "
        f"about {best['seconds']:.0f} s on a busy core).",
        f"--dataset={dataset}",
        f"--method={method}",
        *(f"--{name}={value}" for name, value in protocol.items()),
        f"--rounds={ROUNDS}",
        f"--eval_every={EVAL_EVERY}",
        f"--patience={2 * PATIENCE}",
        *(f"--set={name}={value}" for name, value in best["settings"].items()),
    ]
    path.write_text("\n".join(lines) + "\n")
    print(f"{path}: validation {best['score']:.4f}, best of {trials}")


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
    jobs = [(t, d, m) for t in range(FLAGS.first_trial, FLAGS.trials) for d in FLAGS.datasets for m in FLAGS.methods]
    for trial, dataset, method in jobs[part::parts]:
        if (dataset, method, trial) in done or time.perf_counter() - began > 60 * FLAGS.minutes:
            continue
        line = run_trial(dataset, method, trial, data[dataset])
        with (folder / f"{part}.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(dataset, method, trial, f"{line['score']:.4f}", f"{line['seconds']:.1f} s", flush=True)


if __name__ == "__main__":
    app.run(main)
