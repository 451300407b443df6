"""Chooses hyper-parameters on validation: the same budget for every method and data set.

    python experiments/tune.py --data_dir=DATA --out=runs/tune --datasets=ku,ml-100k --methods=fedmf,fedvlr-fedrap

For every data set and method: --trials random settings at one seed, then the --finalists best of them again at two more
seeds; the setting with the best mean validation score over the three is chosen. --hours caps what the trials of one
method and data set may take: after the first, none is begun later, and a slow method has fewer. None of the seeds is
one that tables.py reports, and no test metric is recorded. Every run is one line of a file in OUT, so that an
interrupted search goes on where it was; --shard=i/n takes every n-th pair of data set and method, for several
processes. Ranges are a method's own; those of view methods were narrowed after a first search on KU, FedRKG's after one
on FilmTrust, on validation. --start_from=ml-100k tries that data set's recipes first, as trial 0, which saves trials
where another data set of the kind was searched before. --choose writes the chosen settings as flagfiles. A method over
a backbone is named with it, like fedvlr-fedrap, and a cold-item split with its data set, like ku@cold_items.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import app, flags, logging

from fedjax_rec import run
from fedjax_rec.search import judge
from fedjax_rec.workdir import read_lines, write_lines

FLAGS = flags.FLAGS
flags.DEFINE_string("data_dir", None, "Folder that holds the data set folders.")
flags.DEFINE_string("out", "runs/tune", "Folder of the trials.")
flags.DEFINE_list(
    "datasets", ["ku", "filmtrust", "amazon-video", "ml-100k"], "Data sets, with @cold_items for that split."
)
METHODS = ["fcf", "fedavg", "fedmf", "pfedrec", "fedrap", "fedncf"]
flags.DEFINE_list("methods", METHODS, "Methods; those over another as method-backbone.")
flags.DEFINE_integer("trials", 8, "Random settings per method and data set.")
flags.DEFINE_integer("finalists", 2, "How many of them are run at all seeds.")
flags.DEFINE_float("hours", None, "Hours of trials per method and data set; default: no limit.", lower_bound=0.0)
flags.DEFINE_integer("rounds", 300, "Rounds at most; cold items take 120 at most.", lower_bound=1)
flags.DEFINE_integer("patience", 50, "Rounds without a better validation score that end a trial.")
flags.DEFINE_string("start_from", None, "Data set whose recipes are trial 0; default: random settings alone.")
flags.DEFINE_string("shard", "0/1", "Which part of the search this process runs.")
flags.DEFINE_integer("cpu_devices", 2, "Virtual CPU devices.")
flags.DEFINE_bool("choose", False, "Only write the best settings so far as flagfiles.")
flags.DEFINE_string("flags_to", "experiments", "Folder for --choose.")

EVAL_EVERY = 10
SEEDS = (1000, 1001, 1002)
PLAIN = str.maketrans("-@", "__")


COLD = "cold_items"
RECALLS = "Recall@20+Recall@50+Recall@100"


AT_50 = {"split": "leave_one_out", "select_metric": "NDCG@50"}
PROTOCOLS: dict[str, dict[str, Any]] = {
    "ku": {**AT_50, "split": "given"},
    "amazon-beauty": AT_50,
    "ml-latest-small": {**AT_50, "filters": {"min_item": 5}},  # FedVLR's ML: 610 users, 3,650 items
}
"""Those that the multimodal papers judge at 50; the others are judged at 10."""


def protocol_of(dataset: str, method: str = "") -> dict[str, Any]:
    """Cold items are judged by the sum of three recalls and after fewer rounds (they take seconds). EASE is done after
    a round."""
    if method == "ease":
        return {**protocol_of(dataset), "rounds": 1}
    name, _, split = dataset.partition("@")
    if split == COLD:
        rounds = min(FLAGS.rounds, 120)
        return {"dataset": name, "split": COLD, "select_metric": RECALLS, "ks": (20, 50, 100), "rounds": rounds}
    plain = {"split": "leave_one_out", "select_metric": "NDCG@10"}
    return {"dataset": name, "rounds": FLAGS.rounds, **PROTOCOLS.get(name, plain)}


def log_uniform(rng, low: float, high: float) -> float:
    return float(np.exp(rng.uniform(np.log(low), np.log(high))))


def draw_settings(method: str, trial: int) -> dict[str, Any]:
    """One trial's settings, a function of (method, trial)."""
    over, _, backbone = method.rpartition("-")
    rng = np.random.default_rng([trial, sum(map(ord, method))])
    if method in ALONE:
        return ALONE[method](rng)
    lr = log_uniform(rng, 0.05, 8.0)
    item_lr = log_uniform(rng, 0.2, 5.0)  # times the clients: the step that the server's mean is made of
    settings = {
        "lr": round(lr, 4),
        "item_lr_scale": round(item_lr / lr, 5),
        "negatives": int(rng.choice([1, 2, 4, 8])),
        "local_epochs": int(rng.choice([1, 1, 2])),
    }
    if backbone in ("fcf", "fedavg", "fedmf", "fedncf", "gpfedrec"):
        settings["user_init_std"] = float(rng.choice([0.01, 0.1]))
    else:
        settings["client_init"] = str(rng.choice(["random", "shared"]))
    if method in ("fcf", "fedavg", "fedmf"):
        settings["l2"] = round(log_uniform(rng, 1e-4, 1e-2), 6) if rng.random() < 0.5 else 0.0
    if method == "pfedrec" or over == "plgc":
        # the table moves by item_lr_scale * server_lr; a small local share makes the local tuning gentle
        share = float(rng.choice([1, 10, 100]))
        settings["item_lr_scale"] = round(settings["item_lr_scale"] / share, 7)
        settings["server_lr"] = share
    if method == "pfedrec":
        settings["evaluate_at"] = str(rng.choice(["post_local", "post_aggregate"]))
    if backbone == "fedncf":
        settings["branches"] = str(rng.choice(["mlp", "neumf"]))
    if backbone in ("fedncf", "gpfedrec"):
        settings["network_lr_scale"] = round(log_uniform(rng, 0.1, 10), 3)
    if backbone == "fedrap":
        settings["own_lr_scale"] = round(log_uniform(rng, 0.01, 10) / lr, 5)
        settings["independence"] = round(log_uniform(rng, 1e-5, 0.1), 7)
        settings["sparsity"] = round(log_uniform(rng, 1e-5, 0.1), 7)
    if method == "gpfedrec":
        # tables that are mixed with few others take smaller steps
        settings["item_lr_scale"] = round(settings["item_lr_scale"] / float(rng.choice([1, 10, 100])), 7)
    if method == "gpfedrec":
        settings["reg"] = round(log_uniform(rng, 0.01, 10), 4)
    if over:
        settings["backbone"] = backbone
    if over == "fedvbpr":  # clients train copies by plain SGD
        settings["fusion_lr_scale"] = round(log_uniform(rng, 0.05, 10.0) / lr, 5)
    elif over in ("fedvlr", "fedmr", "mlp_fusion"):  # Adam as released; by SGD a third of the settings diverged
        settings["layer_norm"] = False  # on KU FedVLR was best without
        settings["fusion_optimizer"] = "adam"
        settings["fusion_lr_scale"] = round(log_uniform(rng, 2e-5, 3e-3) / lr, 8)
    if over in ("fedvlr", "fedmr"):
        settings["router_lr_scale"] = round(log_uniform(rng, 0.1, 10), 3)
    if over == "fedrkg":  # users learn fast and tables that stay slowly; rare guidance was far below on FilmTrust
        lr = log_uniform(rng, *((0.05, 1.0) if backbone == "fedncf" else (0.5, 8.0)))  # its network diverges at more
        settings["lr"] = round(lr, 4)
        settings["item_lr_scale"] = round(log_uniform(rng, 0.02, 1.0) / lr, 7)
        settings["interval"] = int(rng.choice([1, 2, 5, 10]))
        settings["beta"] = float(rng.choice([0.05, 0.1, 0.3, 0.5, 0.7, 0.9]))
        settings["gate_lr"] = round(log_uniform(rng, 1e-4, 0.1), 6)
    if over == "plgc":
        settings["contrast_weight"] = round(log_uniform(rng, 1e-4, 0.1), 6)
        settings["normalise"] = bool(rng.choice([False, True]))
    return settings


def draw_feddae(rng) -> dict[str, Any]:
    return {
        "lr": round(log_uniform(rng, 3e-4, 3e-2), 5),
        "local_epochs": int(rng.choice([1, 3, 5])),
        "dropout": float(rng.choice([0.0, 0.5])),
        "beta": round(log_uniform(rng, 0.01, 1.0), 4),
        "server_lr": float(rng.choice([1, 3, 10])),
    }


def draw_cofedrec(rng) -> dict[str, Any]:
    return {
        "lr": round(log_uniform(rng, 0.05, 8.0), 4),
        "own_lr_scale": round(log_uniform(rng, 1.0, 300.0), 3),
        "reg": round(log_uniform(rng, 1e-4, 0.05), 6),
        "item_clusters": int(rng.choice([10, 30, 60])),
        "negatives": int(rng.choice([1, 2, 4, 8])),
    }


def draw_central(rng) -> dict[str, Any]:
    return {
        "lr": round(log_uniform(rng, 5e-4, 2e-2), 5),
        "l2": round(log_uniform(rng, 1e-6, 1e-2), 8),
        "negatives": int(rng.choice([1, 2, 4, 8])),
    }


def draw_pairwise(rng, **more: Any) -> dict[str, Any]:
    """A model of vectors that the server trains on triples."""
    settings = {"lr": round(log_uniform(rng, 1e-3, 2e-2), 5), "dim": int(rng.choice([32, 64, 128]))}
    return settings | {name: choose(rng) for name, choose in more.items()}


def any_of(*values: Any):
    return lambda rng: values[int(rng.integers(len(values)))]


def between(low: float, high: float):
    return lambda rng: float(f"{log_uniform(rng, low, high):.3g}")


def draw_cold(rng) -> dict[str, Any]:
    """A plain method whose rows for cold items are made by the server: its clients' settings."""
    lr = log_uniform(rng, 0.2, 8.0)
    return {
        "lr": round(lr, 4),
        "item_lr_scale": round(log_uniform(rng, 0.2, 5.0) / lr, 5),
        "negatives": int(rng.choice([2, 5, 10])),
        "init_std": float(rng.choice([0.01, 0.1])),
    }


def draw_content_cold(rng) -> dict[str, Any]:
    settings = draw_cold(rng) | {"cold": str(rng.choice(["knn", "map"]))}
    if settings["cold"] == "knn":
        return settings | {"neighbours": int(rng.choice([5, 10, 20, 50]))}
    return settings | {"ridge": round(log_uniform(rng, 0.01, 10.0), 4)}


def draw_network_cold(rng) -> dict[str, Any]:
    """FedNCF's network diverges at the rates of vectors."""
    settings, lr = draw_content_cold(rng), log_uniform(rng, 0.05, 1.0)
    scale = log_uniform(rng, 0.2, 2.0) / lr
    return settings | {"lr": round(lr, 4), "item_lr_scale": round(scale, 5)}


def draw_diffusion(rng, preset: str, neighbours: tuple[str, ...] = ()) -> dict[str, Any]:
    settings = draw_cold(rng) | {"backbone": str(rng.choice(["fedmf", "pfedrec"])), "preset": preset}
    if preset == "released":  # its optimiser is part of it
        return settings
    settings |= {
        "condition_dim": int(rng.choice([64, 128, 256])),
        "diffusion_lr": round(log_uniform(rng, 3e-4, 5e-3), 5),
        "server_epochs": int(rng.choice([1, 3])),
        "dropout": float(rng.choice([0.0, 0.1, 0.3])),
    }
    return settings | ({"neighbours": str(rng.choice(neighbours))} if neighbours else {})


def draw_ifedrec(rng) -> dict[str, Any]:
    lr, eta = log_uniform(rng, 0.05, 1.0), log_uniform(rng, 10.0, 200.0)
    pull = rng.uniform(0.1, 0.95)  # the stability limit is 1
    settings = {
        "lr": round(lr, 4),
        "eta": round(eta, 2),
        "attribute_lr": round(log_uniform(rng, 2e-3, 2e-2), 5),
        "attribute_steps": int(rng.choice([1, 3])),
        "negatives": int(rng.choice([2, 5, 10])),
        "dim": int(rng.choice([64, 128])),
    }
    return settings | {"reg": float(f"{pull * settings['dim'] / (2 * lr * eta):.3g}")}


ALONE = {
    "ease": lambda rng: {"l2": round(log_uniform(rng, 3.0, 3000.0), 1)},
    "mf": draw_central,
    "neumf": draw_central,
    "vbpr": functools.partial(draw_pairwise, l2=between(1e-6, 1e-2)),
    "two_tower": functools.partial(
        draw_pairwise, l2=between(1e-7, 1e-3), temperature=any_of(0.05, 0.1, 0.2), dropout=any_of(0.1, 0.3, 0.5)
    ),
    "bm3": functools.partial(
        draw_pairwise,
        l2=between(1e-6, 1e-2),
        dropout=any_of(0.3, 0.5),
        layers=any_of(1, 2),
        content_weight=any_of(1, 2),
    ),
    "mgcn": functools.partial(draw_pairwise, l2=between(1e-6, 1e-3), contrast_weight=any_of(0.001, 0.01, 0.1)),
    "pgl": functools.partial(draw_pairwise, mode=any_of("local", "global"), layers=any_of(1, 2)),
    "cofedrec": draw_cofedrec,
    "cofedrec_anchors": draw_cofedrec,
    "feddae": draw_feddae,
    "ipfedrec": draw_ifedrec,
    "ifedncf": draw_ifedrec,
    "cs_fcf": draw_content_cold,
    "cs_fedncf": draw_network_cold,
    **{
        f"mdifffr-{preset}": functools.partial(draw_diffusion, preset=preset)
        for preset in ("paper", "released", "proper")
    },
    "mdifffr-neighbours": functools.partial(
        draw_diffusion, preset="proper", neighbours=("10", "20", "3,10,30", "3,10,30,100")
    ),
}
"""Methods that share no settings with the others; MDiffFR is named with its preset, or with what `proper` is told."""


WITHOUT_RANGES = {"heater", "gar", "aldi", "cs_diffrec"}


def recipe_name(dataset: str, method: str) -> str:
    return f"{'_'.join([dataset, method]).translate(PLAIN)}.flags"


def recipe_settings(dataset: str, method: str) -> dict[str, str]:
    """The settings of a data set's recipe, not yet of their types.

    Raises:
        UsageError: no such recipe.
    """
    path = Path(__file__).parent / recipe_name(dataset, method)
    if not path.exists():
        raise app.UsageError(f"--start_from={dataset}: no {path}; leave {method} out, or run it without --start_from")
    said = [line.removeprefix("--set=") for line in path.read_text().splitlines() if line.startswith("--set=")]
    return dict(line.split("=", 1) for line in said)


def run_trial(dataset: str, method: str, trial: int, seed: int, settings: dict, data: tuple) -> dict[str, Any]:
    config = run.RunConfig(
        method=method.split("-")[0], settings=settings, data_dir=FLAGS.data_dir, seed=seed,
        eval_every=EVAL_EVERY, patience=FLAGS.patience, max_buckets=2, **protocol_of(dataset, method),
    )  # fmt: skip
    said = judge(config, data)
    if said.pop("status") == run.STOPPED:
        raise SystemExit(75)  # a half trial is no trial
    line = {"dataset": dataset, "method": method, "trial": trial, "seed": seed, "settings": settings}
    return line | {"rounds": config.rounds, "patience": config.patience} | said


def by_trial(lines: list[dict[str, Any]]) -> dict[int, list[dict[str, Any]]]:
    """The lines of one data set and method, by trial."""
    found: dict[int, dict[int, dict[str, Any]]] = {}
    for line in lines:
        found.setdefault(line["trial"], {})[line["seed"]] = line
    return {trial: list(by_seed.values()) for trial, by_seed in found.items()}


def finalists(lines: list[dict[str, Any]]) -> list[int]:
    """The trials that go on to all seeds."""
    score = {line["trial"]: line["score"] for line in lines if line["seed"] == SEEDS[0] and "error" not in line}
    return sorted(score, key=score.__getitem__, reverse=True)[: FLAGS.finalists]


def choose(folder: Path) -> None:
    """Writes the chosen settings of every data set and method as flagfiles."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for path in sorted(folder.glob("*.jsonl")):
        for line in read_lines(path):
            found.setdefault((line["dataset"], line["method"]), []).append(line)
    for (dataset, method), lines in sorted(found.items()):
        trials = by_trial(lines)
        # of a search that was cut short before its finalists, the best at the first seed
        complete = [t for t in trials.values() if len(t) == len(SEEDS)] or list(trials.values())
        best = max(complete, key=lambda t: np.mean([x["score"] for x in t]))
        if all("error" in line for line in best):
            print(f"{method} on {dataset}: no flagfile, every trial failed, the last with: {lines[-1]['error']}")
        else:
            write_flags(dataset, method, best, trials)


def write_flags(dataset: str, method: str, best: list[dict[str, Any]], trials: dict[int, list[dict[str, Any]]]) -> None:
    protocol = {"patience": FLAGS.patience, **protocol_of(dataset, method)}
    protocol |= {name: best[0][name] for name in ("rounds", "patience") if name in best[0]}
    start = trials.get(0, [{}])[0].get("start_from")
    chosen = f"the best on validation of {len(trials)} random settings"
    if start:
        first = "an earlier recipe's" if start == dataset else f"{start}'s"
        chosen = f"the best on validation of {len(trials)} settings, the first {first}"
        chosen = chosen if len(trials) > 1 else f"{start}'s settings, the only ones tried"
    path = Path(FLAGS.flags_to) / recipe_name(dataset, method)
    scores = [line["score"] for line in best]
    spread = f"{min(scores):.3f} to {max(scores):.3f} over {len(best)} seeds" if len(best) > 1 else "one seed"
    said = f"{np.mean(scores):.3f} ({spread})"
    lines = [
        f"# {method} on {dataset}: {chosen} (experiments/tune.py).",
        f"#   python launch.py --flagfile=experiments/{path.name} --data_dir=DATA --workdir=runs/{path.stem}",
        f"# Expected: validation {protocol['select_metric']} near {said}, best at round "
        f"{max(line.get('best_round', 0) for line in best)} or before; test figures are in BUILD_NOTES.md.",
        f"--method={method.split('-')[0]}",
        *(f"--{name}={value}" for name, value in protocol.items() if name not in ("ks", "filters", "patience")),
        *(f"--filter={name}={value}" for name, value in protocol.get("filters", {}).items()),
        *([f"--k={','.join(map(str, protocol['ks']))}"] if "ks" in protocol else []),
        f"--eval_every={EVAL_EVERY}",
        f"--patience={protocol['patience']}",
        *(f"--set={name}={value}" for name, value in best[0]["settings"].items()),
    ]
    path.write_text("\n".join(lines) + "\n")
    print(f"{path}: validation {said}, best of {len(trials)}")


def check_same_search(path: Path) -> None:
    """That the trials of a file were made as these will be.

    Raises:
        UsageError: for other rounds, patience or start_from; names both.
    """
    for line in read_lines(path):
        due = {"rounds": protocol_of(line["dataset"], line["method"])["rounds"], "patience": FLAGS.patience}
        for name, value in {**due, "start_from": FLAGS.start_from}.items():
            if line.get(name, value) != value:
                raise app.UsageError(f"{path}: its trials have --{name}={line[name]}, not {value}; use another --out")


def main(argv) -> None:
    folder = Path(FLAGS.out)
    folder.mkdir(parents=True, exist_ok=True)
    if FLAGS.choose:
        return choose(folder)
    logging.set_verbosity(logging.WARNING)  # JAX tells of accelerators that are not there
    jax.config.update("jax_num_cpu_devices", FLAGS.cpu_devices)
    without = sorted(WITHOUT_RANGES & set(FLAGS.methods))
    if without:
        raise app.UsageError(f"--methods: {', '.join(without)} have no ranges here; use launch.py --mode=search")
    first = {m: recipe_settings(FLAGS.start_from, m) for m in FLAGS.methods} if FLAGS.start_from else {}
    part, parts = map(int, FLAGS.shard.split("/"))
    data = {name: run.load_data(run.RunConfig(data_dir=FLAGS.data_dir, **protocol_of(name))) for name in FLAGS.datasets}
    path = folder / f"{part}.jsonl"
    check_same_search(path)
    # a kill may have left the last line incomplete: it would be damaged by what comes after it
    write_lines(path, read_lines(path))

    def attempt(dataset: str, method: str, trial: int, seed: int) -> None:
        mine = [line for line in read_lines(path) if (line["dataset"], line["method"]) == (dataset, method)]
        if (trial, seed) in {(line["trial"], line["seed"]) for line in mine}:
            return
        taken = [line["seconds"] for line in mine if line["seed"] == SEEDS[0]]
        if FLAGS.hours is not None and seed == SEEDS[0] and taken and sum(taken) >= 3600 * FLAGS.hours:
            return
        # a finalist is what was tried, whatever this file draws by now
        tried = next((line["settings"] for line in mine if line["trial"] == trial), None)
        tried = tried or (first.get(method) if trial == 0 else None)
        line = run_trial(dataset, method, trial, seed, tried or draw_settings(method, trial), data[dataset])
        line["start_from"] = FLAGS.start_from
        with path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        said = line.get("error") or f"{line['score']:.4f}"
        print(dataset, method, trial, seed, said, f"{line['seconds']:.1f} s", flush=True)

    pairs = [(d, m) for m in FLAGS.methods for d in FLAGS.datasets][part::parts]
    # trial by trial over all pairs, so that a search that is cut short has searched all of them alike
    for trial in range(FLAGS.trials):
        for dataset, method in pairs:
            attempt(dataset, method, trial, SEEDS[0])
    for dataset, method in pairs:
        lines = [line for line in read_lines(path) if (line["dataset"], line["method"]) == (dataset, method)]
        for trial in finalists(lines):
            for seed in SEEDS[1:]:
                attempt(dataset, method, trial, seed)


if __name__ == "__main__":
    app.run(main)
