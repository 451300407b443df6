"""Are rows that the server makes for cold items like the rows of warm items? As Markdown and a plot.

    python experiments/alignment.py --data_dir=DATA --out=runs/alignment runs/mdifffr runs/cs_fcf runs/ipfedrec

Workdirs are those of single runs on a cold-item split, with a checkpoint; one run at several lengths (--rounds) shows
how its rows move. For each of them, and beside them two controls that every run has:

    halves     one random half of the warm rows against the other: what chance leaves
    normal     normal rows with the warm rows' mean and spread in every dimension: nothing but two moments

    distance   H = E / (2 mean |x - y|), E = 2 mean |x - y| - mean |x - x'| - mean |y - y'|, the energy distance
               (Szekely and Rizzo 2013) as a share: 0 for one distribution, 1 for two that are points
    p          share of --permutations random relabellings with at least this distance
    spread     total variance of the rows over that of the warm rows: below 1 they crowd together

rows.png: warm and made rows on the two main axes of the warm ones.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
from absl import app, flags, logging
from scipy.spatial.distance import cdist

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from fedjax_rec import compare, load_run
from fedjax_rec.validate import in_one_line

FLAGS = flags.FLAGS
flags.DEFINE_string("data_dir", None, "Folder that holds the data set folders, if it has moved since the runs.")
flags.DEFINE_string("out", "runs/alignment", "Folder of alignment.md and rows.png.")
flags.DEFINE_integer("rows", 1000, "Rows at most on either side, drawn at random.")
flags.DEFINE_integer("permutations", 200, "Relabellings behind p.")


def energy_share(apart: np.ndarray, first: np.ndarray) -> float:
    """H from all distances [n, n] and which rows are of the first sample, bool [n]."""
    one, two = np.flatnonzero(first), np.flatnonzero(~first)
    between = apart[np.ix_(one, two)].mean()
    within = apart[np.ix_(one, one)].mean() + apart[np.ix_(two, two)].mean()
    return float((2 * between - within) / (2 * between)) if between else 0.0


def compare_samples(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> tuple[float, float]:
    """(H, p) of two samples of rows."""
    both = np.concatenate([x, y])
    apart, first = cdist(both, both), np.arange(len(both)) < len(x)
    found = energy_share(apart, first)
    by_chance = [energy_share(apart, rng.permutation(first)) for _ in range(FLAGS.permutations)]
    return found, (1 + sum(h >= found for h in by_chance)) / (1 + FLAGS.permutations)


def some(rows: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return rows[rng.permutation(len(rows))[: FLAGS.rows]]


def tables(workdirs: list[Path]) -> str:
    """All workdirs as Markdown, also in OUT/alignment.md, beside OUT/rows.png."""
    if not workdirs:
        raise ValueError("no workdir given, expected those of runs on a cold-item split")
    runs = [load_run(workdir, data_dir=FLAGS.data_dir) for workdir in workdirs]
    out = Path(FLAGS.out)
    out.mkdir(parents=True, exist_ok=True)
    lines = []
    figure, axes = plt.subplots(
        1, len(workdirs), figsize=(4 * len(workdirs), 4), layout="constrained", squeeze=False, sharex=True, sharey=True
    )
    for workdir, run, axis in zip(workdirs, runs, axes[0], strict=True):
        candidates = run.experiment.split.candidates
        if candidates is None or "item" not in run.shared:
            raise ValueError(f"{workdir}: expected a run with --split=cold_items of a method that makes item rows")
        rng = np.random.default_rng(0)
        table = np.asarray(run.shared["item"], np.float64)
        warm, made = table[candidates["train"]], some(table[candidates["test"]], rng)
        order = rng.permutation(len(warm))
        samples = {
            "made": (some(warm, rng), made),
            "halves": (some(warm[order[::2]], rng), some(warm[order[1::2]], rng)),
            "normal": (some(warm, rng), warm.mean(0) + warm.std(0) * rng.standard_normal(made.shape)),
        }
        for name, (x, y) in samples.items():
            distance, p = compare_samples(x, y, rng)
            spread = y.var(0).sum() / warm.var(0).sum()
            numbers = f"{distance:.4f}", f"{p:.3f}", f"{spread:.2f}"
            lines.append([compare.label(workdir), str(run.round), name, *numbers])
        centre = warm.mean(0)
        directions = np.linalg.svd(warm - centre, full_matrices=False)[2][:2].T
        for rows, label, colour in ((some(warm, rng), "warm", "tab:blue"), (made, "made, cold", "tab:orange")):
            axis.scatter(*((rows - centre) @ directions).T, s=4, alpha=0.5, label=label, color=colour)
        axis.set_title(f"{compare.label(workdir)}, round {run.round}", fontsize=9)
        axis.legend()
    figure.savefig(out / "rows.png", dpi=120)
    text = compare.markdown("### Rows made and warm", ["run", "rounds", "rows", "distance", "p", "spread"], lines)
    (out / "alignment.md").write_text(text)
    return text


def main(argv) -> int:
    """The tables, or bad usage and bad input as one line on standard error."""
    logging.set_verbosity(logging.WARNING)  # checkpoints tell much
    return in_one_line("alignment.py", lambda: tables([Path(name) for name in argv[1:]]))


if __name__ == "__main__":
    app.run(main)
