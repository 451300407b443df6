"""Round throughput of several methods and populations: one table, one JSON file.

    python experiments/bench_rounds.py --data_dir=DATA --out=runs/bench

Cases: the methods on ML-100K, PFedRec and FedMF on ML-1M, and FedMF on synthetic populations of growing size
(20 interactions each, 50,000 items), where the time per interaction should stay level. The group `fusion`: each
client model with and without server-made views at equal settings, on KU, and the views of 10,000 items for growing
populations, where publishing and the server's step should not depend on the clients.
"""

from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np
from absl import app, flags, logging

from fedjax_rec import benchmark, run
from fedjax_rec.backbones.fused import BACKBONES
from fedjax_rec.data import splits, synthetic
from fedjax_rec.data.features import Features

FLAGS = flags.FLAGS
flags.DEFINE_string("data_dir", None, "Folder that holds the data set folders; without it only populations run.")
flags.DEFINE_string("out", "runs/bench", "Folder of the results.")
flags.DEFINE_list("cases", ["ml-100k", "ml-1m", "populations", "fusion"], "Which groups to run.")
flags.DEFINE_list("methods", ["pfedrec", "fedmf", "fedncf", "fedrap"], "Methods on ML-100K.")
flags.DEFINE_list("populations", ["1000", "10000", "100000", "1000000"], "Clients of the synthetic populations.")
flags.DEFINE_integer("rounds", 20, "Timed rounds.")
flags.DEFINE_integer("cpu_devices", 2, "Virtual CPU devices.")
flags.DEFINE_integer("block_size", 0, "Clients per block; 0 chooses.")

NUM_ITEMS, FUSED_ITEMS, PER_USER, FEATURE_DIM = 50_000, 10_000, 20, 512
FUSION_CLIENTS = (1_000, 100_000)
FUSION_SETTINGS = {"dim": 64, "local_epochs": 5, "redraw": "epoch", "negatives": 1, "batch_size": 2048, "lr": 0.1}


def population(num_users: int, num_items: int = NUM_ITEMS, modalities: tuple[str, ...] = ()) -> tuple:
    """(interactions, split, features) of a population whose pairs are all training pairs but two of each user."""
    interactions = synthetic.population(num_users, num_items, PER_USER + 2)
    rng, present = np.random.default_rng(0), np.ones(num_items, bool)
    draw = lambda: Features(rng.normal(size=(num_items, FEATURE_DIM)).astype(np.float32), present, "drawn")
    return interactions, splits.leave_one_out(interactions), {name: draw() for name in modalities}


def cases():
    """(label, configuration, data, rounds)."""
    common = {"block_size": FLAGS.block_size}
    if FLAGS.data_dir and "ml-100k" in FLAGS.cases:
        for method in FLAGS.methods:
            config = run.RunConfig(method=method, dataset="ml-100k", data_dir=FLAGS.data_dir, **common)
            yield f"{method} ml-100k", config, None, FLAGS.rounds
    if FLAGS.data_dir and "ml-1m" in FLAGS.cases:
        for method in ("pfedrec", "fedmf"):
            config = run.RunConfig(method=method, dataset="ml-1m", data_dir=FLAGS.data_dir, **common)
            yield f"{method} ml-1m", config, None, min(FLAGS.rounds, 10)
    if "populations" in FLAGS.cases:
        for num_users in map(int, FLAGS.populations):
            config = run.RunConfig(
                method="fedmf", dataset=f"population-{num_users}", eval_clients=min(num_users, 1000), **common
            )
            rounds = FLAGS.rounds if num_users <= 10_000 else 5  # short ones are noisy
            yield f"fedmf {num_users:,} clients", config, population(num_users), rounds
    if "fusion" in FLAGS.cases:
        yield from fusion_cases(common)


def fusion_cases(common):
    for backbone in BACKBONES if FLAGS.data_dir else ():
        ku = {"dataset": "ku", "split": "given", "data_dir": FLAGS.data_dir, **common}
        vanilla = run.RunConfig(method=backbone, settings=FUSION_SETTINGS, **ku)
        yield f"{backbone} ku", vanilla, None, FLAGS.rounds
        views = {**FUSION_SETTINGS, "backbone": backbone}
        yield f"fedvlr-{backbone} ku", run.RunConfig(method="fedvlr", settings=views, **ku), None, FLAGS.rounds
    for num_users in FUSION_CLIENTS:
        config = run.RunConfig(
            method="fedvlr",
            settings={**FUSION_SETTINGS, "dim": 16},
            dataset=f"views-{num_users}",
            eval_clients=1000,
            **common,
        )
        data = population(num_users, FUSED_ITEMS, ("image", "text"))
        yield f"fedvlr {num_users:,} with views", config, data, 5


def main(argv) -> None:
    logging.set_verbosity(logging.WARNING)  # JAX tells of accelerators that are not there
    jax.config.update("jax_num_cpu_devices", FLAGS.cpu_devices)
    folder = Path(FLAGS.out)
    folder.mkdir(parents=True, exist_ok=True)
    head = [
        "case",
        "clients",
        "samples",
        "round(s)",
        "publish(s)",
        "clients(s)",
        "server(s)",
        "clients/s",
        "ns/sample",
        "down(B)",
        "up(B)",
    ]
    head += ["NumPy loop", "evaluate (s)", "compile (s)"]
    print("| " + " | ".join(head) + " |\n" + "|" + "---|" * len(head))
    results = {}
    for label, config, data, rounds in cases():
        result = results[label] = benchmark.run(config, rounds=rounds, data=data)
        median, loop = result["round_s"]["median"], result["numpy_loop_round_s"]
        cells = [
            label, f"{result['clients']:,}", f"{result['samples_per_round']:,}", f"{median:.4f}",
            *(f"{result['phases_s'][name]:.4f}" for name in ("publish", "clients", "server_step")),
            f"{result['clients_per_s']:,.0f}", f"{1e9 * median / result['samples_per_round']:.0f}",
            *(f"{result['bytes'][way]:,.0f}" for way in ("down", "up")),
            f"{loop:.3f} s, {loop / median:.1f} x" if loop else "-",
            f"{result['evaluate_s']['again']:.4f}", f"{result['compile_s']:.1f}",
        ]  # fmt: skip
        print("| " + " | ".join(cells) + " |", flush=True)
        (folder / "bench.json").write_text(json.dumps(results, indent=1))
    per_sample = [r["round_s"]["median"] / r["samples_per_round"] for k, r in results.items() if "clients" in k]
    if per_sample:
        print(f"\ntime per sample over the populations: largest / smallest = {max(per_sample) / min(per_sample):.2f}")
    print(f"device: {benchmark.device_name()}")


if __name__ == "__main__":
    app.run(main)
