"""A run from data to summary: train, evaluate, select, log, save, resume."""

from __future__ import annotations

import dataclasses
import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from fedjax_rec import metrics, reference
from fedjax_rec.checkpoint import Checkpoints
from fedjax_rec.data import clients as clients_module
from fedjax_rec.data import features as features_module
from fedjax_rec.data import readers, splits, synthetic
from fedjax_rec.data.features import Features
from fedjax_rec.data.interactions import Filters, Interactions
from fedjax_rec.data.splits import Split
from fedjax_rec.evaluate import Evaluator, Ranks, make_evaluator
from fedjax_rec.method import Method
from fedjax_rec.methods import METHODS, make_config
from fedjax_rec.protocols import Protocol, describe, protocol
from fedjax_rec.rounds import Cohort, Engine, State, make_engine
from fedjax_rec.system import available_bytes, device_name, peak_memory_bytes, versions
from fedjax_rec.validate import between, one_of, positive
from fedjax_rec.workdir import MetricsLog, UsageError, claim, read_config, write_json, write_npz

STOPPED = "stopped early by a signal"


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Everything that decides what a run computes. Field names are those of the command line's flags.

    Attributes:
        method, settings: a name in METHODS and replacements for its settings.
        dataset, data_dir: what data/readers.py loads.
        split, split_seed, ties: see data/splits.py.
        filters: replacements for the data set's default filters (see data/interactions.Filters).
        filmtrust_time: `item` or `position`, see data/readers.py.
        protocol: honest or published.
        ranking: full, or sampled_99.
        rounds, seed: length and randomness of the run.
        clients_per_round: a number (> 1), a share (<= 1), or 0 for everybody.
        eval_every: rounds between evaluations; the last round is always evaluated.
        eval_clients: evaluate only so many clients (drawn once), 0 for all.
        ks: cut-offs of the metrics.
        select_metric: the validation metric that selects the round.
        patience: stop after so many rounds without a better validation result, 0 for never.
        checkpoint_every: rounds between checkpoints, 0 for only at the end and when stopped.
        block_size, max_buckets, devices: how the engine lays out clients; part of the run's identity because they
            order its sums. devices=0 takes all there are.
    """

    method: str = "fedmf"
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    dataset: str = "synthetic"
    data_dir: str | None = None
    split: str = "leave_one_out"
    split_seed: int = 0
    ties: str = "later_row"
    filters: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    filmtrust_time: str = "item"
    protocol: str = "honest"
    ranking: str = "full"
    rounds: int = 100
    seed: int = 0
    clients_per_round: float = 0
    eval_every: int = 10
    eval_clients: int = 0
    ks: tuple[int, ...] = (10, 50)
    select_metric: str = "NDCG@10"
    patience: int = 0
    checkpoint_every: int = 100
    block_size: int = 0
    max_buckets: int = clients_module.MAX_BUCKETS
    devices: int = 0

    def __post_init__(self):
        one_of("method", self.method, METHODS)
        one_of("split", self.split, ("leave_one_out", "given", "cold_items"))
        one_of("protocol", self.protocol, ("honest", "published"))
        one_of("ranking", self.ranking, ("full", "sampled_99"))
        for name in ("rounds", "eval_every", "max_buckets"):
            positive(name, getattr(self, name))
        for name in ("clients_per_round", "eval_clients", "patience", "checkpoint_every", "block_size", "devices"):
            positive(name, getattr(self, name), zero_allowed=True)
        for k in self.ks:
            positive("ks", k)
        one_of("select_metric", self.select_metric, metrics.per_client(np.ones((1, 1)), tuple(self.ks)))
        between("seed", self.seed, 0, 2**31 - 1)
        if self.clients_per_round > 1 and self.clients_per_round != int(self.clients_per_round):
            raise ValueError(f"clients_per_round={self.clients_per_round}: expected a share <= 1 or a whole number")


@dataclasses.dataclass(frozen=True, eq=False)
class Experiment:
    """A run made ready: data, method, engine, evaluator."""

    config: RunConfig
    interactions: Interactions
    split: Split
    features: dict[str, Features]
    protocol: Protocol
    method: Method
    engine: Engine
    evaluator: Evaluator
    key: jax.Array
    eval_cohort: Cohort | None

    def cohort_users(self, round_: int) -> np.ndarray | None:
        """User ids of a round's cohort, drawn from (seed, round) alone; None for everybody."""
        count = cohort_size(self.config.clients_per_round, self.split.num_users)
        if count == self.split.num_users:
            return None
        rng = np.random.default_rng([self.config.seed, round_])
        return np.sort(rng.choice(self.split.num_users, count, replace=False))


def cohort_size(clients_per_round: float, num_users: int) -> int:
    """Clients in a round.

    Raises:
        UsageError: for a cohort larger than the population.
    """
    if clients_per_round == 0 or clients_per_round == 1.0:
        return num_users
    count = max(round(clients_per_round * num_users), 1) if clients_per_round < 1 else int(clients_per_round)
    if count > num_users:
        raise UsageError(f"--clients_per_round={count}: the data set has {num_users} users; give at most that")
    return count


def load_data(config: RunConfig) -> tuple[Interactions, Split, dict[str, Features]]:
    """Reads, filters and splits the data set, with the features its folder offers."""
    if config.dataset == "synthetic" and not config.filters:
        made = synthetic.make()
        interactions, features = made.interactions, made.features
    else:
        known = readers.DATASETS.get(config.dataset)
        default = known.filters if known else Filters()
        filters = dataclasses.replace(default, **config.filters)
        interactions = readers.load(
            config.dataset, config.data_dir, filters=filters, filmtrust_time=config.filmtrust_time
        )
        features = features_module.load_features(config.dataset, config.data_dir, interactions)
    split = splits.make(interactions, config.split, seed=config.split_seed, data_dir=config.data_dir, ties=config.ties)
    return interactions, split, features


def prepare(config: RunConfig, data: tuple | None = None) -> Experiment:
    """Builds everything a run needs.

    Args:
        config: what to run.
        data: (interactions, split, features) to use instead of loading them.
    """
    interactions, split, features = data or load_data(config)
    chosen = protocol(config.protocol, config.method)
    forced = {k: v for k, v in (("draw", chosen.draw), ("redraw", chosen.redraw)) if v is not None}
    settings = make_config(config.method, {**forced, **config.settings})
    method = METHODS[config.method].build(settings, split.num_users, split.num_items, name=config.method)
    devices = config.devices or len(jax.devices())
    if devices > len(jax.devices()):
        raise UsageError(f"--devices={devices}: only {len(jax.devices())} are there; give at most that, or 0 for all")
    population = clients_module.build(
        split, negative_pool=chosen.negative_pool, num_devices=devices, max_buckets=config.max_buckets
    )
    engine = make_engine(method, population, block_size=config.block_size)
    evaluator = make_evaluator(engine, split, protocol=chosen, sampled=config.ranking == "sampled_99")
    eval_cohort = None
    if 0 < config.eval_clients < split.num_users:
        rng = np.random.default_rng([config.seed, 2**20])
        eval_cohort = engine.cohort(rng.choice(split.num_users, config.eval_clients, replace=False))
    key = jax.random.key(config.seed)
    return Experiment(config, interactions, split, features, chosen, method, engine, evaluator, key, eval_cohort)


def check_memory(engine: Engine) -> dict[str, int]:
    """The estimate of Engine.memory_bytes.

    Raises:
        UsageError: if it does not fit, with a setting that does.
    """
    need, have = engine.memory_bytes(), available_bytes()
    if have is None or need["total"] <= have:
        return need
    fixed = need["total"] - need["block"]
    if fixed <= have and max(engine.block) > 1:
        fits = max(int(max(engine.block) * (have - fixed) / need["block"]), 1)
        remedy = f"set --block_size={fits}"
    else:
        dim = getattr(engine.method.config, "dim", 1)
        remedy = f"set --set dim={max(int(dim * have / need['total'] * 0.9), 1)}, or use more devices"
    detail = ", ".join(f"{name} {bytes_ / 2**30:.2f}" for name, bytes_ in need.items() if name != "total")
    raise UsageError(
        f"the run needs about {need['total'] / 2**30:.2f} GiB ({detail}) and {have / 2**30:.2f} GiB are free: {remedy}"
    )


class StopSignal:
    """Remembers SIGINT and SIGTERM so that a run can end at a round's end with a checkpoint."""

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


@dataclasses.dataclass
class Best:
    """The selected round and its ranks (test ranks are recorded with it, never looked at to choose it)."""

    round: int
    value: float
    ranks: Ranks


def better(protocol_: Protocol, new: float, best: Best | None) -> bool:
    if best is None:
        return True
    return new >= best.value if protocol_.keep == "last" else new > best.value


def train(
    config: RunConfig,
    workdir: str | os.PathLike | None = None,
    *,
    data: tuple | None = None,
    progress: bool = False,
    references: bool = True,
) -> dict[str, Any]:
    """Runs `config` and returns its summary (also written to the workdir, if there is one).

    Args:
        config: what to run.
        workdir: folder for logs and checkpoints; a run that finds its checkpoint there goes on from it.
        data: see prepare.
        progress: show a progress bar.
        references: judge the training-free rankers too (a search over settings leaves them out).

    Returns:
        the summary; its key `status` is "done" or STOPPED.

    Raises:
        UsageError: the workdir is another run's, or the run does not fit in memory.
        FloatingPointError: loss or scores stopped being finite; names the rounds. Checkpoints stay.
    """
    started = time.perf_counter()
    ready = prepare(config, data)
    memory = check_memory(ready.engine)
    folder = None if workdir is None else Path(workdir)
    if folder is not None:
        claim(folder, identity(ready))
    state = ready.engine.init(ready.key)
    best, done, held = None, 0, None
    if folder is not None:
        held = Checkpoints(folder / "checkpoints")
        if held.latest is not None:
            done, state, best = _restore(held, ready, state)
    log = MetricsLog(folder, done) if folder is not None else _MemoryLog()
    timing = {"compile": None}
    bar = tqdm(total=config.rounds, initial=done, unit="round", disable=not progress, dynamic_ncols=True)
    saved = done
    with StopSignal() as stop:
        try:
            while done < config.rounds and not _patience_over(config, best, done):
                line, state, best = _one_round(ready, state, best, done, timing)
                done += 1
                log.append(line)
                _show(bar, line, config)
                if stop.received:
                    break
                if held is not None and config.checkpoint_every and done % config.checkpoint_every == 0:
                    _save(held, done, state, best)
                    saved = done
            finished = done >= config.rounds or _patience_over(config, best, done)
            if held is not None and saved != done:
                _save(held, done, state, best)
        finally:
            bar.close()
            log.close()
            if held is not None:
                held.close()
    summary = _summary(ready, log.lines, best, done, memory, timing, references)
    summary["status"] = "done" if finished else STOPPED
    summary["seconds"]["total"] = time.perf_counter() - started
    if folder is not None and finished:
        write_npz(folder / "per_client.npz", per_client_table(ready, best))
        write_json(folder / "summary.json", summary)
    return summary


def identity(ready: Experiment) -> dict[str, Any]:
    """Everything a workdir's results depend on: the configuration with every default and layout resolved."""
    return {
        **dataclasses.asdict(ready.config),
        "settings": dataclasses.asdict(ready.method.config),
        "devices": ready.engine.mesh.size,
        "block_sizes": list(ready.engine.block),
    }


def evaluate(workdir: str | os.PathLike, **changes: Any) -> dict[str, Any]:
    """Evaluates the newest checkpoint of a workdir; writes and returns evaluation.json.

    Args:
        workdir: of a trained run.
        changes: replacements for evaluation settings of its configuration: ranking, eval_clients, ks.

    Raises:
        UsageError: if there is no run or no checkpoint there.
    """
    folder = Path(workdir)
    held = read_config(folder)
    names = {field.name for field in dataclasses.fields(RunConfig)}
    config = RunConfig(**{k: tuple(v) if k == "ks" else v for k, v in held.items() if k in names})
    if "select_metric" not in changes and config.select_metric not in metrics.per_client(
        np.ones((1, 1)), changes.get("ks", config.ks)
    ):
        changes["select_metric"] = "MRR"
    ready = prepare(dataclasses.replace(config, **changes))
    with Checkpoints(folder / "checkpoints") as checkpoints:
        if checkpoints.latest is None:
            raise UsageError(f"{folder}: holds no checkpoint; train first")
        done, state, _ = _restore(checkpoints, ready, ready.engine.init(ready.key))
    ranks = ready.evaluator.ranks(ready.key, state, done, ready.eval_cohort)
    said = {
        **{k: getattr(ready.config, k) for k in ("method", "dataset", "protocol", "ranking", "seed")},
        "leaks": list(ready.protocol.leaks),
        "best_round": done,
        **results_of(ready, ranks),
        "reference_rankers": reference_results(ready, done),
    }
    write_json(folder / "evaluation.json", said)
    return said


class _MemoryLog:
    """Stands for MetricsLog in a run without a workdir."""

    def __init__(self):
        self.lines: list[dict[str, Any]] = []

    def append(self, line) -> None:
        self.lines.append(line)

    def close(self) -> None:
        pass


def _patience_over(config: RunConfig, best: Best | None, done: int) -> bool:
    return bool(config.patience) and best is not None and done - best.round >= config.patience


def _one_round(ready: Experiment, state: State, best: Best | None, round_: int, timing: dict):
    """Runs and, where it is due, evaluates round number `round_` (0-based)."""
    config, engine = ready.config, ready.engine
    users = ready.cohort_users(round_)
    cohort = None if users is None else engine.cohort(users)
    began = time.perf_counter()
    state, info = engine.round(ready.key, state, round_, cohort)
    info = {name: float(value) for name, value in jax.device_get(info).items()}
    seconds = {"train": time.perf_counter() - began}
    if timing["compile"] is None:
        timing["compile"] = seconds["train"]
        seconds["first"] = True
    clients = int(info.pop("clients"))
    if not np.isfinite(info["loss"]):
        raise FloatingPointError(
            f"the loss is {info['loss']} after round {round_ + 1}: lower --set lr or --set item_lr_scale; "
            "the last checkpoint stays"
        )
    line = {"round": round_ + 1, **info, "clients": clients}
    if (round_ + 1) % config.eval_every == 0 or round_ + 1 == config.rounds:
        began = time.perf_counter()
        ranks = ready.evaluator.ranks(ready.key, state, round_ + 1, ready.eval_cohort)
        seconds["evaluate"] = time.perf_counter() - began
        if ranks.nonfinite:
            raise FloatingPointError(
                f"{ranks.nonfinite} scores are not finite after round {round_ + 1}: lower --set lr or "
                "--set item_lr_scale; the last checkpoint stays"
            )
        line["valid"] = metrics.summarise(ranks.valid, config.ks)
        line["test"] = metrics.summarise(ranks.test, config.ks)
        value = line["valid"][config.select_metric]
        if better(ready.protocol, value, best):
            best = Best(round_ + 1, value, ranks)
    line["seconds"] = seconds
    return line, state, best


def _show(bar: tqdm, line: Mapping[str, Any], config: RunConfig) -> None:
    if "valid" in line:
        bar.last_metric = {f"valid {config.select_metric}": f"{line['valid'][config.select_metric]:.4f}"}
    bar.set_postfix({"loss": f"{line['loss']:.4f}", **getattr(bar, "last_metric", {})}, refresh=False)
    bar.update()


def _save(held: Checkpoints, done: int, state: State, best: Best | None) -> None:
    ranks = {} if best is None else {"valid": best.ranks.valid, "test": best.ranks.test, "top": best.ranks.recommended}
    notes = {} if best is None else {"best_round": best.round, "best_value": best.value}
    held.save(done, {"state": state, "best": ranks}, notes)


def _restore(held: Checkpoints, ready: Experiment, fresh: State) -> tuple[int, State, Best | None]:
    """The newest checkpoint, in the shapes and places of a fresh state."""
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
    done, tree = held.load({"state": fresh, "best": shapes})
    best = None
    if shapes:
        ranks = Ranks(tree["best"]["valid"], tree["best"]["test"], tree["best"]["top"], 0)
        best = Best(notes["best_round"], notes["best_value"], ranks)
    return done, tree["state"], best


# ---- results -----------------------------------------------------------------------------------------------


def results_of(ready: Experiment, ranks: Ranks) -> dict[str, Any]:
    """Everything that is said of one set of ranks."""
    ks, split = ready.config.ks, ready.split
    popularity = reference.popularity_of(split)
    seen = seen_targets(split, ranks.test)
    top = min(10, split.num_items)
    return {
        "valid": metrics.summarise(ranks.valid, ks),
        "test": {
            **metrics.summarise(ranks.test, ks),
            **metrics.beyond_accuracy(ranks.recommended, popularity, top),
            "MRR_worst_decile": metrics.worst_decile(ranks.test),
        },
        "test_seen": metrics.summarise(np.where(seen, ranks.test, np.nan), ks),
        "test_unseen": metrics.summarise(np.where(seen, np.nan, ranks.test), ks),
    }


def seen_targets(split: Split, ranks: np.ndarray) -> np.ndarray:
    """Which test targets occur in somebody's training data, in the layout of `ranks`; False for padding."""
    offsets = clients_module.row_offsets(split.test.user, split.num_users)
    users = np.arange(split.num_users)
    items = clients_module.padded_rows(split.test, users, offsets, ranks.shape[1], split.num_items)
    return np.append(reference.popularity_of(split) > 0, False)[items]


def per_client_table(ready: Experiment, best: Best) -> dict[str, np.ndarray]:
    """What per_client.npz holds: one row per user, in user order.

    user_id (raw), train_items, valid_rank and test_rank [users, targets], test_item (raw ids, "" for padding),
    test_seen, mean_popularity of the history, and each test metric.
    """
    split = ready.split
    offsets = clients_module.row_offsets(split.test.user, split.num_users)
    users = np.arange(split.num_users)
    items = clients_module.padded_rows(split.test, users, offsets, best.ranks.test.shape[1], split.num_items)
    popularity = reference.popularity_of(split)
    history = np.bincount(split.train.user, minlength=split.num_users)
    taste = np.bincount(split.train.user, popularity[split.train.item], split.num_users) / np.maximum(history, 1)
    return {
        "user_id": ready.interactions.user_ids.astype(str),
        "train_items": history,
        "mean_popularity": taste,
        "valid_rank": best.ranks.valid,
        "test_rank": best.ranks.test,
        "test_item": np.append(ready.interactions.item_ids.astype(str), "")[items],
        "test_seen": seen_targets(split, best.ranks.test),
        **metrics.per_client(best.ranks.test, ready.config.ks),
    }


def reference_results(ready: Experiment, rounds: int) -> dict[str, Any]:
    """All training-free rankers under the run's protocol, {name: {valid, test, test_seen, test_unseen}}."""
    evaluator, cohort = ready.evaluator, ready.eval_cohort
    said = {n: results_of(ready, r) for n, r in reference.popularity_rankers(evaluator, cohort).items()}
    draws = [results_of(ready, r) for r in reference.random_ranker(evaluator, ready.config.seed, cohort)]
    said["random"] = jax.tree.map(lambda *values: float(np.mean(values)), *draws)
    content = reference.content_profile(evaluator, ready.features, cohort)
    if content is not None:
        said["content_profile"] = results_of(ready, content)
    users = None
    share = reference.affordable_share(evaluator, rounds)
    if share < 1 and cohort is None:
        rng = np.random.default_rng([ready.config.seed, 2**21])
        users = rng.choice(ready.split.num_users, max(int(share * ready.split.num_users), 1), replace=False)
        cohort = ready.engine.cohort(users)
    # under post_local the judged model has also seen the draws of the local update it is scored after
    seen = rounds + (ready.method.evaluate_at == "post_local")
    replayed = reference.least_sampled(evaluator, ready.key, seen, participation(ready, rounds, seen), cohort)
    if replayed is not None:
        said["least_sampled"] = results_of(ready, replayed)
    return said


def participation(ready: Experiment, rounds: int, seen: int) -> np.ndarray | None:
    """Who took part in which round, bool [users, seen]; None where everybody always did."""
    if ready.cohort_users(0) is None:
        return None
    took_part = np.zeros((ready.split.num_users, seen), bool)
    for round_ in range(rounds):
        took_part[ready.cohort_users(round_), round_] = True
    took_part[:, rounds:] = True
    return took_part


def _summary(ready: Experiment, lines, best: Best | None, done: int, memory, timing, references) -> dict[str, Any]:
    config = ready.config
    trained = [line["seconds"]["train"] for line in lines if not line["seconds"].get("first")]
    evaluated = [line["seconds"]["evaluate"] for line in lines if "evaluate" in line["seconds"]]
    median = lambda values: float(np.median(values)) if values else None
    said = results_of(ready, best.ranks) if best is not None else {}
    return {
        "method": config.method,
        "backbone": None,
        "settings": dataclasses.asdict(ready.method.config),
        "dataset": config.dataset,
        "counts": {
            **ready.interactions.counts,
            "users": ready.split.num_users,
            "items": ready.split.num_items,
            "train": len(ready.split.train.item),
            "valid": len(ready.split.valid.item),
            "test": len(ready.split.test.item),
            "padding_fraction": ready.engine.clients.padding_fraction,
        },
        "protocol": config.protocol,
        "leaks": list(ready.protocol.leaks),
        "ranking": config.ranking,
        "split": config.split,
        "tie_rule": ready.split.tie_rule,
        "seed": config.seed,
        "rounds": done,
        "best_round": best.round if best else None,
        "select_metric": config.select_metric,
        **said,
        "reference_rankers": reference_results(ready, best.round) if best and references else {},
        "seconds": {
            "compile": timing["compile"],
            "train_round_median": median(trained),
            "eval_median": median(evaluated[1:] or evaluated),
        },
        "bytes": ready.engine.bytes_per_client(),
        "memory_estimate_bytes": memory,
        "peak_memory_bytes": peak_memory_bytes(),
        "block_sizes": list(ready.engine.block),
        "versions": versions(),
        "device": device_name(),
    }


def introduction(ready: Experiment) -> str:
    """What a person should know before a run: data, protocol, sizes."""
    sent = ready.engine.bytes_per_client()
    need = ready.engine.memory_bytes()["total"]
    buckets = ", ".join(
        f"{b.user.shape[0]} clients of up to {b.history.shape[1]} items (blocks of {n})"
        for b, n in zip(ready.engine.clients.buckets, ready.engine.block, strict=True)
    )
    return "\n".join(
        [
            splits.describe(ready.interactions, ready.split),
            f"padding        {ready.engine.clients.padding_fraction:.1%} of history slots; {buckets}",
            f"bytes          down {sent['down']:,} up {sent['up']:,} per client and round (full tables)",
            f"memory         about {need / 2**20:,.0f} MiB on {ready.engine.mesh.size} x {device_name()}",
            describe(ready.protocol),
        ]
    )
