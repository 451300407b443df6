"""What privacy costs and what it buys, as Markdown and plots.

    python experiments/privacy.py --data_dir=DATA --out=runs/privacy                       # the embedded data set
    python experiments/privacy.py --data_dir=DATA --dataset=filmtrust --parts=utility --set=backbone=pfedrec
    python experiments/privacy.py --parts=inversion,probes --out=runs/attacks runs/mdifffr runs/cs_fcf runs/ipfedrec

    utility     FedRKG under both of its mechanisms, by epsilon, and at its paper's sigma: utility.png (needs the extra
                `privacy`)
    paper       the epsilon of FedRKG's reported setting (sensitivity 0.1, sigma 0.001), by steps
    probes      what uploads tell of histories: FedMF's, with and without noise, and those of the workdirs
    inversion   of the rows that the workdirs' methods make for cold items: their features guessed from leaked pairs,
                beside the mean, from one draw of the rows and from the mean of --draws, as they are made anew in every
                round, with the share of noise in what is made: radar.png (MDiffFR's Figure 5), structure.png (its
                Figure 6)

Workdirs are those of single runs with a checkpoint, which inversion wants on a cold-item split; without any there is no
inversion. Their newest checkpoint is attacked; all leak the same items. Other runs are made, as workdirs in OUT, and
shown at the round with the largest validation NDCG at the last cut-off of --k; finished ones are not run again, so
another setting needs another OUT. Everything is also written to OUT/privacy.md. All configurations are checked before
the first run; bad ones are one line on standard error and exit code 2.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Sequence
from pathlib import Path

import jax
import matplotlib
import numpy as np
from absl import app, flags, logging

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from fedjax_rec import Run, compare, load_run, run
from fedjax_rec.item_sources import catalogue_of
from fedjax_rec.item_sources.cold import side_by_side
from fedjax_rec.privacy import accounting, attacks, mechanisms
from fedjax_rec.rounds import make_engine
from fedjax_rec.validate import in_one_line, one_of, positive
from fedjax_rec.workdir import read_config

FLAGS = flags.FLAGS
flags.DEFINE_string("data_dir", None, "Folder that holds the data set folders.")
flags.DEFINE_string("dataset", "synthetic", "Data set of the runs that are made here.")
flags.DEFINE_string("out", "runs/privacy", "Folder of the workdirs, privacy.md and the plots.")
flags.DEFINE_list("parts", ["utility", "paper", "probes", "inversion"], "Which parts.")
flags.DEFINE_integer("rounds", 200, "Rounds of every run.")
flags.DEFINE_integer("eval_every", 20, "Rounds between evaluations.")
flags.DEFINE_integer("seed", 0, "Seed of every run, and of the attacks.")
flags.DEFINE_list("k", ["10", "50"], "Cut-offs shown.")
flags.DEFINE_multi_string("set", [], "utility: a setting of FedRKG, key=value.")
flags.DEFINE_float("clip", 0.1, "utility: bound on the gradient of every step; probes: bound on an upload.")
flags.DEFINE_list(
    "epsilon", ["1", "10", "100", "1e4", "1e6"], "utility: what the server may learn, by both mechanisms."
)
flags.DEFINE_integer("attack_steps", 500, "inversion: steps of the attacker's network.")
flags.DEFINE_integer("draws", 8, "inversion: noise draws behind the share of noise and the mean.")
flags.DEFINE_integer("probed", 200, "probes: users whose uploads are probed.")
flags.DEFINE_list("upload_noise", ["0", "0.01", "0.1"], "probes: noise on FedMF's uploads, in multiples of the clip.")


# with the paper's beta and interval nothing is learned that noise could spoil
LEARNS = {"guidance": "kg", "interval": 1, "beta": 0.05}
PAPER_SIGMA = 1e-3
ROUNDING = 1e-6
"""A share of noise below this is none."""


DRAWN = 20
"""Items of a structural difference map, as in MDiffFR's Figure 6."""


def assigned() -> dict[str, str]:
    """--set as a dictionary."""
    for pair in FLAGS.set:
        if "=" not in pair:
            raise ValueError(f"--set={pair}: expected key=value")
    return dict(pair.split("=", 1) for pair in FLAGS.set)


def numbers(flag: str, kind: type = float, *, zero_allowed: bool = False) -> list:
    """The numbers of a list flag."""
    given = FLAGS[flag].value
    try:
        read = [kind(text) for text in given]
    except ValueError:
        read = []
    if not read or not all(math.isfinite(x) for x in read):
        what = "whole numbers, like 10,50" if kind is int else "numbers, like 1,10"
        raise ValueError(f"--{flag}={','.join(given)}: expected {what}")
    for number in read:
        positive(f"--{flag}", number, zero_allowed=zero_allowed)
    return read


def config(method: str, **changes) -> run.RunConfig:
    ks = tuple(numbers("k", int))
    return run.RunConfig(
        method=method,
        dataset=FLAGS.dataset,
        data_dir=FLAGS.data_dir,
        rounds=FLAGS.rounds,
        eval_every=FLAGS.eval_every,
        seed=FLAGS.seed,
        ks=ks,
        select_metric=f"NDCG@{ks[-1]}",
        checkpoint_every=0,
        devices=1,
        max_buckets=2,
        **changes,
    )


@functools.cache
def data() -> tuple:
    return run.load_data(config("fedmf"))


def prepared(chosen: run.RunConfig):
    return run.prepare(chosen, data())


def summary_of(name: str, chosen: run.RunConfig) -> dict:
    """The summary of a run, which is made where there is none yet; one with other settings is refused."""
    folder = Path(FLAGS.out) / name
    path = folder / "summary.json"
    if not path.exists():
        print(name, flush=True)
    try:
        run.train(chosen, folder, data=data())
    except FloatingPointError as error:
        print(f"{name}: {error}")
        return {}
    return json.loads(path.read_text())


def shown(value: float | None) -> str:
    """A number of JSON, where infinity is null."""
    return "none" if value is None or not math.isfinite(value) else f"{value:.4g}"


def names() -> list[str]:
    return [f"{name}@{k}" for k in FLAGS.k for name in ("HR", "NDCG")]


def cells(part: dict) -> list[str]:
    return [f"{part[name]:.4f}" for name in names()]


def draw(path: Path, curves: dict[str, tuple[list, list]], levels: dict[str, float], xlabel: str, scale: str) -> None:
    """Lines of NDCG at the last cut-off, and levels beside them."""
    figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
    for name, (x, y) in curves.items():
        axis.plot(x, y, "o-", label=name)
    for (name, level), style in zip(levels.items(), ("--", ":", "-."), strict=False):
        axis.axhline(level, linestyle=style, color="grey", label=name)
    axis.set(xscale=scale, xlabel=xlabel, ylabel=f"test {names()[-1]}", title=FLAGS.dataset)
    axis.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def radar(path: Path, found: dict[str, tuple[dict[str, float], dict[str, float]]]) -> None:
    """A polygon of the attacks' measures for every maker, beside its control, and one for a control, outward = closer
    to the true features.

    Errors (MSE, MAE, structure) are drawn at 1 - error / (2 * the control's), similarities (cosine, Pearson) at
    (1 + similarity) / 2, cut to [0, 1]: the rim is a full leak; the middle ring is the control's error, and no
    similarity.
    """
    labels = {
        "MSE": "MSE", "MAE": "MAE", "cosine": "cosine", "Pearson": "Pearson",
        "structure": "structural\nsimilarity\ndifference",
    }  # fmt: skip
    figure, axis = plt.subplots(figsize=(6, 5.5), layout="constrained", subplot_kw={"projection": "polar"})
    angles = np.linspace(0, 2 * np.pi, len(labels), endpoint=False)
    control = next(iter(found.values()))[1]
    for maker, (said, mean) in {**found, "predicting the mean": (control, control)}.items():
        leak = [outward(measure, said[measure], mean[measure]) for measure in labels]
        style = "o-" if maker in found else "k--"
        (line,) = axis.plot([*angles, angles[0]], [*leak, leak[0]], style, label=maker)
        axis.fill(angles, leak, color=line.get_color(), alpha=0.1)
    axis.set_xticks(angles, labels.values())
    axis.set_yticks([0.5, 1.0], ["", ""])
    axis.tick_params(axis="x", pad=14)
    axis.set(ylim=(0, 1))
    outwards = "outward: closer to the true features, less private (rim: a full leak)"
    axis.set_title(f"Inversion of cold items' rows\n{outwards}", fontsize="medium")
    figure.legend(loc="outside lower center", ncols=2, fontsize="small")
    figure.savefig(path, dpi=120, bbox_inches="tight")  # workdirs may have long names
    plt.close(figure)


def outward(measure: str, value: float, of_control: float) -> float:
    """Where `radar` draws it."""
    if measure in ("cosine", "Pearson"):
        leak = (1 + value) / 2
    else:
        leak = 1 - value / max(2 * of_control, 1e-30)
    return min(max(leak, 0.0), 1.0)


def structural_maps(path: Path, maps: dict[str, np.ndarray], control: float) -> None:
    """How far the attacked items' cosine similarities to each other are from the true ones, on one colour scale;
    `control`: the same of predicting the mean, on average."""
    columns = min(len(maps), 4)
    rows = -(-len(maps) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(3 * columns + 1, 3 * rows), layout="constrained", squeeze=False)
    top = max(max(float(apart.max()) for apart in maps.values()), 1e-12)
    for axis, (maker, apart) in zip(axes.flat, maps.items(), strict=False):
        drawn = axis.imshow(apart, cmap="viridis", vmin=0, vmax=top)
        axis.set_title(maker, fontsize="small")
        axis.set(xticks=[], yticks=[])
    for axis in axes.flat[len(maps) :]:
        axis.axis("off")
    figure.colorbar(drawn, ax=axes, label=f"predicting the mean: {control:.2f}")
    items = len(next(iter(maps.values())))
    title = f"Structural differences, 0: a full leak; {items} unleaked items"
    figure.suptitle(title, fontsize="medium", wrap=True)
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)


@functools.cache
def fedrkg_runs() -> dict[str, run.RunConfig]:
    """FedRKG without noise, and with that of every mechanism and epsilon."""
    settings = {**LEARNS, **assigned(), "clip_norm": FLAGS.clip}
    runs = {"fedrkg": config("fedrkg", settings=settings)}
    for mechanism in ("step", "upload"):
        releases = accounting.plans(_with_noise(mechanism, settings), FLAGS.rounds)[mechanism].releases
        for target in numbers("epsilon"):
            noise = accounting.noise_for(releases, target, runs["fedrkg"].dp_delta)
            chosen = config("fedrkg", settings={**settings, "step_noise": noise})
            if mechanism == "upload":
                chosen = config("fedrkg", settings=settings, dp_mechanism="gaussian", dp_noise=noise)
            runs[f"fedrkg_{mechanism}_{target:g}"] = chosen
    runs["fedrkg_step_paper"] = config("fedrkg", settings={**settings, "step_noise": PAPER_SIGMA})
    return runs


def utility() -> str:
    """FedRKG by mechanism and epsilon."""
    runs = fedrkg_runs()
    plain = summary_of("fedrkg", runs["fedrkg"])
    if not plain:
        raise ValueError("FedRKG without noise diverged, and nothing can be read against it: lower --set=lr")
    rankers = plain["reference_rankers"]
    rows = [["none (clipped)", "0", "none", "none", *cells(plain["test"]), str(plain["best_round"])]]
    curves: dict[str, tuple[list, list]] = {}
    delta = runs["fedrkg"].dp_delta
    for name, chosen in runs.items():
        if chosen is runs["fedrkg"]:
            continue
        said, mechanism = summary_of(name, chosen), name.split("_")[1]
        noise = chosen.dp_noise or chosen.settings["step_noise"]
        called = f"{mechanism}, the paper's sigma" if name.endswith("paper") else mechanism
        if not said:
            rows.append([called, f"{noise:.3g}", "", "", *["diverged"] * len(names()), ""])
            continue
        values = said["privacy"]["mechanisms"][mechanism]["epsilon_of_values"]["server"]
        whole = said["privacy"]["epsilon"]
        rows.append(
            [called, f"{noise:.3g}", shown(whole), shown(values), *cells(said["test"]), str(said["best_round"])]
        )
        if values and called == mechanism:
            x, y = curves.setdefault(mechanism, ([], []))
            x.append(values)
            y.append(said["test"][names()[-1]])
    for name in ("popularity", "random"):
        rows.append([f"*{name}*", "", "", "", *cells(rankers[name]["test"]), ""])
    level = lambda part: part["test"][names()[-1]]
    levels = {"no noise": level(plain), "popularity": level(rankers["popularity"]), "random": level(rankers["random"])}
    draw(Path(FLAGS.out) / "utility.png", curves, levels, "epsilon for the server (log scale)", "log")
    title = f"FedRKG on {FLAGS.dataset}, steps clipped to {FLAGS.clip:g}, {FLAGS.rounds} rounds, delta {delta:g}"
    head = ["mechanism", "noise", "epsilon", "of the values alone", *names(), "round"]
    return compare.markdown(f"**{title}**", head, rows)


def _with_noise(mechanism: str, settings: dict):
    """The run with some noise, to ask what it would release."""
    if mechanism == "step":
        return prepared(config("fedrkg", settings={**settings, "step_noise": 1.0}))
    return prepared(config("fedrkg", settings=settings, dp_mechanism="gaussian", dp_noise=1.0))


def fedmf_runs() -> dict[str, run.RunConfig]:
    """FedMF with every noise on its uploads."""
    runs = {}
    for multiple in numbers("upload_noise", zero_allowed=True):
        noise = {"dp_mechanism": "gaussian", "dp_clip": FLAGS.clip, "dp_noise": multiple * FLAGS.clip}
        runs[f"fedmf_{multiple:g}"] = config("fedmf", **(noise if multiple else {}))
    return runs


def attacked(workdir: str) -> Run:
    """A run whose model is attacked."""
    return load_run(workdir, data_dir=FLAGS.data_dir)


def inversion(workdirs: list[str]) -> str:
    """Features of cold items from the rows that the server sends."""
    if not workdirs:
        return ""
    rows, found_by, maps = [], {}, {}
    measures = ("MSE", "MAE", "cosine", "Pearson", "structure")
    key = jax.random.key(FLAGS.seed)  # one for all: the same items leak
    for workdir in workdirs:
        held, name = attacked(workdir), compare.label(Path(workdir))
        ready = held.experiment
        warm = np.asarray(ready.split.candidates["train"], bool)
        cold = np.flatnonzero(~warm)
        features = jax.numpy.asarray(side_by_side(catalogue_of(ready.features, warm), name)[cold])
        made = attacks.generated(ready.method, ready.key, held.state.server, cold, FLAGS.draws)
        share = attacks.noise_share(made)
        seen = {"one": made[0]} | ({f"mean of {FLAGS.draws}": made.mean(0)} if share > ROUNDING else {})
        for draws, of in seen.items():
            found = attacks.inversion(key, of, features, steps=FLAGS.attack_steps)
            for by, one in found.measures.items():
                called = f"**{by}**" if by == found.attack else by
                rows.append([name, draws, called, *(f"{one[m]:.4f}" for m in measures), f"{share:.4f}"])
        # the last is what a client that waits has
        found_by[name] = found.measures[found.attack], found.measures["mean"]
        maps[name] = np.asarray(attacks.structural_difference(found.true[:DRAWN], found.guess[found.attack][:DRAWN]))
    radar(Path(FLAGS.out) / "radar.png", found_by)
    structural_maps(Path(FLAGS.out) / "structure.png", maps, next(iter(found_by.values()))[1]["structure"])
    title = "Inversion of cold items' rows, 20 % of the pairs leaked (bold: the attack, by leaked pairs held back)"
    return compare.markdown(f"**{title}**", ["rows of", "draws", "guess", *measures, "share of noise"], rows)


def probes(workdirs: list[str]) -> str:
    """Uploads of the round after the last: FedMF's, with and without noise, and those of the workdirs."""
    rows = []
    measures = ("reconstruction", "found", "norm", "popularity", "membership")
    for name, chosen in fedmf_runs().items():
        if summary_of(name, chosen):
            rows.append([name, *probed(attacked(Path(FLAGS.out) / name), measures)])
        else:
            rows.append([name, f"{chosen.dp_noise:g}", "", *["diverged"] * len(measures)])
    for workdir in workdirs:
        rows.append([compare.label(Path(workdir)), *probed(attacked(workdir), measures)])
    title = "Probes of uploads of item tables (AUC; `found`: share of the history among as many guesses)"
    return compare.markdown(f"**{title}**", ["uploads of", "noise", "epsilon", *measures], rows)


def probed(held: Run, measures: Sequence[str]) -> list[str]:
    """What the uploads of a run tell."""
    ready, engine = held.experiment, held.experiment.engine
    if ready.config.mechanism is not None:  # the run drew its noise for all at once; the server sees every client's own
        plain = run.prepare(
            dataclasses.replace(ready.config, dp_mechanism="none", dp_clip=0.0, dp_noise=0.0, dp_rows="all"),
            (ready.interactions, ready.split, ready.features),
        )
        seen = mechanisms.private(plain.method, ready.config.mechanism, ready.split.num_users, per_client=True)
        engine = make_engine(seen, plain.engine.clients)
    pairs, items = ready.split.train, ready.split.num_items
    users = np.unique(pairs.user)[: FLAGS.probed]
    history = np.zeros((ready.split.num_users, items), bool)
    history[pairs.user, pairs.item] = True
    sent = attacks.uploads(engine, ready.key, held.state, held.round, users)
    # cold items, which nobody can have in training, would be told apart for free
    warm = np.flatnonzero((ready.split.candidates or {}).get("train", np.ones(items, bool)))
    found = attacks.probes(*map(jax.numpy.asarray, (sent[:, warm], history[users][:, warm], history[:, warm].sum(0))))
    noise = held.config.dp_noise or getattr(ready.method.config, "step_noise", 0.0)
    whole = shown(held.summary["privacy"]["epsilon"]) if noise and held.summary else "none"
    return [f"{noise:g}", whole, *(f"{float(found[m]):.3f}" for m in measures)]


def paper() -> str:
    """Epsilon of FedRKG's Table 5, which the paper does not tell."""
    rows = []
    for steps in (1, 100, 1000, 10000):
        row = [str(steps)]
        for sensitivity in (0.1, 0.2):
            row.append(shown(accounting.epsilon((accounting.Release("gaussian", 1e-3, sensitivity, steps),), 1e-5)))
        rows.append(row)
    title = "FedRKG's setting: sigma 0.001, delta 1e-5, by noisy steps of a client"
    return compare.markdown(f"**{title}**", ["steps", "epsilon, sensitivity 0.1", "two data sets, 0.1 each way"], rows)


PARTS = {
    "utility": (fedrkg_runs, lambda _: utility()),
    "paper": (dict, lambda _: paper()),
    "probes": (fedmf_runs, probes),
    "inversion": (dict, inversion),
}
"""The runs that a part makes, and its table of the given workdirs."""


def check(workdirs: list[str]) -> None:
    """Builds every run of the chosen parts and looks for the workdirs, so that none is refused after hours of
    others."""
    for part in FLAGS.parts:
        one_of("--parts", part, PARTS)
    if "inversion" in FLAGS.parts and FLAGS["parts"].present and not workdirs:
        raise ValueError("--parts=inversion: expected workdirs of runs on cold items as arguments")
    for name in ("attack_steps", "draws", "probed", "clip"):
        positive(f"--{name}", FLAGS[name].value)
    if FLAGS.draws < 2:
        raise ValueError(f"--draws={FLAGS.draws}: expected 2 or more, as noise is what differs between draws")
    names = [compare.label(Path(workdir)) for workdir in workdirs]
    if len(set(names)) < len(names):
        raise ValueError(f"workdirs {', '.join(names)}: expected different names, which the rows have")
    for workdir in workdirs:
        split = read_config(Path(workdir))["split"]
        if "inversion" in FLAGS.parts and split != "cold_items":
            raise ValueError(f"{workdir}: split={split}; inversion attacks the rows of runs with --split=cold_items")
    for part in FLAGS.parts:
        for name, chosen in PARTS[part][0]().items():
            try:
                accounting.check(prepared(chosen))
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None


def tables(workdirs: list[str]) -> str:
    """The chosen parts as Markdown, also in OUT/privacy.md."""
    check(workdirs)
    out = Path(FLAGS.out)
    out.mkdir(parents=True, exist_ok=True)
    said = []
    for part in FLAGS.parts:
        said += filter(None, [PARTS[part][1](workdirs)])
        (out / "privacy.md").write_text("\n".join(said))  # what a later part breaks off is not lost
    return "\n".join(said)


def main(argv) -> int:
    """The tables, or bad usage and bad input as one line on standard error."""
    logging.set_verbosity(logging.WARNING)
    return in_one_line("privacy.py", lambda: tables(argv[1:]))


if __name__ == "__main__":
    app.run(main)
