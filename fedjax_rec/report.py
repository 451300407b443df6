"""Results for people: a table on the terminal and plots in the workdir."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fedjax_rec import metrics
from fedjax_rec.privacy import accounting
from fedjax_rec.workdir import read_json, read_lines, strict

PARTS = ("test", "test_seen", "test_unseen")


def table(summary: Mapping[str, Any]) -> str:
    """The selected round beside the training-free rankers."""
    test, rankers = summary["test"], summary["reference_rankers"]
    hits = "Recall@" if summary["split"] == "cold_items" else "HR@"  # cold items: a client may have several targets
    several = any(_recall_tells(said["test"]) for said in (summary, *rankers.values()))
    families = (hits, "NDCG@", "NDCG_released@", *(["Recall@"] if several else []))
    selected_by = summary.get("select_metric", "").split("+")
    chosen = [n for n in test if n.startswith(families) or n in selected_by]
    parted = next(n for n in chosen if n.startswith(hits))
    head = ["", *chosen, "seen " + parted, "unseen " + parted]
    rows = [
        _row(f"{summary['method']} (round {summary.get('round') or summary['best_round']})", summary, chosen, parted)
    ]
    rows += [_row(name, said, chosen, parted) for name, said in rankers.items()]
    widths = [max(len(r[i]) for r in [head, *rows]) for i in range(len(head))]
    lines = [
        "  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(r, widths, strict=True)))
        for r in [head, *rows]
    ]
    beside = [n for n in test if n.startswith(("Coverage", "PopularityBias", "MRR")) and n not in chosen]
    known = [n for n in beside if test[n] is not None]
    extra = ", ".join(f"{n} {test[n]:.3f}" for n in known)
    title = (
        f"{summary['dataset']}, protocol {summary['protocol']}, {summary['ranking']} ranking, "
        f"{test['clients']} clients, seed {summary['seed']}"
    )
    selected, judged = summary.get("selected_round"), summary.get("judged_round")
    other = [f"Judged is round {judged}, the last one kept; selected on validation was round {selected}."]
    notes = other if selected is not None and selected != judged else []
    leaks = [f"LEAK: {leak}" for leak in summary["leaks"]]
    privacy = accounting.describe(summary["privacy"]) if "privacy" in summary else []
    return "\n".join(["", title, lines[0], "-" * len(lines[0]), *lines[1:], extra, *notes, *leaks, *privacy])


def _recall_tells(test: Mapping[str, Any]) -> bool:
    """Whether users have several targets: with one at most, Recall@k is HR@k."""
    known = strict(test)
    hits = {name: value for name, value in known.items() if name.startswith("HR@")}
    return any(known.get(name.replace("HR@", "Recall@"), value) != value for name, value in hits.items())


def _row(name: str, said: Mapping[str, Any], chosen: list[str], parted: str) -> list[str]:
    show = lambda value: f"{value:.4f}" if value is not None and np.isfinite(value) else "-"  # JSON has no NaN
    cells = [show(said["test"][n]) for n in chosen]
    return [name, *cells, show(said["test_seen"][parted]), show(said["test_unseen"][parted])]


def plots(workdir: str | os.PathLike) -> list[Path]:
    """Draws loss, metrics by round, and metrics by client activity into workdir/plots.

    Returns:
        the files; none, with a hint on standard output, where matplotlib is not installed.
    """
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        print("no plots: matplotlib is missing (pip install 'fedjax_rec[plots]')")
        return []
    workdir = Path(workdir)
    summary = read_json(workdir / "summary.json")
    lines = read_lines(workdir / "metrics.jsonl")
    clients = np.load(workdir / "per_client.npz")
    folder = workdir / "plots"
    folder.mkdir(exist_ok=True)
    made = []
    for name, draw in {"training": _training, "activity": _activity, "ranks": _rank_curve}.items():
        figure = draw(plt, summary, lines, clients)
        figure.savefig(folder / f"{name}.png", dpi=120)
        plt.close(figure)
        made.append(folder / f"{name}.png")
    return made


def _training(plt, summary, lines, clients):
    """Loss, and the selection metric on validation and test, by round."""
    metric = summary["select_metric"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    left.plot([line["round"] for line in lines], [line["loss"] for line in lines])
    left.set(xlabel="round", ylabel="mean training loss", title=f"{summary['method']} on {summary['dataset']}")
    evaluated = [line for line in lines if "valid" in line]
    for part in ("valid", "test"):
        right.plot(
            [e["round"] for e in evaluated], [metrics.read(e[part], metric) for e in evaluated], label=part, marker="."
        )
    for name in ("popularity", "random"):
        level = metrics.read(summary["reference_rankers"][name]["test"], metric)
        right.axhline(level, linestyle=":", color="grey")
        right.annotate(f"{name} (test)", (lines[0]["round"], level), fontsize=8, va="bottom")
    right.axvline(summary["best_round"], color="black", linewidth=0.5)
    right.set(xlabel="round", ylabel=metric, title=f"selected: round {summary['best_round']}")
    right.legend()
    return figure


def _activity(plt, summary, lines, clients):
    """The selection metric by the number of a client's training items."""
    metric = summary["select_metric"]
    of_client = metrics.read(clients, metric)
    known = np.isfinite(of_client)
    length, value = clients["train_items"][known], of_client[known]
    edges = np.unique(np.quantile(length, np.linspace(0, 1, 6)))
    group = np.clip(np.searchsorted(edges, length, side="right") - 1, 0, max(len(edges) - 2, 0))
    labels, means, errors = [], [], []
    for g in range(max(len(edges) - 1, 1)):
        members = value[group == g]
        if not len(members):
            continue
        labels.append(f"{length[group == g].min()}-{length[group == g].max()}\n(n={len(members)})")
        means.append(members.mean())
        errors.append(members.std() / np.sqrt(len(members)))
    figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
    axis.bar(labels, means, yerr=errors, capsize=3)
    axis.set(xlabel="training items of the client", ylabel=f"test {metric} (bar: standard error)")
    axis.set_title("clients by activity")
    return figure


def _rank_curve(plt, summary, lines, clients):
    """Share of clients whose (best) test item is within the first k, for seen and unseen targets."""
    figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
    seen, ranks = clients["test_seen"], clients["test_rank"]
    for label, mask in {"seen in training": seen, "unseen in training": ~seen}.items():
        chosen = np.sort(ranks[mask & np.isfinite(ranks)])
        if len(chosen):
            axis.step(chosen, np.arange(1, len(chosen) + 1) / len(chosen), label=f"{label} (n={len(chosen)})")
    axis.set(xscale="log", xlabel="rank of the test item", ylabel="share of targets", title="ranks of test items")
    axis.legend()
    return figure
