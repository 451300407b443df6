"""Launches a run from flags or a flagfile: data in, workdir out. `python launch.py --help` lists the flags.

Exit codes: 0 done, 1 stopped early by a signal without a workdir (nothing was saved), 2 bad usage or bad input (one
line on standard error), 3 the loss or scores are no longer finite, 75 stopped early by a signal with a checkpoint saved
(start the same command again to go on).
"""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
from pathlib import Path

import jax
from absl import app, flags

EXIT_LOST, EXIT_USAGE, EXIT_DIVERGED, EXIT_AGAIN = 1, 2, 3, 75
FLAGS = flags.FLAGS


class Cohort(flags.ArgumentParser):
    """Reads 1 as one client and 1.0 as the share of all."""

    def parse(self, argument: str | int) -> int | float:
        try:
            return int(str(argument))
        except ValueError:
            return number("--clients_per_round", argument, float, "a whole number, or a share like 0.25")


flags.DEFINE_enum("mode", "train", ["train", "evaluate", "benchmark", "search"], "What to do.")
flags.DEFINE_string("workdir", None, "Folder of the run; a run with a checkpoint there is resumed.")
flags.DEFINE_string("method", "fedmf", "Method; an unknown name is answered with the known ones.")
flags.DEFINE_multi_string("set", [], "A method setting, key=value; repeat for more.")
flags.DEFINE_string("backbone", None, "Client model of the methods that work over several; short for --set backbone=.")
flags.DEFINE_string("dataset", "synthetic", "Data set name, or path of a .csv, .inter or Amazon .json.gz.")
flags.DEFINE_string("data_dir", None, "Folder that holds the data set folders.")
flags.DEFINE_multi_string("features", [], "Item features of the encoders, modality=FILE.npz; repeat for more.")
flags.DEFINE_string("split", "leave_one_out", "leave_one_out, given or cold_items.")
flags.DEFINE_integer(
    "split_seed", 0, "--split=cold_items: 0 for the published parts where there are some, else the seed of the draw."
)
flags.DEFINE_string("ties", "later_row", "Which of two equal timestamps is newer: later_row or earlier_row.")
flags.DEFINE_multi_string(
    "filter", [], "A data filter: min_user, min_item, user_core, item_core, min_rating or min_pairs=value."
)
flags.DEFINE_string("filmtrust_time", "item", "FilmTrust has no time: rank of the item, or position in the user.")
flags.DEFINE_string("protocol", "honest", "honest, or published (the method's released protocol with its leaks).")
flags.DEFINE_string("ranking", "full", "full, or sampled_99 (against 99 sampled items).")
flags.DEFINE_integer("rounds", 100, "Federated rounds.")
flags.DEFINE_integer("seed", 0, "Seed of everything the run draws.")
flags.DEFINE_integer("seeds", 0, "Run so many seeds, from --seed on, into WORKDIR/seed_<n>; 0 for one run.")
flags.DEFINE_multi_string("grid", [], "--mode=search: a setting and its values, key=v1,v2; repeat for more.")
flags.DEFINE_integer("trials", 0, "--mode=search: points of the grid at most, drawn at random; 0 for all.")
flags.DEFINE(
    Cohort(), "clients_per_round", 0, "Clients in a round: a whole number, a share (1.0 is all), or 0 for all."
)
flags.DEFINE_integer("eval_every", 10, "Rounds between evaluations.")
flags.DEFINE_integer("eval_clients", 0, "Evaluate on so many clients, drawn once; 0 for all.")
flags.DEFINE_list("k", None, "Cut-offs of the metrics; default: 10,50, on cold items 20,50,100.")
flags.DEFINE_string("ndcg", "correct", "correct, or released: NDCG_released@k beside it, to compare with papers alone.")
flags.DEFINE_string(
    "select_metric", None,
    "Validation metric that selects the round, or a sum of some, A+B; default: NDCG@10, on cold items the recalls.",
)  # fmt: skip
flags.DEFINE_integer("patience", 0, "Stop after so many rounds without improvement on validation; 0 for never.")
flags.DEFINE_integer("checkpoint_every", 100, "Rounds between checkpoints; 0 for only at the end.")
flags.DEFINE_integer("block_size", 0, "Clients per block; 0 chooses.")
flags.DEFINE_integer(
    "max_buckets", 0, "Padded history widths at most; more run faster and compile longer. 0: up to 4, if worth it."
)
flags.DEFINE_integer("devices", 0, "Devices to spread the clients over; 0 for all.")
flags.DEFINE_string("dp_mechanism", "none", "Noise on what clients send: none, gaussian or laplace.")
flags.DEFINE_float("dp_clip", 0.0, "Bound on the norm of an upload (gaussian: L2, laplace: L1); 0 does not clip.")
flags.DEFINE_float("dp_noise", 0.0, "Standard deviation (gaussian) or scale (laplace) of the noise on every entry.")
flags.DEFINE_string("dp_rows", "all", "Rows of item tables that get noise: all, or touched (no epsilon holds then).")
flags.DEFINE_float("dp_delta", 1e-5, "The delta of the epsilon that is reported.")
flags.DEFINE_integer("cpu_devices", 0, "On the CPU, virtual devices to make: 0 for one per core.")
flags.DEFINE_integer("benchmark_rounds", 20, "Timed rounds of --mode=benchmark.")
flags.DEFINE_bool("progress", True, "Show a progress bar.")
flags.DEFINE_bool("plots", True, "Write plots into the workdir (needs the extra `plots`).")
flags.DEFINE_string("compile_cache", None, "Folder of compiled programs, kept between runs.")

RUN_FLAGS = (
    "dataset", "data_dir", "split", "split_seed", "ties", "filmtrust_time", "protocol", "ranking", "rounds", "seed",
    "clients_per_round", "eval_every", "eval_clients", "ndcg", "select_metric", "patience", "checkpoint_every",
    "block_size", "max_buckets", "devices", "dp_mechanism", "dp_clip", "dp_noise", "dp_rows", "dp_delta",
)  # fmt: skip
"""Flags that are fields of RunConfig as they stand."""
JUDGED_BY = ("ranking", "eval_clients", "ndcg", "data_dir")
"""Those of them that --mode=evaluate takes."""
TRAINED_BY = tuple(name for name in ("method", *RUN_FLAGS) if name not in (*JUDGED_BY, "checkpoint_every"))
"""Flags that say what a finished run is, and so cannot be given anew to --mode=evaluate."""


def assignments(pairs: list[str], flag: str) -> dict[str, str]:
    """key=value flags as a dictionary."""
    for pair in pairs:
        if "=" not in pair:
            raise ValueError(f"--{flag}={pair}: expected key=value")
    return dict(pair.split("=", 1) for pair in pairs)


def use_cores() -> None:
    """One virtual CPU device per core: a round's client loop runs on one core per device."""
    count = FLAGS.cpu_devices or len(os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else [0])
    jax.config.update("jax_num_cpu_devices", count)


def settings_from_flags() -> dict[str, str]:
    """--set=key=value and --backbone, not yet of the settings' types."""
    given = assignments(FLAGS.set, "set")
    if FLAGS.backbone and given.get("backbone", FLAGS.backbone) != FLAGS.backbone:
        raise ValueError(f"--backbone={FLAGS.backbone} and --set=backbone={given['backbone']}: leave one of both out")
    return given | ({"backbone": FLAGS.backbone} if FLAGS.backbone else {})


def filters_from_flags() -> dict[str, float]:
    """--filter=name=value, checked."""
    from fedjax_rec.data.interactions import Filters
    from fedjax_rec.validate import nearest

    known = [field.name for field in dataclasses.fields(Filters)]
    filters = {}
    for name, value in assignments(FLAGS.filter, "filter").items():
        if name not in known:
            raise ValueError(f"--filter={name}: expected one of {', '.join(known)}{nearest(name, known)}")
        kind, expected = (float, "a number") if name == "min_rating" else (int, "a whole number")
        filters[name] = number(f"--filter={name}", value, kind, expected)
    return filters


def features_from_flags() -> dict[str, str]:
    """--features=modality=FILE.npz, each modality once."""
    given = assignments(FLAGS.features, "features")
    if len(given) < len(FLAGS.features):
        raise ValueError(f"--features={','.join(FLAGS.features)}: expected one file for each modality")
    return given


def grid_from_flags() -> dict[str, str]:
    """--grid=key=v1,v2, each setting once."""
    given = assignments(FLAGS.grid, "grid")
    if len(given) < len(FLAGS.grid):
        raise ValueError(f"--grid {' --grid '.join(FLAGS.grid)}: expected each setting once, with all of its values")
    return given


def check_mode() -> None:
    """That no flag of another mode was given: it would do nothing."""
    of_mode = {"grid": "search", "trials": "search", "seeds": "train", "benchmark_rounds": "benchmark"}
    for name, mode in of_mode.items():
        if FLAGS[name].present and FLAGS[name].value and FLAGS.mode != mode:
            raise ValueError(f"--{name} does nothing in --mode={FLAGS.mode}; give --mode={mode}, or leave it out")


def number(name: str, text: str, kind: type, expected: str) -> float:
    try:
        return kind(text)
    except ValueError:
        raise ValueError(f"{name}={text}: expected {expected}") from None


def cut_offs() -> tuple[int, ...] | None:
    """None where none are given."""
    if FLAGS.k is None:
        return None
    return tuple(number("--k", k, int, "whole numbers, like 10,50") for k in FLAGS.k)


def config_from_flags():
    from fedjax_rec.methods import make_config
    from fedjax_rec.run import RunConfig

    settings = settings_from_flags()
    chosen = make_config(FLAGS.method, settings)
    return RunConfig(
        method=FLAGS.method,
        settings={name: getattr(chosen, name) for name in settings},
        filters=filters_from_flags(),
        features=features_from_flags(),
        ks=cut_offs(),
        **{name: FLAGS[name].value for name in RUN_FLAGS},
    )


def may_have_moved(home: str) -> bool:
    """Whether the data set of the run in a workdir is a file, and --dataset another place of one: what is in it is
    compared when it is read."""
    from fedjax_rec.data.readers import is_path
    from fedjax_rec.run import config_of

    return FLAGS["dataset"].present and is_path(FLAGS.dataset) and is_path(config_of(Path(home)).dataset)


def check_same_run(home: str) -> None:
    """That flags which only training obeys say what the run in a workdir was trained with."""
    from fedjax_rec.experiment import filters_of
    from fedjax_rec.methods import make_config
    from fedjax_rec.run import config_of

    held = config_of(Path(home))
    given = [name for name in TRAINED_BY if FLAGS[name].present]
    if may_have_moved(home):
        given.remove("dataset")
    said = [(f"--{name}", FLAGS[name].value, getattr(held, name)) for name in given]
    settings, filters = settings_from_flags(), filters_from_flags()
    if settings:
        had = make_config(held.method, held.settings)
        if settings.get("backbone", "") in ("", getattr(had, "backbone", "")):  # another one has no use for the others
            asked = make_config(held.method, {**held.settings, **settings})
            said += [(f"--set {name}", getattr(asked, name), getattr(had, name)) for name in settings]
        else:
            said.append(("--set backbone", settings["backbone"], getattr(had, "backbone", None)))
    said += [(f"--filter {name}", value, getattr(filters_of(held), name)) for name, value in filters.items()]
    for flag, value, trained in said:
        if value != trained:
            raise ValueError(
                f"{flag}={value} does nothing in --mode=evaluate: the run in {home} has {trained}; leave it out"
            )


def again(what: str) -> int:
    print(f"{what}: start again to go on", file=sys.stderr)
    return EXIT_AGAIN


def workdir() -> str:
    if not FLAGS.workdir:
        asked = f"--seeds={FLAGS.seeds}" if FLAGS.seeds and FLAGS.mode == "train" else f"--mode={FLAGS.mode}"
        raise ValueError(f"{asked}: expected --workdir, where the results go")
    return FLAGS.workdir


def train_seeds() -> int:
    from fedjax_rec import report, run, seeds

    def each(summary, folder):
        print(report.table(summary), flush=True)
        if FLAGS.plots:
            report.plots(folder)

    home = workdir()
    said = seeds.train_seeds(config_from_flags(), home, FLAGS.seeds, progress=FLAGS.progress, each=each)
    if said["seeds"]:
        print(seeds.table(said))
    if said["failed"]:
        raise FloatingPointError("; ".join(f"seed {seed}: {why}" for seed, why in said["failed"].items()))
    return again(run.STOPPED) if said["status"] == run.STOPPED else 0


def search() -> int:
    from fedjax_rec import run
    from fedjax_rec import search as searching

    home = workdir()
    config = config_from_flags()
    lines, status = searching.search(config, grid_from_flags(), home, trials=FLAGS.trials)
    if status == run.STOPPED:
        return again(f"{run.STOPPED} after trial {len(lines)}")
    print(searching.table(config, lines))
    return 0


def train() -> int:
    from fedjax_rec import report, run

    if FLAGS.seeds:
        return train_seeds()
    config = config_from_flags()
    ready = run.prepare(config)
    print(run.introduction(ready), flush=True)
    summary = run.train(config, FLAGS.workdir or None, ready=ready, progress=FLAGS.progress)
    if summary["status"] == run.STOPPED:
        said = f"{run.STOPPED} after round {summary['rounds']}"
        if FLAGS.workdir:
            return again(said)
        print(f"launch.py: {said}: nothing was saved; give --workdir to go on", file=sys.stderr)
        return EXIT_LOST
    print(report.table(summary))
    if FLAGS.workdir and FLAGS.plots:
        report.plots(FLAGS.workdir)
    return 0


def main(argv: list[str]) -> int:
    if len(argv) > 1:
        raise ValueError(f"{argv[1]!r}: expected flags only, like --{argv[1].lstrip('-')}")
    check_mode()
    use_cores()
    if FLAGS.compile_cache:
        jax.config.update("jax_compilation_cache_dir", FLAGS.compile_cache)
    if FLAGS.mode == "benchmark":
        from fedjax_rec import benchmark

        print(benchmark.table(benchmark.run(config_from_flags(), FLAGS.workdir or None, rounds=FLAGS.benchmark_rounds)))
        return 0
    if FLAGS.mode == "search":
        return search()
    if FLAGS.mode == "evaluate":
        from fedjax_rec import report, run
        from fedjax_rec.workdir import write_json

        home = workdir()
        check_same_run(home)
        # what is not given on the command line is as in the run
        given = {name: FLAGS[name].value for name in JUDGED_BY if FLAGS[name].present}
        if FLAGS["k"].present:
            given["ks"] = cut_offs()
        if may_have_moved(home):
            given["dataset"] = FLAGS.dataset
        if FLAGS.features:
            given["features"] = features_from_flags()
        said = run.judge(home, **given)
        print(report.table(said), flush=True)
        write_json(Path(home) / "evaluation.json", said)  # after the table, which a folder that is read-only still gets
        return 0
    return train()


def checked_main(argv: list[str]) -> int:
    """main, with bad usage, bad input and what the system refuses as one line on standard error."""
    try:
        return main(argv)
    except KeyboardInterrupt:  # before the first round or between two runs; within one it is remembered
        if FLAGS.workdir:
            return again("stopped")
        print("launch.py: stopped: nothing was saved; give --workdir to go on", file=sys.stderr)
        return EXIT_LOST
    except (ValueError, FloatingPointError) as error:
        print(f"launch.py: {error}", file=sys.stderr)
        return EXIT_DIVERGED if isinstance(error, FloatingPointError) else EXIT_USAGE
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        said = f"{where}{error.strerror or error}; check the path, its permissions and the space left"
        print(f"launch.py: {' '.join(said.split())}", file=sys.stderr)
        return EXIT_USAGE


def command_line() -> int:
    app.define_help_flags()
    try:
        arguments = FLAGS(sys.argv)
    except SystemExit:  # --help has printed its text, which absl counts as a failure
        return 0
    except flags.Error as error:
        print(f"launch.py: {error}; --help lists the flags", file=sys.stderr)
        return EXIT_USAGE
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    return checked_main(arguments)


if __name__ == "__main__":
    sys.exit(command_line())
