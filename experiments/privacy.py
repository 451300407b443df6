"""What privacy costs and what it buys, as Markdown and plots.

    python experiments/privacy.py --data_dir=DATA --out=runs/privacy                       # the embedded data set
    python experiments/privacy.py --data_dir=DATA --dataset=filmtrust --parts=utility --set=backbone=pfedrec

    utility     FedRKG under both of its mechanisms, by epsilon: utility.png (needs the extra `privacy`)
    laplace     MDiffFR on cold items under Laplace noise of some intensities (its Table 5): laplace.png
    attacks     inversion of what MDiffFR and IFedRec make for cold items, beside predicting the mean, with the share of
                noise in what is made; probes of FedMF's uploads, with and without noise
    paper       the epsilon of FedRKG's reported setting (sensitivity 0.1, sigma 0.001), by steps

Runs are workdirs in OUT; finished ones are not run again, so another setting needs another OUT. Everything is also
written to OUT/privacy.md.
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import jax
import matplotlib
import numpy as np
from absl import app, flags, logging

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from fedjax_rec import compare, load_run, run
from fedjax_rec.item_sources import Catalogue
from fedjax_rec.item_sources.cold import side_by_side
from fedjax_rec.privacy import accounting, attacks, mechanisms
from fedjax_rec.rounds import make_engine

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


def assigned(pairs: list[str]) -> dict[str, str]:
    return dict(pair.split("=", 1) for pair in pairs)


def config(method: str, **changes) -> run.RunConfig:
    return run.RunConfig(
        method=method,
        dataset=FLAGS.dataset,
        data_dir=FLAGS.data_dir,
        rounds=FLAGS.rounds,
        eval_every=FLAGS.eval_every,
        seed=FLAGS.seed,
        ks=tuple(map(int, FLAGS.k)),
        select_metric=f"NDCG@{FLAGS.k[-1]}",
        checkpoint_every=0,
        devices=1,
        **changes,
    )


def summary_of(name: str, chosen: run.RunConfig) -> dict:
    """The summary of a run, which is made where there is none yet."""
    folder = Path(FLAGS.out) / name
    path = folder / "summary.json"
    if not path.exists():
        print(name, flush=True)
        try:
            run.train(chosen, folder)
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


def utility() -> str:
    """FedRKG by mechanism and epsilon."""
    settings = {**LEARNS, **assigned(FLAGS.set), "clip_norm": FLAGS.clip}
    plain = summary_of("fedrkg", config("fedrkg", settings=settings))
    rankers = plain["reference_rankers"]
    rows = [["none (clipped)", "0", "none", "none", *cells(plain["test"]), str(plain["best_round"])]]
    curves: dict[str, tuple[list, list]] = {}
    delta = config("fedrkg").dp_delta
    for mechanism in ("step", "upload"):
        releases = accounting.plans(_with_noise(mechanism, settings), FLAGS.rounds)[mechanism].releases
        for target in map(float, FLAGS.epsilon):
            noise = accounting.noise_for(releases, target, delta)
            chosen = config("fedrkg", settings={**settings, "step_noise": noise})
            if mechanism == "upload":
                chosen = config("fedrkg", settings=settings, dp_mechanism="gaussian", dp_noise=noise)
            said = summary_of(f"fedrkg_{mechanism}_{target:g}", chosen)
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
        return run.prepare(config("fedrkg", settings={**settings, "step_noise": 1.0}))
    return run.prepare(config("fedrkg", settings=settings, dp_mechanism="gaussian", dp_noise=1.0))


def laplace() -> str:
    """MDiffFR's Table 5."""
    rows, x, y, rankers = [], [], [], {}
    for intensity in FLAGS.intensity:
        noise = {"dp_mechanism": "laplace", "dp_noise": float(intensity)} if float(intensity) else {}
        chosen = config("mdifffr", split="cold_items", settings=assigned(FLAGS.cold), **noise)
        said = summary_of(f"mdifffr_laplace_{intensity}", chosen)
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
    rows = []
    measures = ("MSE", "MAE", "cosine", "Pearson", "structure")
    for maker in FLAGS.makers:
        name, _, preset = maker.partition(":")
        settings = {**assigned(FLAGS.cold), **({"preset": preset} if preset else {})}
        if not summary_of(maker.replace(":", "_"), config(name, split="cold_items", settings=settings)):
            rows.append([maker, "diverged", *[""] * (len(measures) + 1)])
            continue
        held = load_run(Path(FLAGS.out) / maker.replace(":", "_"), data_dir=FLAGS.data_dir)
        ready = held.experiment
        warm = np.asarray(ready.split.candidates["train"], bool)
        cold = np.flatnonzero(~warm)
        values = {modality: feature.values for modality, feature in ready.features.items()}
        features = side_by_side(Catalogue(values, warm), name)[cold]
        made = attacks.generated(ready.method, ready.key, held.state.server, cold, FLAGS.draws)
        found = attacks.inversion(ready.key, made[0], jax.numpy.asarray(features), steps=FLAGS.attack_steps)
        share = f"{attacks.noise_share(made):.3f}"
        rows += [[maker, by, *(f"{one[m]:.4f}" for m in measures), share] for by, one in found.items()]
    title = f"Inversion of cold items' rows on {FLAGS.dataset}, 20 % of the pairs leaked"
    return compare.markdown(f"**{title}**", ["rows of", "guess", *measures, "share of noise"], rows)


def probes() -> str:
    """FedMF's uploads of the round after the last, with and without noise."""
    rows = []
    measures = ("reconstruction", "found", "norm", "popularity", "membership")
    for multiple in map(float, FLAGS.upload_noise):
        noise = multiple * FLAGS.clip
        given = {"dp_mechanism": "gaussian", "dp_clip": FLAGS.clip, "dp_noise": noise} if noise else {}
        name = f"fedmf_{multiple:g}"
        said = summary_of(name, config("fedmf", **given))
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
    "utility": lambda: [utility()],
    "laplace": lambda: [laplace()],
    "attacks": lambda: [inversions(), probes()],
    "paper": lambda: [paper()],
}


def main(argv) -> None:
    logging.set_verbosity(logging.WARNING)
    unknown = [part for part in FLAGS.parts if part not in PARTS]
    if len(argv) > 1 or unknown:
        raise app.UsageError(f"{(argv[1:] + unknown)[0]!r}: expected --parts of {', '.join(PARTS)}")
    out = Path(FLAGS.out)
    out.mkdir(parents=True, exist_ok=True)
    said = "\n".join(table for part in FLAGS.parts for table in PARTS[part]())
    (out / "privacy.md").write_text(said)
    print(said)


if __name__ == "__main__":
    app.run(main)
