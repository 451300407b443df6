"""Ablations of a recipe, by what its method has: Markdown and plots.

    python experiments/ablations.py --data_dir=DATA --out=runs/ablations --base=experiments/ku_fedvlr_fedavg.flags

FedVLR and its kin: fusion strategy, modalities, noise, sampling ratio. FedRKG: variants of guidance, interval, beta,
the gate's rate. PLGC: mixing, kernel, contrast. MDiffFR: guidance, fusion of conditions, training of the diffusion,
Laplace noise on uploads (its Table 5), embedding size. IFedRec: that noise. Variants that are values of one setting are
drawn as a curve, others as bars.

Every variant is a flagfile OUT/flags/<name>.flags, the base with a few flags changed, and a folder of seeds; tables.py
runs them, so that a call which was interrupted goes on. Nothing is tuned again: a variant has the base's rates. One
that is refused, like leaving out a modality that the data have not, is left out.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
from absl import app, flags

from fedjax_rec import compare
from fedjax_rec.validate import in_one_line, one_of

FLAGS = flags.FLAGS
flags.DEFINE_string("data_dir", None, "Folder that holds the data set folders.")
flags.DEFINE_string("out", "runs/ablations", "Folder of the workdirs, ablations.md and the plots.")
flags.DEFINE_string("base", None, "Flagfile of the full method.", required=True)
flags.DEFINE_integer("seeds", 5, "Seeds 0 .. n-1 of every variant.")
flags.DEFINE_list("k", [], "Cut-offs shown, which all runs get; default: those of the base.")
flags.DEFINE_list("groups", [], "Which ablations; default: those of the base's method.")
flags.DEFINE_multi_string("override", [], "A flag handed to every run, e.g. --rounds=50.")

FULL = "full"
GROUPS = {
    "strategy": {
        "sum": ["--set=operators=sum"],
        "mlp": ["--set=operators=mlp"],
        "gate": ["--set=operators=gate"],
        "router_item": ["--set=router=item"],
        "router_batch_mean": ["--set=router=batch_mean"],
        "update_parameters": ["--set=update=parameters", "--set=fusion_optimizer="],
    },
    "modality": {
        f"{rule}_{name}": [f"--set={name}={rule}"] for name in ("visual", "text", "ids") for rule in ("drop", "random")
    }
    | {"drop_features": ["--set=visual=drop", "--set=text=drop"]},
    "noise": {
        "variance_0.1": ["--set=noise_std=0.31623"],
        "variance_0.1_on_views": ["--set=noise_std=0.31623", "--set=noise_on=views"],
        "l2_0.001": ["--set=l2=0.001"],
    },
    "sampling": {f"share_{share}": [f"--clients_per_round={share}"] for share in (0.1, 0.25, 0.5, 0.75)},
    "guidance": {
        name: [f"--set=guidance={name}"] for name in ("ag", "kg", "global_only", "personal_only", "local_only")
    }
    | {"replaced_every_round": ["--set=guidance=global_only", "--set=interval=1"]},
    "interval": {f"every_{n}": [f"--set=interval={n}"] for n in (1, 5, 10, 50, 100, 200)},
    "beta": {f"beta_{b}": [f"--set=beta={b}"] for b in (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99)},
    "gate": {f"gate_lr_{r}": ["--set=guidance=ag", f"--set=gate_lr={r}"] for r in (0.0, 1e-4, 1e-2, 0.1, 1.0)},
    "mixing": {
        "global": ["--set=mixing=constant", "--set=coefficient=0"],
        "half": ["--set=mixing=constant", "--set=coefficient=0.5"],
        "local": ["--set=mixing=constant", "--set=coefficient=1"],
        "replaced": ["--set=table=replaced"],
        "plain_trace": ["--set=centre=false"],
    },
    "contrast": {f"weight_{w}": [f"--set=contrast_weight={w}"] for w in (0.0, 0.001, 0.01, 0.1)}
    | {f"contrast_{kind}": [f"--set=contrast={kind}"] for kind in ("mixed", "self")},
    "conditions": {name: [f"--set=guidance={name}"] for name in ("none", "zero", "random")}
    | {f"fusion_{name}": [f"--set=fusion={name}"] for name in ("mean", "concat")},
    "diffusion": {f"every_{n}_rounds": [f"--set=train_every={n}"] for n in (2, 5, 10)}
    | {"snr_weights": ["--set=loss_weights=snr"], "sampling_noise": ["--set=sampling_noise=true"]},
    "laplace": {
        f"laplace_{scale}": ["--dp_mechanism=laplace", f"--dp_noise={scale}"] for scale in (0.1, 1, 10, 20, 30, 40, 50)
    },
    "size": {f"dim_{d}": [f"--set=dim={d}"] for d in (16, 32, 64, 128, 256)},
}
CURVES = {  # groups of one setting's values, which end the variants' names
    "sampling": "share of the clients in a round",
    "interval": "rounds between guidance",
    "beta": "beta",
    "gate": "rate of the gate",
    "laplace": "scale of Laplace noise on uploads",
    "size": "embedding size",
}
OF_METHOD = {
    "fedrkg": ["guidance", "interval", "beta", "gate"],
    "plgc": ["mixing", "contrast"],
    "mdifffr": ["conditions", "diffusion", "laplace", "size"],
    "light_mdifffr": ["conditions", "diffusion", "laplace", "size"],
    "ipfedrec": ["laplace"],
    "ifedncf": ["laplace"],
    "fedvbpr": ["modality", "sampling"],
}
MULTIMODAL = ["strategy", "modality", "noise", "sampling"]


def groups_of(base: str) -> list[str]:
    """The ablations that the method of a flagfile has."""
    found = re.search(r"^--method=(\S+)", Path(base).read_text(), re.MULTILINE)
    return OF_METHOD.get(found[1] if found else "", MULTIMODAL)


def write_flagfiles(folder: Path, group: str) -> list[Path]:
    """The full method's flagfile and those of the group's variants."""
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for name, changes in {FULL: [], **GROUPS[group]}.items():
        path = folder / f"{name}.flags"
        path.write_text("\n".join([f"--flagfile={Path(FLAGS.base).resolve()}", *changes]) + "\n")
        made.append(path)
    return made


def plot(path: Path, group: str, runs: dict[str, compare.Runs]) -> None:
    """HR (recall, where that selects the round) and NDCG at the largest cut-off, with the spread over seeds: a curve or
    bars."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    k = max(map(int, FLAGS.k), default=0) or compare.cut_offs(list(runs.values()))[-1]
    hits = "Recall" if "Recall" in next(iter(runs.values())).summaries[0]["select_metric"] else "HR"
    values = {
        metric: {name: [said["test"][metric] for said in one.summaries] for name, one in runs.items()}
        for metric in (f"{hits}@{k}", f"NDCG@{k}")
    }
    height = 4 if group in CURVES else 0.35 * len(runs) + 1.6
    figure, axes = plt.subplots(1, 2, figsize=(10, height), layout="constrained", sharey=group not in CURVES)
    for axis, (metric, of) in zip(axes, values.items(), strict=True):
        curve = group in CURVES
        names = [name for name in of if not curve or name != FULL]
        mean = [np.mean(of[name]) for name in names]
        std = [np.std(of[name], ddof=1) if len(of[name]) > 1 else 0.0 for name in names]
        if not curve:
            axis.barh(names, mean, xerr=std, capsize=3)
            axis.set(xlabel=f"test {metric}")
            continue
        at = [float(name.rpartition("_")[2]) for name in names]
        axis.errorbar(at, mean, std, fmt="o-", capsize=3)
        if FULL in of:
            axis.axhline(np.mean(of[FULL]), linestyle="--", color="grey", label="the recipe")
            axis.legend()
        axis.set(xscale="symlog" if 0 in at else "log", xlabel=CURVES[group], ylabel=f"test {metric}")
        axis.set_xticks(at, [f"{x:g}" for x in at])
        axis.minorticks_off()
    if group not in CURVES:
        axes[0].invert_yaxis()
    figure.suptitle(f"{group} (bars: standard deviation over seeds)")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(argv) -> int:
    """The ablations, or bad usage as one line on standard error."""
    return in_one_line("ablations.py", ablate)


def ablate() -> str:
    """Runs what is not there yet and returns the report."""
    out = Path(FLAGS.out)
    for group in FLAGS.groups:
        one_of("groups", group, GROUPS)
    parts = []
    for group in FLAGS.groups or groups_of(FLAGS.base):
        flagfiles = write_flagfiles(out / "flags", group)
        command = [
            sys.executable, str(Path(__file__).with_name("tables.py")), f"--out={out}", f"--seeds={FLAGS.seeds}",
            *([f"--data_dir={FLAGS.data_dir}"] if FLAGS.data_dir else []), f"--against={FULL}", "--keep_going",
            *([f"--k={','.join(FLAGS.k)}"] if FLAGS.k else []), *(f"--override={flag}" for flag in FLAGS.override),
            *map(str, flagfiles),
        ]  # fmt: skip
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if done.returncode:  # it has said why
            sys.exit(done.returncode)
        rows = {line.split("|")[1].strip() for line in done.stdout.splitlines() if line.startswith("| ")}
        finished = {path.stem: out / path.stem for path in flagfiles if path.stem in rows}
        # the training-free rankers are the same in every group: they stand in the data set's main table
        lines = [line for line in done.stdout.splitlines() if line and not line.startswith("| *")]
        absent = [path.stem for path in flagfiles if path.stem not in finished]
        lines += [f"| {name} | no result: refused, or diverged with every seed |" for name in absent]
        parts.append("\n".join([f"### {group}", "", *lines, ""]))
        (out / "ablations.md").write_text("\n".join(parts))
        if finished:
            plot(out / f"{group}.png", group, {name: compare.read_runs(home) for name, home in finished.items()})
    return (out / "ablations.md").read_text()


if __name__ == "__main__":
    app.run(main)
