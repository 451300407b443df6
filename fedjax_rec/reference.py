"""Rankers without any training, which stand beside every result. A model that does not beat them has learned
nothing; a protocol under which they do well leaks.

    random           what chance earns
    popularity       training interactions of the item
    unseen_first     items absent from training first, then by popularity: wins where held-out items are absent
    least_sampled    items by how rarely they were drawn as this user's negative: wins where held-out items are
                     never negatives. Replays the method's draws from its keys.
    content_profile  cosine of the item's features with the mean features of the user's history
    content_centred  the same without the features' common direction (CLIP rows share most of theirs)
    others           what a program puts into RANKERS
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from fedjax_rec.client_step import client_key, streams
from fedjax_rec.data.features import Features
from fedjax_rec.data.sampling import draw_local_data
from fedjax_rec.data.splits import Split
from fedjax_rec.evaluate import Evaluator, Ranks
from fedjax_rec.item_sources import directions
from fedjax_rec.rounds import Cohort
from fedjax_rec.types import PRNGKey

RANKERS: dict[str, Callable[[Evaluator, Cohort | None], Ranks | None]] = {}
"""Further rankers for every result: name -> function of the evaluator and the clients to judge (None: all). None leaves
it out. `same_for_all` makes one of a score for each item; scores that differ by user: Evaluator.ranks_of."""
RANDOM_REPEATS = 20
MAX_REPLAYED = 10**9  # draws of least_sampled; beyond, it is judged on a sample of clients


def popularity_of(split: Split) -> np.ndarray:
    """Training interactions of each item, int64 [items]."""
    return np.bincount(split.train.item, minlength=split.num_items)


def _shared_scores(engine, scores, sharded, slot, record, size, steps):
    return scores


def _random_scores(engine, key, sharded, slot, record, size, steps):
    return jax.random.uniform(jax.random.fold_in(key, record.user), (engine.clients.num_items,))


def _content_scores(engine, features, sharded, slot, record, size, steps):
    mine = features.at[record.history].get(mode="fill", fill_value=0.0)
    return features @ mine.sum(0)


def _least_sampled_scores(engine, replicated, took_part, slot, record, size, steps):
    """Minus the number of times that each item was this user's negative in rounds 0 .. rounds-1."""
    key, rounds = replicated
    spec, method = engine.clients, engine.method

    def one_round(round_, counts):
        k_draw = streams(client_key(key, round_, record.user))[0]
        data = draw_local_data(
            k_draw, record, method.sampling, size, spec.num_items, engine.pool, steps, round_
        )  # fmt: skip
        here = True if took_part is None else took_part.at[slot, round_].get(mode="fill", fill_value=False)
        rows, times = data.samples.negatives()
        return counts.at[data.rows[rows]].add(times * here, mode="drop")

    return -jax.lax.fori_loop(0, rounds, one_round, jnp.zeros(spec.num_items))


def stacked_features(features: Mapping[str, Features], common: np.ndarray | None = None) -> Float[Array, "items feat"]:
    """All modalities side by side, each row of each modality scaled to length 1; 0 where an item has none.

    Args:
        common: bool [items]; the mean row of those of these that are present is taken from all, and what is left scaled
            again.
    """
    parts = []
    for feature in features.values():
        present = feature.present[:, None]
        rows = np.where(present, directions(feature.values), 0.0)
        if common is not None and (common & feature.present).any():
            rows = np.where(present, directions(rows - rows[common & feature.present].mean(0)), 0.0)
        parts.append(rows)
    return jnp.asarray(np.concatenate(parts, axis=1), jnp.float32)


def same_for_all(evaluator: Evaluator, scores: np.ndarray, cohort: Cohort | None = None) -> Ranks:
    """Ranks by one score for each item [items], whoever the user is."""
    return evaluator.ranks_of(_shared_scores, jnp.asarray(scores, jnp.float32), (), cohort)


def popularity_rankers(evaluator: Evaluator, cohort: Cohort | None = None) -> dict[str, Ranks]:
    """popularity and unseen_first."""
    counts = popularity_of(evaluator.split).astype(np.float32)
    first = np.where(counts == 0, 2 * counts.max() + 1, counts)
    scored = {"popularity": counts, "unseen_first": first}
    return {name: same_for_all(evaluator, scores, cohort) for name, scores in scored.items()}


def random_ranker(evaluator: Evaluator, seed: int = 0, cohort: Cohort | None = None) -> list[Ranks]:
    """RANDOM_REPEATS draws of random scores; average their metrics."""
    keys = jax.random.split(jax.random.key(seed), RANDOM_REPEATS)
    return [evaluator.ranks_of(_random_scores, key, (), cohort) for key in keys]


def content_rankers(
    evaluator: Evaluator, features: Mapping[str, Features], cohort: Cohort | None = None
) -> dict[str, Ranks]:
    """content_profile and content_centred; nothing without features."""
    if not features:
        return {}
    trained = popularity_of(evaluator.split) > 0
    told = {"content_profile": stacked_features(features), "content_centred": stacked_features(features, trained)}
    return {name: evaluator.ranks_of(_content_scores, rows, (), cohort) for name, rows in told.items()}


def least_sampled(
    evaluator: Evaluator,
    key: PRNGKey,
    rounds: int,
    took_part: np.ndarray | None = None,
    cohort: Cohort | None = None,
) -> Ranks | None:
    """Ranks by the record of sampled negatives, or None for a method that draws none.

    Args:
        key: the run's key.
        rounds: how many rounds the judged model has seen.
        took_part: bool [users, rounds], or None where everybody always did.
        cohort: the clients to judge.
    """
    engine = evaluator.engine
    if engine.method.sampling.negatives == 0:
        return None
    seen = None
    if took_part is not None:
        by_slot = np.zeros((engine.clients.num_slots, took_part.shape[1]), bool)
        by_slot[engine.clients.slots] = took_part
        seen = jnp.asarray(by_slot)
    return evaluator.ranks_of(_least_sampled_scores, (key, jnp.asarray(rounds, jnp.int32)), seen, cohort)


def affordable_share(evaluator: Evaluator, rounds: int) -> float:
    """The share of clients on which replaying all draws stays below MAX_REPLAYED."""
    negatives = evaluator.engine.method.sampling.negatives
    draws = len(evaluator.split.train.item) * negatives * max(rounds, 1)
    return min(1.0, MAX_REPLAYED / max(draws, 1))
