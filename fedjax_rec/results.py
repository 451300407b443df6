"""What is said of a run: metrics of ranks, the training-free rankers, the summary, the table of clients."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from fedjax_rec import metrics, reference
from fedjax_rec.data.clients import padded_rows, row_offsets
from fedjax_rec.data.splits import Split
from fedjax_rec.evaluate import TOP, Ranks
from fedjax_rec.experiment import Experiment
from fedjax_rec.privacy import accounting
from fedjax_rec.system import device_name, peak_memory_bytes, versions


@dataclasses.dataclass
class Best:
    """The selected round and its ranks (test ranks are recorded with it, never looked at to choose it)."""

    round: int
    value: float
    ranks: Ranks


def judged_by(ready: Experiment, part: str) -> tuple[tuple[int, ...], str, int | None]:
    """What metrics.per_client wants beside the ranks of a part, `valid` or `test`."""
    return *ready.config.judged, ready.split.competing(part)


def results_of(ready: Experiment, ranks: Ranks) -> dict[str, Any]:
    """Everything that is said of one set of ranks."""
    split = ready.split
    valid, test = (judged_by(ready, part) for part in ("valid", "test"))
    popularity = reference.popularity_of(split)
    seen = seen_targets(split, ranks.test)
    top = min(TOP, split.num_items)
    return {
        "valid": metrics.summarise(ranks.valid, *valid),
        "test": {
            **metrics.summarise(ranks.test, *test),
            **metrics.beyond_accuracy(ranks.recommended, popularity, top),
            "MRR_worst_decile": metrics.worst_decile(ranks.test),
        },
        "test_seen": metrics.summarise(np.where(seen, ranks.test, np.nan), *test),
        "test_unseen": metrics.summarise(np.where(seen, np.nan, ranks.test), *test),
    }


def seen_targets(split: Split, ranks: np.ndarray) -> np.ndarray:
    """Which test targets occur in somebody's training data, in the layout of `ranks`; False for padding."""
    offsets = row_offsets(split.test.user, split.num_users)
    users = np.arange(split.num_users)
    items = padded_rows(split.test, users, offsets, ranks.shape[1], split.num_items)
    return np.append(reference.popularity_of(split) > 0, False)[items]


def per_client_table(ready: Experiment, best: Best) -> dict[str, np.ndarray]:
    """What per_client.npz holds: one row per user, in user order.

    user_id (raw), train_items, valid_rank and test_rank [users, targets], test_item (raw ids, "" for padding),
    test_seen, mean_popularity of the history, and each test metric.
    """
    split = ready.split
    offsets = row_offsets(split.test.user, split.num_users)
    users = np.arange(split.num_users)
    items = padded_rows(split.test, users, offsets, best.ranks.test.shape[1], split.num_items)
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
        **metrics.per_client(best.ranks.test, *judged_by(ready, "test")),
    }


def reference_results(ready: Experiment, rounds: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """All training-free rankers under the run's protocol, one after the other: (name, {valid, test, test_seen,
    test_unseen})."""
    evaluator, cohort = ready.evaluator, ready.eval_cohort
    # under post_local the judged model has also seen the draws of the local update it is scored after
    seen = rounds + (ready.method.evaluate_at == "post_local")
    draws = reference.Draws(ready.key, seen, participation(ready, rounds, seen))
    rankers = reference.Rankers(evaluator, ready.features, cohort, draws)
    replayed = rankers
    share = reference.affordable_share(evaluator, rounds)
    if share < 1 and cohort is None:
        rng = np.random.default_rng([ready.config.seed, 2**21])
        users = rng.choice(ready.split.num_users, max(int(share * ready.split.num_users), 1), replace=False)
        replayed = dataclasses.replace(rankers, cohort=ready.engine.cohort(users))
    for name, ranks in rankers.popularity().items():
        yield name, results_of(ready, ranks)
    at_random = [results_of(ready, ranks) for ranks in rankers.random(ready.config.seed)]
    yield "random", jax.tree.map(lambda *values: float(np.mean(values)), *at_random)
    for name, ranks in rankers.content().items():
        yield name, results_of(ready, ranks)
    for name, ranker in reference.RANKERS.items():
        if (ranks := ranker(evaluator, cohort)) is not None:
            yield name, results_of(ready, ranks)
    if (ranks := replayed.least_sampled()) is not None:
        yield "least_sampled", results_of(ready, ranks)


def participation(ready: Experiment, rounds: int, seen: int) -> np.ndarray | None:
    """Who took part in which round, bool [users, seen]; None where everybody always did."""
    if ready.cohort_users(0) is None:
        return None
    took_part = np.zeros((ready.split.num_users, seen), bool)
    for round_ in range(rounds):
        took_part[ready.cohort_users(round_), round_] = True
    took_part[:, rounds:] = True
    return took_part


def summarise(
    ready: Experiment, lines: list[dict], best: Best | None, done: int, rankers: dict[str, Any], compile_s: float | None
) -> dict[str, Any]:
    """summary.json: the selected round, what it is compared with, what it cost.

    Args:
        lines: of metrics.jsonl.
        best: the selected round, or None if nothing was evaluated.
        done: rounds run.
        rankers: those of reference_results by name.
        compile_s: the seconds of the run's first round in this process, or None if it ran none; nearly all of it is
            compilation, but where an earlier seed has compiled the same.
    """
    config = ready.config
    trained = [line["seconds"]["train"] for line in lines if not line["seconds"].get("first")]
    evaluated = [line["seconds"]["evaluate"] for line in lines if "evaluate" in line["seconds"]]
    median = lambda values: float(np.median(values)) if values else None
    said = results_of(ready, best.ranks) if best is not None else {}
    privacy = accounting.report(ready, done)
    return {
        "method": config.method,
        "backbone": getattr(ready.method.config, "backbone", None),
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
        "reference_rankers": rankers,
        **({"privacy": privacy} if privacy else {}),
        "seconds": {
            "compile": compile_s,
            "train_round_median": median(trained),
            "eval_median": median(evaluated[1:] or evaluated),
        },
        "bytes": ready.engine.bytes_per_client(),
        "memory_estimate_bytes": ready.engine.memory_bytes(),
        "peak_memory_bytes": peak_memory_bytes(),
        "block_sizes": list(ready.engine.block),
        "versions": versions(),
        "device": device_name(),
    }
