"""Are rows that the server makes for cold items like the rows of warm items? As Markdown and a plot.

    python experiments/alignment.py --data_dir=DATA --out=runs/alignment runs/mdifffr runs/cs_fcf runs/ipfedrec
    python experiments/alignment.py --data_dir=DATA --out=runs/alignment_over_rounds --at=10,30,60 runs/mdifffr

Workdirs are those of single runs on a cold-item split, with a checkpoint. Rows are those of the newest checkpoint, or
with --at those after each of its rounds: a workdir keeps no early checkpoints, so the run is trained again from its
seed, without evaluations (on one device, whose sums may differ in the last bits). Beside them stand two controls:

    halves     one random half of the warm rows against the other: what chance leaves
    normal     normal rows with the warm rows' mean and spread in every dimension: nothing but two moments

    distance   H = E / (2 mean |x - y|), E = 2 mean |x - y| - mean |x - x'| - mean |y - y'|, the energy distance
               (Szekely and Rizzo 2013) as a share: 0 for one distribution, 1 for two that are points
    p          share of --permutations random relabellings with at least this distance
    spread     total variance of the rows over that of the warm rows: below 1 they crowd together

rows.png: warm and made rows on the two main axes of the warm ones (NumPy's SVD). With --at a panel for each round; all
panels of a run show the same items on the main axes of its last one.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import matplotlib
import numpy as np
from absl import app, flags, logging
from scipy.spatial.distance import cdist
from tqdm import tqdm

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from fedjax_rec import Run, compare, load_run
from fedjax_rec.validate import in_one_line, whole_number

FLAGS = flags.FLAGS
flags.DEFINE_string("data_dir", None, "Folder that holds the data set folders, if it has moved since the runs.")
flags.DEFINE_string("out", "runs/alignment", "Folder of alignment.md and rows.png.")
flags.DEFINE_list("at", [], "Rounds to look at, like 10,30,60; default: that of the newest checkpoint.")
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


def rounds_asked() -> list[int]:
    """--at, ascending; empty where it is not given."""
    try:
        rounds = sorted({int(text) for text in FLAGS.at})
    except ValueError:
        raise ValueError(f"--at={','.join(FLAGS.at)}: expected whole numbers, like 10,30,60") from None
    for round_ in rounds[:1]:
        whole_number("--at", round_)
    return rounds


def run_of(workdir: Path, rounds: list[int]) -> Run:
    """The run in a workdir; ValueError if it makes no rows for cold items or was shorter than the last of `rounds`."""
    run = load_run(workdir, data_dir=FLAGS.data_dir)
    if run.experiment.split.candidates is None or "item" not in run.shared:
        raise ValueError(f"{workdir}: expected a run with --split=cold_items of a method that makes item rows")
    if rounds and rounds[-1] > run.round:
        raise ValueError(f"--at={rounds[-1]}: expected rounds of the run in {workdir}, which has {run.round}")
    return run


def trained_again(run: Run, rounds: list[int]) -> list[tuple[int, np.ndarray]]:
    """(round, item rows) after each of the rounds, ascending, of the run trained from its start."""
    ready = run.experiment
    state, found = ready.engine.init(ready.key), []
    for done in tqdm(range(1, rounds[-1] + 1), desc="training again", unit="round", disable=None):
        users = ready.cohort_users(done - 1)
        cohort = None if users is None else ready.engine.cohort(users)
        state, _ = ready.engine.round(ready.key, state, done - 1, cohort)
        if done in rounds:
            found.append((done, item_rows(dataclasses.replace(run, state=state, round=done))))
    return found


def item_rows(run: Run) -> np.ndarray:
    """What clients are shown of all items, warm and made, [items, dim]."""
    return np.array(run.shared["item"], np.float64)


def tables(workdirs: list[Path]) -> str:
    """All workdirs as Markdown, also in OUT/alignment.md, beside OUT/rows.png."""
    if not workdirs:
        raise ValueError("no workdir given, expected those of runs on a cold-item split")
    rounds = rounds_asked()
    runs = [run_of(workdir, rounds) for workdir in workdirs]
    out = Path(FLAGS.out)
    out.mkdir(parents=True, exist_ok=True)
    lines = []
    height, width = (len(runs), len(rounds)) if rounds else (1, len(runs))
    figure, axes = plt.subplots(
        height, width, figsize=(4 * width, 4 * height), layout="constrained", squeeze=False, sharex=True, sharey=True
    )
    panels = iter(axes.flat)
    for workdir, run in zip(workdirs, runs, strict=True):
        candidates = run.experiment.split.candidates
        found = trained_again(run, rounds) if rounds else [(run.round, item_rows(run))]
        last = found[-1][1][candidates["train"]]
        centre = last.mean(0)
        directions = np.linalg.svd(last - centre, full_matrices=False)[2][:2].T
        for round_, table in found:
            rng = np.random.default_rng(0)
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
                lines.append([compare.label(workdir), str(round_), name, *numbers])
            axis = next(panels)
            for rows, label, colour in ((some(warm, rng), "warm", "tab:blue"), (made, "made, cold", "tab:orange")):
                axis.scatter(*((rows - centre) @ directions).T, s=4, alpha=0.5, label=label, color=colour)
            axis.set_title(f"{compare.label(workdir)}, round {round_}", fontsize=9)
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
