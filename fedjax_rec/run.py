"""A run from data to summary: train, evaluate, select, log, save, resume."""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from fedjax_rec import metrics
from fedjax_rec.checkpoint import Checkpoints
from fedjax_rec.evaluate import Ranks
from fedjax_rec.experiment import (
    Experiment,
    RunConfig,
    check_memory,
    cohort_size,
    content_hash,
    data_hash,
    features_hash,
    identity,
    introduction,
    load_data,
    prepare,
)
from fedjax_rec.privacy import accounting
from fedjax_rec.protocols import Protocol
from fedjax_rec.results import Best, judged_by, per_client_table, reference_results, results_of, summarise
from fedjax_rec.rounds import State
from fedjax_rec.types import PyTree
from fedjax_rec.workdir import (
    IMMATERIAL,
    MetricsLog,
    UsageError,
    claim,
    differences,
    read_config,
    read_json,
    write_json,
    write_npz,
)

__all__ = [
    "STOPPED",
    "Experiment",
    "RunConfig",
    "check_memory",
    "cohort_size",
    "evaluate",
    "introduction",
    "judge",
    "load_data",
    "prepare",
    "train",
]

STOPPED = "stopped early by a signal"


class StopSignal:
    """Remembers SIGINT and SIGTERM so that a run can end between two rounds or rankers with a checkpoint."""

    def __init__(self):
        self.received = False

    def __enter__(self) -> StopSignal:
        self._before = {}
        try:
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._remember)
        except ValueError:  # not the main thread: somebody else owns the signals
            pass
        return self

    def _remember(self, number, frame) -> None:
        self.received = True

    def __exit__(self, *exc) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def better(protocol_: Protocol, new: float, best: Best | None) -> bool:
    if best is None:
        return True
    return new >= best.value if protocol_.keep == "last" else new > best.value


def train(config: RunConfig, workdir: str | os.PathLike | None = None, **options: Any) -> dict[str, Any]:
    """`train_state` without the state: runs `config` and returns its summary."""
    return train_state(config, workdir, **options)[0]


def train_state(
    config: RunConfig,
    workdir: str | os.PathLike | None = None,
    *,
    data: tuple | None = None,
    ready: Experiment | None = None,
    progress: bool = False,
    references: bool = True,
) -> tuple[dict[str, Any], Experiment, State]:
    """Runs `config`; its summary is also written to the workdir, if there is one. Of a run that is finished there the
    summary is read, not made anew.

    Args:
        config: what to run.
        workdir: folder for logs and checkpoints; a run that finds its checkpoint there goes on from it, also to more
            rounds than it was begun with.
        data: see prepare.
        ready: what prepare made of `config`, where a program has it; several seeds of one (`with_seed`) compile once.
        progress: show a progress bar.
        references: judge the training-free rankers too (a search over settings leaves them out).

    Returns:
        the summary, whose key `status` is "done" or STOPPED; what was run; the state after its last round.

    Raises:
        UsageError: the workdir is another run's, or the run does not fit in memory.
        ValueError: `ready` was made of another configuration.
        FloatingPointError: loss or scores stopped being finite; names the rounds. Checkpoints stay.
    """
    started = time.perf_counter()
    if ready is not None and ready.config != config:
        raise ValueError("ready was made of another configuration; expected what prepare makes of the given one")
    ready = ready or prepare(config, data)
    check_memory(ready.engine)
    accounting.check(ready)
    folder = None if workdir is None else Path(workdir)
    if folder is not None:
        lengthen(folder, identity(ready))
        claim(folder, identity(ready))
    state, best, done, held = None, None, 0, None
    if folder is not None:
        held = Checkpoints(folder / "checkpoints")
        if held.latest is not None:
            done, state, best = _restore(held, ready, ready.engine.shapes(ready.key))
        if _finished(config, best, done) and (folder / "summary.json").exists():
            held.close()
            if not (folder / "per_client.npz").exists():
                write_npz(folder / "per_client.npz", per_client_table(ready, best))
            # not made anew: what it says of times, memory, versions and device is the run's, not this process's
            return read_json(folder / "summary.json"), ready, state
    if state is None:
        state = ready.engine.init(ready.key)
    log = MetricsLog(folder, done) if folder is not None else _MemoryLog()
    clock = _Clock()
    sent: deque[tuple[int, PyTree]] = deque()
    bar = tqdm(total=config.rounds, initial=done, unit="round", disable=not progress, dynamic_ncols=True)
    resumed_at = saved = done
    bar.set_description("compiling")
    with StopSignal() as stop:
        try:
            while not _finished(config, best, done):
                state, info = _send_round(ready, state, done)
                done += 1
                sent.append((done, info))
                judges = done % config.eval_every == 0 or done == config.rounds
                saves = held is not None and config.checkpoint_every and done % config.checkpoint_every == 0
                # one round stays on its way while the next is sent off, so that a device need not wait for the host
                while len(sent) > (0 if judges or saves else 1):
                    line = _read_round(*sent.popleft(), clock)
                    if judges and not sent:
                        best = _judge_round(ready, state, line, best, clock)
                    log.append(line)
                    _show(bar, line, config)
                if stop.received:
                    break
                if saves:
                    _save(held, done, state, best)
                    saved = done
                    clock.read()  # no round's time
            while sent:  # on its way when the signal came
                line = _read_round(*sent.popleft(), clock)
                log.append(line)
                _show(bar, line, config)
            finished = _finished(config, best, done)
            if held is not None and saved != done:
                _save(held, done, state, best)
        finally:
            bar.close()
            log.close()
            if held is not None:
                held.close()
        rankers = {}
        if finished and references and best:
            if progress:
                print("judging the training-free rankers", file=sys.stderr)
            for name, said in reference_results(ready, best.round):
                rankers[name] = said
                finished = not stop.received
                if not finished:
                    break
        summary = summarise(ready, log.lines, best, done, rankers, clock.compile)
        summary["status"] = "done" if finished else STOPPED
        earlier = [line["seconds"] for line in log.lines if line["round"] <= resumed_at]  # of processes before this one
        spent = sum(seconds["train"] + seconds.get("evaluate", 0.0) for seconds in earlier)
        summary["seconds"]["total"] = time.perf_counter() - started + spent
        if folder is not None and finished:
            write_npz(folder / "per_client.npz", per_client_table(ready, best))
            write_json(folder / "summary.json", summary)
    return summary, ready, state


def evaluate(workdir: str | os.PathLike, **changes: Any) -> dict[str, Any]:
    """`judge`, written to evaluation.json."""
    said = judge(workdir, **changes)
    write_json(Path(workdir) / "evaluation.json", said)
    return said


def judge(workdir: str | os.PathLike, **changes: Any) -> dict[str, Any]:
    """Judges the selected round of a workdir by the ranks that its newest checkpoint keeps. The model of that round is
    not kept: where other ranks are asked for (`ranking`, `eval_clients`), the checkpoint's own round is judged instead.

    Args:
        workdir: of a trained run.
        changes: replacements for evaluation settings of its configuration: ranking, eval_clients, ks, ndcg; and for
            data_dir and features (files by modality), where its data have moved.

    Returns:
        what evaluation.json holds; `selected_round` and `judged_round` (also as `round`) may differ.

    Raises:
        UsageError: if there is no run or no checkpoint there, or the data are not those of the run.
    """
    folder = Path(workdir)
    config = config_of(folder)
    dataclasses.replace(config, **{**changes, "select_metric": "MRR"})  # refuses what is impossible
    known = metrics.per_client(np.ones((1, 1)), changes.get("ks", config.ks), changes.get("ndcg", config.ndcg))
    if "select_metric" not in changes and not set(config.select_metric.split("+")) <= set(known):
        changes["select_metric"] = "MRR"
    ready = prepare(dataclasses.replace(config, **changes))
    check_same_data(folder, ready, "give the --data_dir and --features that it had")
    done, state, best = _newest(folder, ready)
    same = all(getattr(config, name) == getattr(ready.config, name) for name in ("ranking", "eval_clients", "protocol"))
    if same and best is not None:
        judged, ranks = best.round, best.ranks
    else:
        judged, ranks = done, ready.evaluator.ranks(ready.key, state, done, ready.eval_cohort)
        _check_finite(ranks, done)
    return {
        **{k: getattr(ready.config, k) for k in ("method", "dataset", "split", "protocol", "ranking", "seed")},
        "select_metric": config.select_metric,
        "leaks": list(ready.protocol.leaks),
        "round": judged,
        "selected_round": best.round if best else None,
        "judged_round": judged,
        **results_of(ready, ranks),
        "reference_rankers": dict(reference_results(ready, judged)),
    }


def check_same_data(folder: Path, ready: Experiment, remedy: str) -> None:
    """That the data and given features are those of the run; of a run without a data_hash, recorded by an earlier
    version, users and test items are looked at where it is finished.

    Raises:
        UsageError: ends with the remedy.
    """
    held = read_config(folder)
    told = held.get("features_hash", {})
    if told != features_hash(ready.config, ready.features):
        names = ", ".join(told)
        raise UsageError(f"{folder}: the features named {names} are not those the run was trained on; {remedy}")
    content = content_hash(ready.config, ready.features).get("content_hash")
    if held.get("content_hash", content) != content:
        raise UsageError(f"{folder}: the item features are not those the run was trained on; {remedy}")
    if not _same_pairs(folder, held.get("data_hash"), ready):
        raise UsageError(
            f"{folder}: the users, items or pairs of '{ready.config.dataset}' are not those the run was trained on; "
            f"{remedy}"
        )


def _same_pairs(folder: Path, recorded: str | None, ready: Experiment) -> bool:
    interactions, test = ready.interactions, ready.split.test
    if recorded is not None:
        return recorded == data_hash(interactions, ready.split)
    path = folder / "per_client.npz"
    if not path.exists():
        return True
    with np.load(path) as held:
        users, tests = held["user_id"], held["test_item"]
    same = np.array_equal(users, interactions.user_ids.astype(str))
    return same and np.array_equal(tests[tests != ""], interactions.item_ids.astype(str)[test.item])


def config_of(workdir: Path) -> RunConfig:
    """The configuration that a workdir was run with; UsageError if there is none."""
    held = read_config(workdir)
    if held.get("clients_per_round") == 1:  # earlier versions wrote 1.0 for one client
        held["clients_per_round"] = 1
    names = {field.name for field in dataclasses.fields(RunConfig)}
    return RunConfig(**{k: tuple(v) if k == "ks" else v for k, v in held.items() if k in names})


def restore(workdir: Path, ready: Experiment, like: State | None = None) -> tuple[int, State]:
    """(rounds done, state) of the newest checkpoint of a workdir, in the shapes and places of `like` (default: those
    of a fresh state); UsageError if there is none."""
    return _newest(workdir, ready, like)[:2]


def _newest(workdir: Path, ready: Experiment, like: State | None = None) -> tuple[int, State, Best | None]:
    folder = workdir / "checkpoints"
    if not folder.is_dir():  # opening it would make it
        raise UsageError(f"{workdir}: holds no checkpoint; train first")
    with Checkpoints(folder) as checkpoints:
        if checkpoints.latest is None:
            raise UsageError(f"{workdir}: holds no checkpoint; train first")
        return _restore(checkpoints, ready, like or ready.engine.shapes(ready.key))


class _MemoryLog:
    """Stands for MetricsLog in a run without a workdir."""

    def __init__(self):
        self.lines: list[dict[str, Any]] = []

    def append(self, line) -> None:
        self.lines.append(line)

    def close(self) -> None:
        pass


def lengthened(folder: Path, given: Mapping[str, Any]) -> dict[str, Any] | None:
    """The configuration of the run in a folder with more rounds, where these are all that is asked for beside it; else
    None (`claim` refuses the rest).

    Raises:
        UsageError: its last round was evaluated out of turn, and perhaps selected, as in no longer run.
    """
    if not (folder / "config.json").exists():
        return None
    there = read_config(folder)
    rounds, every = there.get("rounds", 0), given["eval_every"]
    if given["rounds"] <= rounds or differences(there, given, "there", "given", IMMATERIAL | {"rounds"}):
        return None
    if _rounds_kept(folder) >= rounds and rounds % every:
        raise UsageError(
            f"--rounds={given['rounds']}: {folder} holds a run of {rounds} rounds, the last of which was evaluated "
            f"though it is no multiple of --eval_every={every}, as it is not in a longer run: use another --workdir"
        )
    return {**there, "rounds": given["rounds"]}


def lengthen(folder: Path, given: Mapping[str, Any]) -> None:
    """Gives the run in a folder its `lengthened` configuration. What it said at its end stays as summary_<rounds>.json.

    Raises:
        UsageError: see `lengthened`; nothing is changed then.
    """
    config = lengthened(folder, given)
    if config is None:
        return
    rounds = read_config(folder).get("rounds", 0)
    summary = folder / "summary.json"
    # a run that was stopped has none, and one whose patience was over stays finished
    if _rounds_kept(folder) >= rounds and summary.exists():
        # before it is a longer one, so that what is stopped on the way there does not look finished
        summary.rename(folder / f"summary_{rounds}.json")
    write_json(folder / "config.json", config)


def _rounds_kept(folder: Path) -> int:
    with Checkpoints(folder / "checkpoints") as held:
        return held.latest or 0


def _finished(config: RunConfig, best: Best | None, done: int) -> bool:
    return done >= config.rounds or _patience_over(config, best, done)


def _patience_over(config: RunConfig, best: Best | None, done: int) -> bool:
    if not config.patience or best is None or done % config.eval_every:
        return False
    return done - best.round >= config.patience


class _Clock:
    """Seconds since the last reading; the first is a run's compilation."""

    def __init__(self):
        self.at = time.perf_counter()
        self.compile: float | None = None

    def read(self) -> float:
        before, self.at = self.at, time.perf_counter()
        return self.at - before


def _send_round(ready: Experiment, state: State, round_: int) -> tuple[State, PyTree]:
    """Sends round number `round_` (0-based) off to the devices: (the state after it, what it will tell)."""
    users = ready.cohort_users(round_)
    cohort = None if users is None else ready.engine.cohort(users)
    return ready.engine.round(ready.key, state, round_, cohort)


def _read_round(done: int, info: PyTree, clock: _Clock) -> dict[str, Any]:
    """A round's line of the log, once it is done."""
    info = {name: float(value) for name, value in jax.device_get(info).items()}
    seconds = {"train": clock.read()}
    if clock.compile is None:
        clock.compile = seconds["train"]
        seconds["first"] = True
    clients = int(info.pop("clients"))
    if not np.isfinite(info["loss"]):
        raise FloatingPointError(
            f"the loss is {info['loss']} after round {done}: lower --set lr or --set item_lr_scale; "
            "the last checkpoint stays"
        )
    return {"round": done, **info, "clients": clients, "seconds": seconds}


def _judge_round(ready: Experiment, state: State, line: dict[str, Any], best: Best | None, clock: _Clock):
    """Adds an evaluation to a round's line: the selected round so far."""
    config, done = ready.config, line["round"]
    ranks = ready.evaluator.ranks(ready.key, state, done, ready.eval_cohort)
    line["seconds"]["evaluate"] = clock.read()
    _check_finite(ranks, done)
    line["valid"] = metrics.summarise(ranks.valid, *judged_by(ready, "valid"))
    line["test"] = metrics.summarise(ranks.test, *judged_by(ready, "test"))
    value = metrics.read(line["valid"], config.select_metric)
    return Best(done, value, ranks) if better(ready.protocol, value, best) else best


def _check_finite(ranks: Ranks, rounds: int) -> None:
    if ranks.nonfinite:
        raise FloatingPointError(
            f"{ranks.nonfinite} scores are not finite after round {rounds}: lower --set lr or --set item_lr_scale; "
            "the last checkpoint stays"
        )


def _show(bar: tqdm, line: Mapping[str, Any], config: RunConfig) -> None:
    if "valid" in line:
        bar.last_metric = {f"valid {config.select_metric}": f"{metrics.read(line['valid'], config.select_metric):.4f}"}
    bar.set_description("training")
    bar.set_postfix({"loss": f"{line['loss']:.4f}", **getattr(bar, "last_metric", {})}, refresh=False)
    bar.update()


def _save(held: Checkpoints, done: int, state: State, best: Best | None) -> None:
    ranks = {} if best is None else {"valid": best.ranks.valid, "test": best.ranks.test, "top": best.ranks.recommended}
    notes = {} if best is None else {"best_round": best.round, "best_value": best.value}
    held.save(done, {"state": state, "best": ranks}, notes)


def _restore(held: Checkpoints, ready: Experiment, like: State) -> tuple[int, State, Best | None]:
    """The newest checkpoint, in the shapes and places of `like`."""
    notes = held.notes()
    shapes = {}
    if "best_round" in notes:
        users = ready.split.num_users
        valid, test = (t.shape[1] for t in ready.evaluator.targets[0])
        shapes = {
            "valid": np.zeros((users, valid), np.float32),
            "test": np.zeros((users, test), np.float32),
            "top": np.zeros(ready.split.num_items, np.int32),
        }
    done, tree = held.load({"state": like, "best": shapes})
    best = None
    if shapes:
        ranks = Ranks(tree["best"]["valid"], tree["best"]["test"], tree["best"]["top"], 0)
        best = Best(notes["best_round"], notes["best_value"], ranks)
    return done, tree["state"], best
