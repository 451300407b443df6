"""Runs flagfiles over several seeds and prints Markdown tables, one per data set, split and protocol, beside the
training-free rankers.

    python experiments/tables.py --data_dir=DATA --out=runs/tables --seeds=5 --against=fedmf experiments/ku_*.flags

The seeds of a flagfile are workdirs OUT/<flagfile>/seed_<n>, made by one launch.py, which compiles once for them;
finished ones are not run again, and those made with other flags are lengthened or refused. A row is named by its
flagfile, without the data set and the split. The last column is the paired difference to --against;
--claims=a>b,c>d are judged below the table at every cut-off, by the mean of the per-client differences with its 95 %
interval for other clients and other seeds (`metrics.paired_difference`). A claim is true or false where the interval
leaves zero out, else open. A run has the cut-offs of its flagfile; where --k is given it has those
instead, and the ones that its round is selected at.

With --keep finished rows are also written to --kept (experiments/results), a small file each: every client's metrics
by seed, without ids. What is kept there is printed, and judged by --claims, in a moment and without training:

    python experiments/tables.py --norun --against=fedavg "--claims=fedvlr_fcf>fcf" experiments/ml_latest_small_*.flags

--norun prints the rows that are in OUT, else those kept, and leaves out what is in neither.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from absl import app, flags

from fedjax_rec import compare, metrics
from fedjax_rec.compare import Runs
from fedjax_rec.experiment import CUT_OFFS, RunConfig, default_selection
from fedjax_rec.validate import in_one_line, nearest
from fedjax_rec.workdir import UsageError, read_json, write_json

FLAGS = flags.FLAGS
flags.DEFINE_string("data_dir", None, "Folder that holds the data set folders.")
flags.DEFINE_string("out", "runs/tables", "Folder of the workdirs.")
flags.DEFINE_integer("seeds", 5, "Seeds 0 .. n-1 of every flagfile.")
flags.DEFINE_string("against", "fedmf", "Row that the others are compared with, client by client.")
flags.DEFINE_list("claims", [], "Claims to judge, as better>worse by row names.")
flags.DEFINE_list("k", [], "Cut-offs shown, which all runs get; default: those that all runs of a table have.")
flags.DEFINE_multi_string("override", [], "A flag handed to every run after its flagfile, e.g. --rounds=50.")
flags.DEFINE_bool("run", True, "False: only print what is there.")
flags.DEFINE_bool("keep", False, "Write finished rows to --kept too, over what is there.")
flags.DEFINE_string("kept", str(Path(__file__).with_name("results")), "Folder of kept rows.")
flags.DEFINE_bool("keep_going", False, "Leave out a flagfile that is refused, instead of stopping at it.")

LAUNCH = Path(__file__).resolve().parent.parent / "launch.py"
REFUSED, DIVERGED = 2, 3  # exit codes of launch.py
OF_THE_PLACE = compare.LAYOUT | {"cpu_devices", "data_dir", "workdir", "compile_cache", "checkpoint_every", "k"}
"""Flags that say where and how a recipe runs, not what it is (which cut-offs are kept, the file itself says)."""
TABLE_OF = "dataset", "split", "protocol"
DEFAULTS = {name: getattr(RunConfig, name) for name in TABLE_OF}
"""The defaults of what is read in flagfiles."""


def read_flags(flagfile: Path) -> list[str]:
    """What a flagfile, those it includes and --override say."""
    try:
        return FLAGS.read_flags_from_files([f"--flagfile={flagfile}"]) + FLAGS.override
    except flags.Error as error:
        raise UsageError(str(error)) from None


def given_flags(flagfile: Path) -> dict[str, str]:
    """The same by flag; of repeated flags the last."""
    return dict(line.lstrip("-").split("=", 1) for line in read_flags(flagfile) if "=" in line)


def every_flag(flagfile: Path) -> list[str]:
    """All that a run of a flagfile depends on."""
    return read_flags(flagfile) + cut_offs(flagfile)


def what_matters(lines: Sequence[str]) -> list[str]:
    """The flags that make a recipe what it is; of files of features the modality."""
    kept = [line for line in lines if line.lstrip("-").split("=")[0] not in OF_THE_PLACE]
    return [re.sub("^(--features=[^=]*)=.*", r"\1", line) for line in kept]


def kept_place(flagfile: Path) -> Path:
    """The file of a row that is kept."""
    return Path(FLAGS.kept) / f"{flagfile.stem}.npz"


def keep(flagfile: Path, runs: Runs) -> None:
    """Writes a row that this flagfile made.

    Raises:
        UsageError: another one, or none, made some of it.
    """
    matters = what_matters(read_flags(flagfile))
    for folder in runs.folders:
        record = folder / "asked.json"
        made_by = what_matters(read_json(record)["flags"]) if record.exists() else None
        if made_by != matters:
            said = "it does not say by which flags" if made_by is None else f"by {' '.join(made_by)}"
            raise UsageError(
                f"{folder}: not made by {flagfile} as it is ({said}); leave out --norun, or use another --out"
            )
    compare.keep(runs, kept_place(flagfile), matters)


def cut_offs(flagfile: Path) -> list[str]:
    """--k for a run, where the user gave it: with the cut-offs that the run is selected at."""
    if not FLAGS.k:
        return []
    said = DEFAULTS | given_flags(flagfile)
    own = said["k"].split(",") if "k" in said else CUT_OFFS.get(said["split"], ())
    selected = said.get("select_metric") or default_selection(said["split"], own)
    every = {*map(int, FLAGS.k), *map(int, re.findall(r"@(\d+)", selected))}
    # cut-offs that are shown do not select
    named = [f"--select_metric={selected}"] if said["split"] in CUT_OFFS and "select_metric" not in said else []
    return [f"--k={','.join(map(str, sorted(every)))}", *named]


def run_seeds(flagfile: Path, home: Path) -> bool:
    """False for a flagfile that was refused and is to be left out."""
    asked = {"flags": every_flag(flagfile)}
    folders = [home / compare.SEED_FOLDER.format(seed) for seed in range(FLAGS.seeds)]
    said = [folder / "asked.json" for folder in folders if (folder / "summary.json").exists()]
    if len(said) == FLAGS.seeds and all(record.exists() and read_json(record) == asked for record in said):
        return True
    print(f"{flagfile.stem}, {FLAGS.seeds} seeds", file=sys.stderr, flush=True)
    # a cache that the environment names serves more than these tables
    cache = [] if os.environ.get("JAX_COMPILATION_CACHE_DIR") else [f"--compile_cache={Path(FLAGS.out) / 'compiled'}"]
    command = [
        sys.executable, str(LAUNCH), f"--flagfile={flagfile}", "--seed=0", f"--seeds={FLAGS.seeds}",
        f"--workdir={home}", *([f"--data_dir={FLAGS.data_dir}"] if FLAGS.data_dir else []), "--noprogress", "--noplots",
        "--checkpoint_every=0", *cache, *cut_offs(flagfile), *FLAGS.override,
    ]  # fmt: skip
    code = subprocess.run(command, stdout=subprocess.DEVNULL).returncode
    if code == DIVERGED:
        print(f"{home}: not all seeds have a result (see above); the table counts those that do", file=sys.stderr)
    elif code == REFUSED and FLAGS.keep_going:
        print(f"{flagfile}: refused (see above), left out", file=sys.stderr)
        return False
    elif code:  # refused or stopped: no finding about the method
        sys.exit(code)
    for folder in folders:
        if (folder / "summary.json").exists():
            write_json(folder / "asked.json", asked)
    return True


def row_name(flagfile: str, dataset: str) -> str:
    return flagfile.removeprefix(f"{dataset.replace('-', '_')}_").removeprefix("cold_items_")


def places(flagfiles: Sequence[Path]) -> dict[Path, tuple[str, str]]:
    """The table and the row of every flagfile.

    Raises:
        UsageError: two that make one row.
    """
    made: dict[tuple[str, str], Path] = {}
    for flagfile in flagfiles:
        said = DEFAULTS | given_flags(flagfile)
        place = " ".join(said[name] for name in TABLE_OF), row_name(flagfile.stem, said["dataset"])
        if place in made:
            raise UsageError(
                f"{made[place]} and {flagfile} are both row {place[1]} of {place[0]}; expected one flagfile for a row: "
                "rename one"
            )
        made[place] = flagfile
    return {flagfile: place for place, flagfile in made.items()}


def check(made: Sequence[tuple[str, str]]) -> None:
    """That --k, --against and --claims can be answered by these tables and rows.

    Raises:
        UsageError: names what is wrong.
    """
    if not all(k.isdecimal() and int(k) for k in FLAGS.k):
        raise UsageError(f"--k={','.join(FLAGS.k)}: expected whole numbers > 0, like 10,50")
    rows = defaultdict(set)
    for group, row in made:
        rows[group].add(row)
    every = sorted(set().union(*rows.values()))
    asked = [("--against", FLAGS.against, [FLAGS.against])] if FLAGS["against"].present else []
    for claim in FLAGS.claims:
        sides = claim.split(">")
        if len(sides) != 2:
            raise UsageError(f"--claims={claim}: expected better>worse, by row names")
        asked.append(("--claims", claim, sides))
    for flag, value, names in asked:
        for name in names:
            if name not in every:
                raise UsageError(
                    f"{flag}={value}: no row {name!r}; expected some of {', '.join(every)}{nearest(name, every)}"
                )
        if not any(set(names) <= held for held in rows.values()):
            raise UsageError(f"{flag}={value}: the two are rows of different tables ({'; '.join(rows)}); expected one")


def shown(runs: Sequence[Runs]) -> list[int]:
    """The cut-offs of a table.

    Raises:
        UsageError: a run has not those of --k, or there are none that all have.
    """
    common = compare.cut_offs(runs)
    missing = sorted({*map(int, FLAGS.k)} - {*common})
    if missing or not common:
        said = "; ".join(f"{one.name} {','.join(map(str, one.configs[0]['ks']))}" for one in runs)
        wanted = (
            f"--k={','.join(FLAGS.k)}: expected runs that have them" if FLAGS.k else "no cut-off that all runs have"
        )
        raise UsageError(f"{wanted}, there are {said}; use another --k, or another --out to run them again")
    return [int(k) for k in FLAGS.k] or common


def table(runs: dict[str, Runs]) -> str:
    """Markdown for the rows of one data set and split."""
    ks = shown(list(runs.values()))
    cold = next(iter(runs.values())).configs[0]["split"] == "cold_items"  # users have several targets, all unseen
    names = compare.shown(next(iter(runs.values())).configs[0]["split"], ks)
    wide = names[-2:]
    parts = () if cold else ("test_seen", "test_unseen")
    head = ["", *names, *(f"{m} {part.removeprefix('test_')}" for m in wide for part in parts), "seeds", "round"]
    head += [f"{wide[1]} - {FLAGS.against}"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for name, one in runs.items():
        said = one.summaries
        cells = [compare.spread([s["test"][m] for s in said]) for m in names]
        cells += [compare.spread([s[part][m] for s in said]) for m in wide for part in parts]
        cells += [str(len(said)), f"{np.mean([s['best_round'] for s in said]):.0f}"]
        cells += [_difference(runs, name, FLAGS.against, wide[1]) if name != FLAGS.against in runs else ""]
        lines.append("| " + " | ".join([name, *cells]) + " |")
    rankers: dict[str, dict] = {}  # of the first run that has each: EASE draws no negatives for least_sampled
    for one in runs.values():
        rankers = one.summaries[0]["reference_rankers"] | rankers
    for name, ranker in rankers.items():
        cells = [f"{ranker['test'][m]:.4f}" for m in names]
        cells += ["-" if ranker[part][m] is None else f"{ranker[part][m]:.4f}" for m in wide for part in parts]
        lines.append("| " + " | ".join([f"*{name}*", *cells, "", "", ""]) + " |")
    claims = [verdict(runs, claim, m) for claim in FLAGS.claims for m in names if set(claim.split(">")) <= set(runs)]
    return "\n".join([*lines, "", *claims])


def _paired(runs: dict[str, Runs], name: str, other: str, metric: str) -> tuple[np.ndarray, np.ndarray]:
    return runs[name].by_client(metric), runs[other].by_client(metric)


def _difference(runs: dict[str, Runs], name: str, other: str, metric: str) -> str:
    return compare.paired(*_paired(runs, name, other, metric))


def verdict(runs: dict[str, Runs], claim: str, metric: str) -> str:
    """A line that says whether the claim holds."""
    better, worse = claim.split(">")
    sides = _paired(runs, better, worse, metric)
    _, low, high = metrics.paired_difference(*sides)
    holds = "true" if low > 0 else "false" if high < 0 else "open"
    alone = "; one seed, so for other clients alone" if min(map(len, sides)) == 1 else ""
    return f"* {better} beats {worse}, {metric}: **{holds}** ({compare.paired(*sides)}{alone})"


def tables(flagfiles: Sequence[Path]) -> None:
    """Runs what is not there yet and prints the tables."""
    if not flagfiles:
        raise UsageError("no flagfile given, expected some, like experiments/ku_*.flags")
    placed, out = places(flagfiles), Path(FLAGS.out)
    check(list(placed.values()))
    if FLAGS.keep:  # what could not be written is better known before hours of training
        for flagfile in placed:
            if kept_place(flagfile).exists():
                compare.read_kept(kept_place(flagfile), what_matters(read_flags(flagfile)))
    accepted = [flagfile for flagfile in placed if not FLAGS.run or run_seeds(flagfile, out / flagfile.stem)]
    if not accepted:
        raise UsageError(f"all of {', '.join(path.stem for path in placed)} were refused (see above)")
    found: dict[str, dict[str, Runs]] = defaultdict(dict)
    for flagfile in accepted:
        group, row = placed[flagfile]
        home, kept = out / flagfile.stem, kept_place(flagfile)
        if any(home.glob(compare.SEED_FOLDER.format("*") + "/summary.json")):
            found[group][row] = compare.read_runs(home)
            if FLAGS.keep:
                keep(flagfile, found[group][row])
        elif not FLAGS.run and kept.exists():
            found[group][row] = compare.read_kept(kept, what_matters(read_flags(flagfile)))
        else:
            nor_kept = "" if FLAGS.run else f" and none kept in {FLAGS.kept}"
            print(f"{flagfile.stem}: left out, no finished run in {out}{nor_kept}", file=sys.stderr)
    if not found and not FLAGS.run:
        raise UsageError(f"none of these has a finished run in {out} or is kept in {FLAGS.kept}; leave out --norun")
    rows = set().union(*found.values())
    for claim in FLAGS.claims:
        absent = ", ".join(sorted({*claim.split(">")} - rows))
        if absent:
            print(f"--claims={claim}: not judged, no result of {absent}", file=sys.stderr)
    for group, runs in found.items():
        compare.check_comparable(list(runs.values()))
        print(f"{group}\n\n" * (len(found) > 1) + table(runs), flush=True)


def main(argv) -> int:
    """The tables, or bad usage and bad input as one line on standard error."""
    return in_one_line("tables.py", lambda: tables([Path(name) for name in argv[1:]]))


if __name__ == "__main__":
    app.run(main)
