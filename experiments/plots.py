"""The multimodal papers' analyses of finished runs, as plots.

    python experiments/plots.py --data_dir=DATA --out=runs/plots runs/ku_fedvlr_fedrap runs/ku_fedrap

Workdirs are those of single runs (launch.py; with a checkpoint). All of them are compared by users' activity and by
loss; each one with a router also gets its weights by user and by activity, and a map of item vectors. What is drawn of
a model is its newest checkpoint's.

    users.png                   how many users have how many training items
    loss.png                    training loss by round
    activity.png                HR and NDCG by activity
    <run>_router.png, .csv      weights of every user's router; their spread among users of like activity
    <run>_items.png             the two main axes of features, ID vectors, views, and what chosen users make of them
"""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from absl import app, flags, logging

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from fedjax_rec import compare, load_run
from fedjax_rec.item_sources.views import ID
from fedjax_rec.validate import in_one_line
from fedjax_rec.workdir import UsageError

FLAGS = flags.FLAGS
flags.DEFINE_string("data_dir", None, "Folder that holds the data set folders, if it has moved since the runs.")
flags.DEFINE_string("out", "runs/plots", "Folder of the plots.")
flags.DEFINE_integer("groups", 4, "Groups of users by activity.")
flags.DEFINE_integer("users", 3, "Users whose own item vectors are drawn: the most and least active, and between.")


def activity_groups(length: np.ndarray, count: int) -> tuple[np.ndarray, list[str]]:
    """Group of each user by training items (equal sizes as far as ties allow), and the groups' labels."""
    edges = np.unique(np.quantile(length, np.linspace(0, 1, count + 1)[1:-1]))
    group = np.searchsorted(edges, length, side="left")
    _, group = np.unique(group, return_inverse=True)
    members = [length[group == g] for g in range(group.max() + 1)]
    return group, [f"{m.min()}-{m.max()}\n(n={len(m)})" for m in members]


def main_axes(vectors: np.ndarray) -> np.ndarray:
    """The two principal components, [n, 2]; zeros where there is nothing to see."""
    centred = vectors - vectors.mean(0)
    left, size, _ = np.linalg.svd(centred, full_matrices=False)
    return left[:, :2] * size[:2]


def users_plot(path: Path, clients: dict[str, Any]) -> None:
    figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
    length = clients["train_items"]
    axis.hist(length, bins=np.geomspace(max(length.min(), 1), length.max() + 1, 30))
    axis.set(xscale="log", xlabel="training items of a user", ylabel="users", title="users by activity")
    _save(figure, path)


def loss_plot(path: Path, workdirs: list[Path]) -> None:
    figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
    for workdir in workdirs:
        lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
        axis.plot([line["round"] for line in lines], [line["loss"] for line in lines], label=compare.label(workdir))
    axis.set(xlabel="round", ylabel="mean training loss", title="loss")
    axis.legend()
    _save(figure, path)


def activity_plot(path: Path, tables: dict[str, Any], metrics: list[str]) -> None:
    """Bars by activity group, a colour per run."""
    figure, axes = plt.subplots(1, len(metrics), figsize=(5.5 * len(metrics), 4), layout="constrained")
    width = 0.8 / len(tables)
    for axis, metric in zip(np.atleast_1d(axes), metrics, strict=True):
        for i, (name, clients) in enumerate(tables.items()):
            group, labels = activity_groups(clients["train_items"], FLAGS.groups)
            values = [clients[metric][group == g] for g in range(len(labels))]
            error = [np.nanstd(v) / np.sqrt(max(np.isfinite(v).sum(), 1)) for v in values]
            axis.bar(np.arange(len(labels)) + i * width, [np.nanmean(v) for v in values], width, yerr=error, label=name)
        axis.set_xticks(np.arange(len(labels)) + 0.4 - width / 2, labels)
        axis.set(xlabel="training items of the user", ylabel=f"test {metric} (bar: standard error)")
        axis.legend()
    _save(figure, path)


def router_plot(path: Path, weights: np.ndarray, operators: list[str], length: np.ndarray) -> None:
    """Users sorted by their first weight; mean and spread of each weight by activity."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    ordered = weights[np.lexsort(weights.T[::-1])]
    left.stackplot(np.arange(len(ordered)), ordered.T, labels=operators)
    left.set(xlabel="user, by weight", ylabel="router weight", ylim=(0, 1), title="preference of every user")
    left.legend(loc="lower left")
    group, labels = activity_groups(length, FLAGS.groups)
    for v, name in enumerate(operators):
        mean = [weights[group == g, v].mean() for g in range(len(labels))]
        spread = [weights[group == g, v].std() for g in range(len(labels))]
        right.errorbar(np.arange(len(labels)) + 0.1 * v, mean, yerr=spread, fmt="o-", capsize=3, label=name)
    right.set_xticks(np.arange(len(labels)), labels)
    right.set(xlabel="training items of the user", ylabel="router weight (bar: standard deviation over users)")
    right.set_title("heterogeneity by activity")
    _save(figure, path)


def items_plot(path: Path, run, weights: np.ndarray, operators: list[str], length: np.ndarray) -> None:
    """Each cloud on its own two main axes, coloured by the popularity of the items."""
    private = run.state.server.private
    if "trainable" in private:
        clouds = {name: np.asarray(v) for name, v in private["features"].items()}
        clouds["ID vectors"] = np.asarray(private["trainable"][ID])
    else:  # update=parameters
        clouds = {name: np.asarray(v) for name, v in run.shared["guide"].items()}
    if "views" in run.shared:
        views = np.asarray(run.shared["views"])
        clouds |= {f"view {name}": views[:, v] for v, name in enumerate(operators)}
        order = np.argsort(length)
        for user in order[np.linspace(0, len(order) - 1, FLAGS.users).astype(int)]:
            share = ", ".join(f"{w:.2f}" for w in weights[user])
            clouds[f"user with {length[user]} items\nweights {share}"] = np.einsum("v,nvd->nd", weights[user], views)
    split = run.experiment.split
    popularity = np.log1p(np.bincount(split.train.item, minlength=split.num_items))
    columns = 4
    rows = -(-len(clouds) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(3.2 * columns, 3.2 * rows), layout="constrained", squeeze=False)
    for axis, (name, vectors) in zip(axes.flat, clouds.items(), strict=False):
        drawn = axis.scatter(*main_axes(vectors).T, c=popularity, s=6, cmap="viridis")
        axis.set_title(name, fontsize=9)
        axis.tick_params(labelsize=6)
    for axis in axes.flat[len(clouds) :]:
        axis.axis("off")
    figure.colorbar(drawn, ax=axes, label="log(1 + training interactions)", shrink=0.6)
    _save(figure, path)


def _save(figure, path: Path) -> None:
    figure.savefig(path, dpi=120)
    plt.close(figure)
    print(path)


def main(argv) -> int:
    """The plots, or bad usage and bad input as one line on standard error."""
    return in_one_line("plots.py", lambda: draw([Path(name) for name in argv[1:]]))


def draw(workdirs: Sequence[Path]) -> None:
    """All plots of the runs."""
    logging.set_verbosity(logging.WARNING)
    if not workdirs:
        raise UsageError("no workdir given, expected those of finished runs")
    tables = {}
    for workdir in workdirs:
        if not (workdir / "summary.json").exists():
            raise UsageError(f"{workdir}: holds no finished run; give the workdir of one seed")
        name = compare.label(workdir)
        if name in tables:
            raise UsageError(f"{workdir}: the second run called {name}, and files are named so; rename one's folder")
        tables[name] = compare.read_per_client(workdir)
    out = Path(FLAGS.out)
    out.mkdir(parents=True, exist_ok=True)
    first = next(iter(tables.values()))
    known = [name for name in first if name.startswith(("HR@", "NDCG@")) and all(name in of for of in tables.values())]
    if not known:
        raise UsageError("the runs have no cut-off in common: run them with the same --k, or plot them apart")
    users_plot(out / "users.png", first)
    loss_plot(out / "loss.png", workdirs)
    activity_plot(out / "activity.png", tables, known[-2:])
    for workdir in workdirs:
        run = load_run(workdir, data_dir=FLAGS.data_dir)
        said = run.explain()
        if "router" not in said:
            continue
        operators, weights = list(run.experiment.method.config.operators), said["router"]
        length = tables[compare.label(workdir)]["train_items"]
        with (out / f"{compare.label(workdir)}_router.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["user_id", "train_items", *operators])
            ids = run.experiment.interactions.user_ids.tolist()
            writer.writerows([i, n, *w] for i, n, w in zip(ids, length, weights.tolist(), strict=True))
        router_plot(out / f"{compare.label(workdir)}_router.png", weights, operators, length)
        items_plot(out / f"{compare.label(workdir)}_items.png", run, weights, operators, length)


if __name__ == "__main__":
    app.run(main)
