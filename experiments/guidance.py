"""What guidance does to whom: FedRKG's analyses of finished runs, as Markdown and plots.

    python experiments/guidance.py --data_dir=DATA --out=runs/guidance runs/fedrkg runs/fedrap

Workdirs are those of single runs with a checkpoint, the first that of fedrkg (guidance ag or kg) or of any method where
only the parts for all methods are wanted. Written to OUT/guidance.md and beside it:

    convergence.png    validation metric by round, guidance rounds marked
    groups             test metrics of cold and warm users of every run, the share --share with the fewest and the most
                       training interactions, with the paired difference to the first run (FedRKG, Figure 5)
    effect             FedRKG: its clients go on to the next guidance round and are judged right before and after it,
                       under Knowledge and (of an ag run) Adaptive Guidance: relative change for --group distinct users
                       and as many followers, and the share of users who gained (Table 4)
    gates              of an ag run: relative change of the gate from distinct users to followers on popular items, and
                       from cold to warm users on all items (Tables D.3 and D.4)

Popular items are the --share of items with the most training interactions; followers are the users with the largest
share of their training interactions among them, distinct users those with the smallest. The paper draws 100 of each
group at random and does not say how the groups are bounded.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from absl import app, flags, logging

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from fedjax_rec import compare, load_run, metrics
from fedjax_rec.data.clients import row_offsets
from fedjax_rec.experiment import Experiment, prepare
from fedjax_rec.methods import make_config
from fedjax_rec.methods.fedrkg import gate_values, is_guidance_round
from fedjax_rec.validate import between, in_one_line, one_of, positive
from fedjax_rec.workdir import UsageError, read_config, read_lines

FLAGS = flags.FLAGS
flags.DEFINE_string("data_dir", None, "Folder that holds the data set folders, if it has moved since the runs.")
flags.DEFINE_string("out", "runs/guidance", "Folder of guidance.md and the plot.")
flags.DEFINE_list("k", ["10", "50"], "Cut-offs; those of the runs, or some of them.")
flags.DEFINE_integer("group", 100, "Distinct users and followers, so many of each.")
flags.DEFINE_float("share", 0.3, "Popular items; cold and warm users.")


def names() -> list[str]:
    return [f"{metric}@{k}" for k in FLAGS.k for metric in ("HR", "NDCG")]


def convergence(path: Path, workdirs: list[Path]) -> None:
    """Validation by round, one line per run; thin vertical lines where the first run is guided."""
    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    last = 0
    for workdir in workdirs:
        metric = read_config(workdir)["select_metric"]
        told = [line for line in read_lines(workdir / "metrics.jsonl") if "valid" in line]
        rounds = [line["round"] for line in told]
        values = [metrics.read(line["valid"], metric) for line in told]
        axis.plot(rounds, values, label=f"{compare.label(workdir)}, {metric}")
        last = max(last, *rounds)
    settings = guidance_of(workdirs[0])
    if settings is not None:
        for round_ in range(last):
            if is_guidance_round(settings, round_):
                axis.axvline(round_ + 1, color="grey", linewidth=0.5, alpha=0.4, zorder=0)
    axis.set(xlabel="round (grey: guidance)", ylabel="validation")
    axis.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def guidance_of(workdir: Path):
    """The settings of a FedRKG run that guides its clients, None for any other."""
    config = read_config(workdir)
    settings = make_config("fedrkg", config["settings"]) if config["method"] == "fedrkg" else None
    return settings if settings and settings.guidance not in ("personal_only", "local_only") else None


def by_activity(length: np.ndarray) -> dict[str, np.ndarray]:
    """The --share of users with the fewest and with the most training items."""
    order = np.argsort(length, kind="stable")
    count = max(round(FLAGS.share * len(order)), 1)
    return {"cold": order[:count], "warm": order[-count:]}


def cold_and_warm(workdirs: list[Path]) -> str:
    """Metrics of the users with the fewest and the most training items, by run."""
    held = [compare.read_per_client(workdir) for workdir in workdirs]
    for name in names():
        one_of("metric", name, sorted(set.intersection(*map(set, held))))
    groups = by_activity(held[0]["train_items"])
    rows = []
    for group, users in groups.items():
        for workdir, clients in zip(workdirs, held, strict=True):
            values = [clients[name][users] for name in names()]
            apart = [
                "" if clients is held[0] else compare.paired(v[None], held[0][name][users][None])
                for v, name in zip(values, names(), strict=True)
            ]
            means = [f"{np.nanmean(v):.4f}" for v in values]
            rows.append([f"{group} ({len(users)})", compare.label(workdir), *means, *apart])
    head = ["users", "run", *names(), *(f"{name} - {compare.label(workdirs[0])}" for name in names())]
    title = f"### Cold and warm users: {FLAGS.share:.0%} with the fewest and the most items"
    return compare.markdown(title, head, rows)


@dataclasses.dataclass(frozen=True)
class Groups:
    """Users [n] by what they take, and the popular items."""

    distinct: np.ndarray
    followers: np.ndarray
    popular: np.ndarray


def groups_of(ready: Experiment) -> Groups:
    split = ready.split
    taken = np.bincount(split.train.item, minlength=split.num_items)
    popular = np.argsort(-taken, kind="stable")[: max(round(FLAGS.share * split.num_items), 1)]
    in_them = np.isin(split.train.item, popular)
    length = np.diff(row_offsets(split.train.user, split.num_users))
    share = np.bincount(split.train.user, weights=in_them, minlength=split.num_users) / np.maximum(length, 1)
    users = np.flatnonzero(length > 0)
    order = users[np.argsort(share[users], kind="stable")]
    count = min(FLAGS.group, len(order) // 2)
    return Groups(order[:count], order[-count:], popular)


def variant(ready: Experiment, guidance: str) -> Experiment:
    """The same run under another rule of guidance, with no guidance but on demand."""
    settings = {**dataclasses.asdict(ready.method.config), "guidance": guidance}
    made = prepare(
        dataclasses.replace(ready.config, settings=settings), (ready.interactions, ready.split, ready.features)
    )
    quiet = made.method._replace(exchange=made.method.exchange._replace(due=lambda round_: False))
    engine = dataclasses.replace(made.engine, method=quiet)
    return dataclasses.replace(made, engine=engine, evaluator=dataclasses.replace(made.evaluator, engine=engine))


def effect(workdir: Path) -> str:
    """Right before and right after the next guidance round."""
    run = load_run(workdir, data_dir=FLAGS.data_dir)
    settings = run.experiment.method.config
    groups = groups_of(run.experiment)
    due = next(r for r in range(run.round, run.round + 2 * settings.interval + 2) if is_guidance_round(settings, r))
    # with a delay guidance comes first in its round: the state before it is that of the round before
    until = due if settings.delay else due + 1
    rules = ["kg", "ag"] if settings.guidance == "ag" else [settings.guidance]
    rows, gates = [], []
    for rule in rules:
        ready, key = variant(run.experiment, rule), run.experiment.key
        state = jax.tree.map(jnp.copy, run.state)
        if rule != "ag":
            state = state.replace(clients={role: v for role, v in state.clients.items() if role != "gate"})
        for round_ in range(run.round, until):
            users = ready.cohort_users(round_)
            cohort = None if users is None else ready.engine.cohort(users)
            state, _ = ready.engine.round(key, state, round_, cohort)
        before = judged(ready, state, until)
        own = np.array(state.clients["own_item"])  # a copy: the exchange gives its argument away
        state, _ = ready.engine.exchange(key, state, jnp.asarray(due, jnp.int32))
        after = judged(ready, state, until)
        rows += [[f"{rule.upper()}, {name}", *changes(before, after, users)] for name, users in of_interest(groups)]
        if rule == "ag":
            gates = [gate_table(ready, state, own, groups)]
    head = ["", *(f"{name}: before, after, change" for name in names()), "gained", "lost"]
    title = f"### Effect of the guidance of round {due + 1}, {compare.label(workdir)}"
    return "\n".join([compare.markdown(title, head, rows), *gates])


def of_interest(groups: Groups) -> list[tuple[str, np.ndarray]]:
    both = [(f"{len(groups.distinct)} distinct users", groups.distinct), ("as many followers", groups.followers)]
    return [*both, ("all users", np.array([], int))]


def judged(ready: Experiment, state, round_: int) -> dict[str, np.ndarray]:
    """Test metrics by user."""
    return metrics.per_client(ready.evaluator.ranks(ready.key, state, round_).test, tuple(map(int, FLAGS.k)))


def changes(before: dict, after: dict, users: np.ndarray) -> list[str]:
    """Means before and after with the relative change, and the shares of users whose target rose and fell."""
    pick = (lambda x: x[users]) if len(users) else (lambda x: x)
    cells = []
    for name in names():
        old, new = np.nanmean(pick(before[name])), np.nanmean(pick(after[name]))
        relative = f"{100 * (new / old - 1):+.1f} %" if old else "-"
        cells.append(f"{old:.4f}, {new:.4f}, {relative}")
    old, new = pick(before["MRR"]), pick(after["MRR"])
    counted = np.isfinite(old)
    risen, fallen = (new > old)[counted], (new < old)[counted]
    return [*cells, f"{risen.mean():.1%}", f"{fallen.mean():.1%}"]


def logit(gate: np.ndarray) -> np.ndarray:
    """A float32 gate that is shut or open to the last bit counts as one that is not quite."""
    gate = np.clip(gate, 2.0**-24, 1 - 2.0**-24)
    return np.log(gate) - np.log1p(-gate)


def gate_table(ready: Experiment, state, own: np.ndarray, groups: Groups) -> str:
    """Mean gates by group: as values, and as their logits."""
    guide = state.server.shared["guide"]
    gate = state.clients["gate"]
    of_user = jax.jit(lambda gate, own: gate_values(gate, own, guide))
    values = np.stack(
        [np.asarray(of_user(jax.tree.map(lambda x, u=u: x[u], gate), own[u])) for u in range(ready.split.num_users)]
    )
    length = np.diff(row_offsets(ready.split.train.user, ready.split.num_users))
    pairs = {
        "distinct users, followers: popular items": (groups.distinct, groups.followers, groups.popular),
        "cold users, warm users: all items": (*by_activity(length).values(), np.arange(ready.split.num_items)),
    }
    rows = []
    for name, (first, second, items) in pairs.items():
        cells = []
        for show in (lambda g: g, logit):
            one, two = (show(values[np.ix_(users, items)].astype(np.float64)).mean() for users in (first, second))
            cells += [f"{one:.5f}, {two:.5f}", f"{100 * (two - one) / one:+.2f} %" if one else "-"]
        rows.append([name, *cells])
    head = ["groups", "gate", "change", "logit", "change"]
    return compare.markdown("### Gates", head, rows)


def main(argv) -> int:
    """The analyses, or bad usage and bad input as one line on standard error."""
    return in_one_line("guidance.py", lambda: analyses([Path(name) for name in argv[1:]]))


def analyses(workdirs: Sequence[Path]) -> str:
    """All plots and the text."""
    logging.set_verbosity(logging.WARNING)  # checkpoints tell much
    if not workdirs:
        raise UsageError("no workdir given, expected those of finished runs, FedRKG's first")
    missing = [str(w) for w in workdirs if not (w / "per_client.npz").exists()]
    if missing:
        raise UsageError(f"{missing[0]}: no finished run there (no per_client.npz)")
    compare.check_comparable([compare.read_runs(workdir) for workdir in workdirs])
    positive("--group", FLAGS.group)
    between("--share", FLAGS.share, 0.0, 0.5)  # cold and warm users are apart
    out = Path(FLAGS.out)
    out.mkdir(parents=True, exist_ok=True)
    convergence(out / "convergence.png", workdirs)
    parts = [cold_and_warm(workdirs)]
    for workdir in workdirs:
        if guidance_of(workdir) is not None:
            parts.append(effect(workdir))
    (out / "guidance.md").write_text("\n".join(parts))
    return "\n".join(parts)


if __name__ == "__main__":
    app.run(main)
