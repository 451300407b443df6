"""What privacy costs and what it buys, as Markdown and plots.

    python experiments/privacy.py --data_dir=DATA --out=runs/privacy                       # the embedded data set
    python experiments/privacy.py --data_dir=DATA --dataset=filmtrust --parts=utility --set=backbone=pfedrec

    utility     FedRKG under both of its mechanisms, by epsilon: utility.png (needs the extra `privacy`)
    laplace     MDiffFR on cold items under Laplace noise of some intensities (its Table 5): laplace.png
    attacks     inversion of what MDiffFR and IFedRec make for cold items, beside predicting the mean, with the share of
                noise in what is made: radar.png (its Figure 5), structure.png (its Figure 6); probes of FedMF's
                uploads, with and without noise
    paper       the epsilon of FedRKG's reported setting (sensitivity 0.1, sigma 0.001), by steps

The round shown is that of the largest validation NDCG at the last cut-off of --k; on cold items that of the largest sum
of validation recalls at all of them.
Runs are workdirs in OUT; finished ones are not run again, so another setting needs another OUT. Everything is also
written to OUT/privacy.md. All configurations are checked before the first run; bad ones are one line on standard error
and exit code 2. A --cold setting goes to every method of the chosen parts that has it.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Iterable
from pathlib import Path

import jax
import matplotlib
import numpy as np
from absl import app, flags, logging

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from fedjax_rec import compare, load_run, run
from fedjax_rec.item_sources import catalogue_of
from fedjax_rec.item_sources.cold import side_by_side
from fedjax_rec.methods import METHODS
from fedjax_rec.privacy import accounting, attacks, mechanisms
from fedjax_rec.rounds import make_engine
from fedjax_rec.validate import in_one_line, nearest, one_of, positive

FLAGS = flags.FLAGS
flags.DEFINE_string("data_dir", None, "Folder that holds the data set folders.")
flags.DEFINE_string("dataset", "synthetic", "Data set; the parts laplace and attacks need its item features.")
flags.DEFINE_string("out", "runs/privacy", "Folder of the workdirs, privacy.md and the plots.")
flags.DEFINE_list("parts", ["utility", "laplace", "attacks", "paper"], "Which parts.")
flags.DEFINE_integer("rounds", 200, "Rounds of every run.")
flags.DEFINE_integer("eval_every", 20, "Rounds between evaluations.")
flags.DEFINE_integer("seed", 0, "Seed of every run.")
flags.DEFINE_list("k", ["10", "50"], "Cut-offs shown.")
flags.DEFINE_multi_string("set", [], "utility: a setting of FedRKG, key=value.")
flags.DEFINE_float("clip", 0.1, "utility: bound on the gradient of every step; attacks: bound on an upload.")
flags.DEFINE_list(
    "epsilon", ["1", "10", "100", "1e4", "1e6"], "utility: what the server may learn, by both mechanisms."
)
flags.DEFINE_list("intensity", ["0", "1", "10", "20", "30", "40", "50"], "laplace: scales of the noise.")
flags.DEFINE_multi_string("cold", [], "laplace, attacks: a setting of MDiffFR and IFedRec, key=value.")
flags.DEFINE_list("makers", ["mdifffr:paper", "mdifffr:proper", "ipfedrec"], "attacks: methods, with a preset.")
flags.DEFINE_integer("attack_steps", 500, "attacks: steps of the attacker's network.")
flags.DEFINE_integer("draws", 8, "attacks: noise draws behind the share of noise.")
flags.DEFINE_integer("probed", 200, "attacks: users whose uploads are probed.")
flags.DEFINE_list("upload_noise", ["0", "0.01", "0.1"], "attacks: noise on FedMF's uploads, in multiples of the clip.")


# with the paper's beta and interval nothing is learned that noise could spoil
LEARNS = {"guidance": "kg", "interval": 2, "beta": 0.3}


DRAWN = 20
"""Items of a structural difference map, as in MDiffFR's Figure 6."""


MAKERS = ("mdifffr", "light_mdifffr", "ipfedrec", "ifedncf", "cs_fcf", "cs_fedncf")


def assigned(flag: str) -> dict[str, str]:
    """key=value flags as a dictionary."""
    for pair in FLAGS[flag].value:
        if "=" not in pair:
            raise ValueError(f"--{flag}={pair}: expected key=value")
    return dict(pair.split("=", 1) for pair in FLAGS[flag].value)


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


def config(method: str, *, split: str = "leave_one_out", **changes) -> run.RunConfig:
    ks = tuple(numbers("k", int))
    recalls = "+".join(f"Recall@{k}" for k in ks)  # the protocol of cold items, as in their recipes
    return run.RunConfig(
        method=method,
        dataset=FLAGS.dataset,
        data_dir=FLAGS.data_dir,
        rounds=FLAGS.rounds,
        eval_every=FLAGS.eval_every,
        seed=FLAGS.seed,
        split=split,
        ks=ks,
        select_metric=recalls if split == "cold_items" else f"NDCG@{ks[-1]}",
        checkpoint_every=0,
        devices=1,
        max_buckets=2,
        **changes,
    )


@functools.cache
def data_of(split: str) -> tuple:
    return run.load_data(config("fedmf", split=split))


def prepared(chosen: run.RunConfig):
    return run.prepare(chosen, data_of(chosen.split))


def summary_of(name: str, chosen: run.RunConfig) -> dict:
    """The summary of a run, which is made where there is none yet; one with other settings is refused."""
    folder = Path(FLAGS.out) / name
    path = folder / "summary.json"
    if not path.exists():
        print(name, flush=True)
    try:
        run.train(chosen, folder, data=data_of(chosen.split))
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


def radar(path: Path, found: dict[str, dict[str, float]], control: dict[str, float]) -> None:
    """A polygon of the attacks' measures for every maker and for the control, outward = closer to the true features.

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
    for maker, said in {**found, "predicting the mean": control}.items():
        leak = [outward(measure, said[measure], control[measure]) for measure in labels]
        style = "o-" if maker in found else "k--"
        (line,) = axis.plot([*angles, angles[0]], [*leak, leak[0]], style, label=maker)
        axis.fill(angles, leak, color=line.get_color(), alpha=0.1)
    axis.set_xticks(angles, labels.values())
    axis.set_yticks([0.5, 1.0], ["", ""])
    axis.tick_params(axis="x", pad=14)
    axis.set(ylim=(0, 1))
    outwards = "outward: closer to the true features, less private (rim: a full leak)"
    axis.set_title(f"Inversion on {FLAGS.dataset}\n{outwards}", fontsize="medium")
    figure.legend(loc="outside lower center", ncols=2)
    figure.savefig(path, dpi=120)
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
        axis.set(title=maker, xticks=[], yticks=[])
    for axis in axes.flat[len(maps) :]:
        axis.axis("off")
    figure.colorbar(drawn, ax=axes, label=f"predicting the mean: {control:.2f}")
    items = len(next(iter(maps.values())))
    title = f"Structural differences, 0: a full leak; {items} unleaked items, {FLAGS.dataset}"
    figure.suptitle(title, fontsize="medium", wrap=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


@functools.cache
def fedrkg_runs() -> dict[str, run.RunConfig]:
    """FedRKG without noise, and with that of every mechanism and epsilon."""
    settings = {**LEARNS, **assigned("set"), "clip_norm": FLAGS.clip}
    runs = {"fedrkg": config("fedrkg", settings=settings)}
    for mechanism in ("step", "upload"):
        releases = accounting.plans(_with_noise(mechanism, settings), FLAGS.rounds)[mechanism].releases
        for target in numbers("epsilon"):
            noise = accounting.noise_for(releases, target, runs["fedrkg"].dp_delta)
            chosen = config("fedrkg", settings={**settings, "step_noise": noise})
            if mechanism == "upload":
                chosen = config("fedrkg", settings=settings, dp_mechanism="gaussian", dp_noise=noise)
            runs[f"fedrkg_{mechanism}_{target:g}"] = chosen
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
    for mechanism in ("step", "upload"):
        for target in numbers("epsilon"):
            name = f"fedrkg_{mechanism}_{target:g}"
            said = summary_of(name, runs[name])
            noise = runs[name].dp_noise or runs[name].settings["step_noise"]
            if not said:
                rows.append([mechanism, f"{noise:.3g}", "", "", *["diverged"] * len(names()), ""])
                continue
            values = said["privacy"]["mechanisms"][mechanism]["epsilon_of_values"]["server"]
            whole = said["privacy"]["epsilon"]
            selected = str(said["best_round"])
            rows.append([mechanism, f"{noise:.3g}", shown(whole), shown(values), *cells(said["test"]), selected])
            if values:
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


def cold_settings(makers: Iterable[str]) -> dict[str, dict[str, str]]:
    """Of every maker (a method, with a preset behind a colon) the --cold settings that it has.

    Raises:
        ValueError: for an unknown maker, and for a setting that none of them has.
    """
    given, settings, known = assigned("cold"), {}, {}
    for maker in makers:
        name, _, preset = maker.partition(":")
        one_of("--makers", name, MAKERS)
        known[maker] = {field.name for field in dataclasses.fields(METHODS[name].config)}
        own = {"preset": preset} if preset else {}
        settings[maker] = {**{k: v for k, v in given.items() if k in known[maker]}, **own}
    anywhere = sorted(set().union(*known.values()))
    for name in given:
        if name not in anywhere:
            raise ValueError(
                f"--cold={name}: {', '.join(known)} have no such setting{nearest(name, anywhere)}; expected one of "
                f"{', '.join(anywhere)}"
            )
    return settings


def chosen_makers() -> list[str]:
    """The methods that --cold is for: those of the chosen parts."""
    if "attacks" in FLAGS.parts and not FLAGS.makers:
        raise ValueError(f"--makers=: expected one or more of {', '.join(MAKERS)}")
    attacked = FLAGS.makers if "attacks" in FLAGS.parts else []
    return [*dict.fromkeys([*(["mdifffr"] if "laplace" in FLAGS.parts else []), *attacked])]


def laplace_runs() -> dict[str, run.RunConfig]:
    """MDiffFR with every intensity of noise."""
    numbers("intensity", zero_allowed=True)
    settings, runs = cold_settings(chosen_makers())["mdifffr"], {}
    for intensity in FLAGS.intensity:
        noise = {"dp_mechanism": "laplace", "dp_noise": float(intensity)} if float(intensity) else {}
        runs[f"mdifffr_laplace_{intensity}"] = config("mdifffr", split="cold_items", settings=settings, **noise)
    return runs


def maker_runs() -> dict[str, run.RunConfig]:
    """The methods whose rows are attacked."""
    settings = cold_settings(chosen_makers())
    name = lambda maker: maker.partition(":")[0]
    return {
        maker.replace(":", "_"): config(name(maker), split="cold_items", settings=settings[maker])
        for maker in FLAGS.makers
    }


def fedmf_runs() -> dict[str, run.RunConfig]:
    """FedMF with every noise on its uploads."""
    runs = {}
    for multiple in numbers("upload_noise", zero_allowed=True):
        noise = {"dp_mechanism": "gaussian", "dp_clip": FLAGS.clip, "dp_noise": multiple * FLAGS.clip}
        runs[f"fedmf_{multiple:g}"] = config("fedmf", **(noise if multiple else {}))
    return runs


def laplace() -> str:
    """MDiffFR's Table 5."""
    rows, x, y, rankers = [], [], [], {}
    for intensity, (name, chosen) in zip(FLAGS.intensity, laplace_runs().items(), strict=True):
        said = summary_of(name, chosen)
        if not said:
            rows.append([intensity, *["diverged"] * len(names()), ""])
            continue
        rows.append([intensity, *cells(said["test"]), str(said["best_round"])])
        x.append(float(intensity))
        y.append(said["test"][names()[-1]])
        rankers = said["reference_rankers"]
    known = [name for name in ("content_profile", "random") if name in rankers]
    rows += [[f"*{name}*", *cells(rankers[name]["test"]), ""] for name in known]
    levels = {name: rankers[name]["test"][names()[-1]] for name in known}
    draw(Path(FLAGS.out) / "laplace.png", {"mdifffr": (x, y)}, levels, "intensity of the noise on uploads", "linear")
    title = f"MDiffFR on cold items of {FLAGS.dataset}, Laplace noise on uploads (not clipped, so no epsilon)"
    return compare.markdown(f"**{title}**", ["intensity", *names(), "round"], rows)


def inversions() -> str:
    """Features of cold items from the rows that the server sends."""
    rows, attacked, maps, control = [], {}, {}, {}
    measures = ("MSE", "MAE", "cosine", "Pearson", "structure")
    for maker, (name, chosen) in zip(FLAGS.makers, maker_runs().items(), strict=True):
        if not summary_of(name, chosen):
            rows.append([maker, "diverged", *[""] * (len(measures) + 1)])
            continue
        held = load_run(Path(FLAGS.out) / name, data_dir=FLAGS.data_dir)
        ready = held.experiment
        warm = np.asarray(ready.split.candidates["train"], bool)
        cold = np.flatnonzero(~warm)
        features = side_by_side(catalogue_of(ready.features, warm), name)[cold]
        made = attacks.generated(ready.method, ready.key, held.state.server, cold, FLAGS.draws)
        found = attacks.inversion(ready.key, made[0], jax.numpy.asarray(features), steps=FLAGS.attack_steps)
        share = f"{attacks.noise_share(made):.3f}"
        rows += [[maker, by, *(f"{one[m]:.4f}" for m in measures), share] for by, one in found.measures.items()]
        attacked[maker] = found.measures["attack"]
        control = found.measures["mean"]  # the same for all: one seed leaks the same features
        maps[maker] = np.asarray(attacks.structural_difference(found.true[:DRAWN], found.guess["attack"][:DRAWN]))
    if attacked:
        radar(Path(FLAGS.out) / "radar.png", attacked, control)
        structural_maps(Path(FLAGS.out) / "structure.png", maps, control["structure"])
    title = f"Inversion of cold items' rows on {FLAGS.dataset}, 20 % of the pairs leaked"
    return compare.markdown(f"**{title}**", ["rows of", "guess", *measures, "share of noise"], rows)


def probes() -> str:
    """FedMF's uploads of the round after the last, with and without noise."""
    rows = []
    measures = ("reconstruction", "found", "norm", "popularity", "membership")
    for name, chosen in fedmf_runs().items():
        noise = chosen.dp_noise
        said = summary_of(name, chosen)
        if not said:
            rows.append([f"{noise:g}", "", *["diverged"] * (len(measures) + len(names()))])
            continue
        held = load_run(Path(FLAGS.out) / name, data_dir=FLAGS.data_dir)
        ready, engine = held.experiment, held.experiment.engine
        if noise:  # the run drew its noise for all at once; the server sees every client's own
            plain = run.prepare(
                dataclasses.replace(ready.config, dp_mechanism="none", dp_clip=0.0, dp_noise=0.0),
                (ready.interactions, ready.split, ready.features),
            )
            seen = mechanisms.private(plain.method, ready.config.mechanism, ready.split.num_users, per_client=True)
            engine = make_engine(seen, plain.engine.clients)
        pairs, items = ready.split.train, ready.split.num_items
        users = np.unique(pairs.user)[: FLAGS.probed]
        history = np.zeros((ready.split.num_users, items), bool)
        history[pairs.user, pairs.item] = True
        sent = attacks.uploads(engine, ready.key, held.state, held.round, users)
        found = attacks.probes(jax.numpy.asarray(sent), jax.numpy.asarray(history[users]))
        whole = shown(said["privacy"]["epsilon"]) if noise else "none"
        rows.append([f"{noise:g}", whole, *(f"{float(found[m]):.3f}" for m in measures), *cells(said["test"])])
    title = f"Probes of FedMF's uploads on {FLAGS.dataset} (AUC; `found`: share of the history among as many guesses)"
    return compare.markdown(f"**{title}**", ["noise", "epsilon", *measures, *names()], rows)


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
    "utility": ((fedrkg_runs,), (utility,)),
    "laplace": ((laplace_runs,), (laplace,)),
    "attacks": ((maker_runs, fedmf_runs), (inversions, probes)),
    "paper": ((), (paper,)),
}
"""What a part runs, and its tables."""


def check() -> None:
    """Builds every run of the chosen parts, so that none is refused after hours of others."""
    for part in FLAGS.parts:
        one_of("--parts", part, PARTS)
    for name in ("attack_steps", "draws", "probed", "clip"):
        positive(f"--{name}", FLAGS[name].value)
    if FLAGS.draws < 2:
        raise ValueError(f"--draws={FLAGS.draws}: expected 2 or more, as noise is what differs between draws")
    for part in FLAGS.parts:
        for runs in PARTS[part][0]:
            for name, chosen in runs().items():
                try:
                    accounting.check(prepared(chosen))
                except ValueError as error:
                    raise ValueError(f"{name}: {error}") from None


def tables(arguments: list[str]) -> str:
    """The chosen parts as Markdown, also in OUT/privacy.md."""
    if arguments:
        raise ValueError(f"{arguments[0]!r}: expected flags only")
    check()
    out = Path(FLAGS.out)
    out.mkdir(parents=True, exist_ok=True)
    said = "\n".join(table() for part in FLAGS.parts for table in PARTS[part][1])
    (out / "privacy.md").write_text(said)
    return said


def main(argv) -> int:
    """The tables, or bad usage and bad input as one line on standard error."""
    logging.set_verbosity(logging.WARNING)
    return in_one_line("privacy.py", lambda: tables(argv[1:]))


if __name__ == "__main__":
    app.run(main)
