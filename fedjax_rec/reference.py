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

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from fedjax_rec.client_step import client_key, streams
from fedjax_rec.data.features import Features
from fedjax_rec.data.sampling import draw_local_data
from fedjax_rec.data.splits import Split
from fedjax_rec.evaluate import Evaluator, Ranks
from fedjax_rec.item_sources import directions
from fedjax_rec.layout import AXIS
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


class Draws(NamedTuple):
    """The negatives that were drawn up to now.

    key: the run's key.
    rounds: how many rounds the judged model has seen.
    took_part: bool [users, rounds], or None where everybody always did.
    """

    key: PRNGKey
    rounds: int
    took_part: np.ndarray | None = None


class _Told(NamedTuple):
    """What the scorer of all rankers is told: which one it is, and what any of them reads."""

    which: Int[Array, ""]  # of _SHARED, _RANDOM, _CONTENT, _DRAWN
    scores: Float[Array, "items"]
    key: PRNGKey
    features: Float[Array, "items feat"]
    rounds: Int[Array, ""] | None  # None: there is no _DRAWN


_SHARED, _RANDOM, _CONTENT, _DRAWN = range(4)


def _told_scores(engine, told: _Told, took_part, slot, record, size, steps):
    """One scorer for all, because the ranking around it is most of what is compiled."""

    def by_content():
        mine = told.features.at[record.history].get(mode="fill", fill_value=0.0)
        return told.features @ mine.sum(0)

    at_random = lambda: jax.random.uniform(jax.random.fold_in(told.key, record.user), told.scores.shape)
    scorers = [lambda: told.scores, at_random, by_content]
    if told.rounds is not None:
        scorers.append(lambda: _least_sampled_scores(engine, told, took_part, slot, record, size, steps))
    return jax.lax.switch(told.which, scorers)


def _least_sampled_scores(engine, told: _Told, took_part, slot, record, size, steps):
    """Minus the number of times that each item was this user's negative in rounds 0 .. rounds-1."""
    spec, method = engine.clients, engine.method

    def one_round(round_, counts):
        k_draw = streams(client_key(told.key, round_, record.user))[0]
        data = draw_local_data(
            k_draw, record, method.sampling, size, spec.num_items, engine.pool, steps, round_
        )  # fmt: skip
        here = True if took_part is None else took_part.at[slot, round_].get(mode="fill", fill_value=False)
        rows, times = data.samples.negatives()
        return counts.at[data.rows[rows]].add(times * here, mode="drop")

    return -jax.lax.fori_loop(0, told.rounds, one_round, jnp.zeros(spec.num_items))


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
    return evaluator.ranks_of(_shared_scores, jnp.asarray(scores, jnp.float32), None, cohort)


def _shared_scores(engine, scores, nothing, slot, record, size, steps):
    return scores


@dataclasses.dataclass(frozen=True, eq=False)
class Rankers:
    """The rankers under one evaluator; one compiled function ranks by all of them.

    features: by modality, or {}: there are no content rankers then.
    cohort: the clients to judge, or None for all.
    draws: for `least_sampled`.
    """

    evaluator: Evaluator
    features: Mapping[str, Features] = dataclasses.field(default_factory=dict)
    cohort: Cohort | None = None
    draws: Draws | None = None

    def popularity(self) -> dict[str, Ranks]:
        """popularity and unseen_first."""
        counts = popularity_of(self.evaluator.split).astype(np.float32)
        first = np.where(counts == 0, 2 * counts.max() + 1, counts)
        scores = {"popularity": counts, "unseen_first": first}
        return {name: self._ranks(_SHARED, scores=jnp.asarray(s, jnp.float32)) for name, s in scores.items()}

    def random(self, seed: int = 0) -> list[Ranks]:
        """RANDOM_REPEATS draws of random scores; average their metrics."""
        return [self._ranks(_RANDOM, key=key) for key in jax.random.split(jax.random.key(seed), RANDOM_REPEATS)]

    def content(self) -> dict[str, Ranks]:
        """content_profile and content_centred; nothing without features."""
        return {name: self._ranks(_CONTENT, features=rows) for name, rows in self._contents.items()}

    def least_sampled(self) -> Ranks | None:
        """Ranks by the record of sampled negatives, or None without `draws` or for a method that draws none."""
        return None if self._drawn is None else self._ranks(_DRAWN, key=self._drawn.key)

    @functools.cached_property
    def _contents(self) -> dict[str, Float[Array, "items feat"]]:
        if not self.features:
            return {}
        trained = popularity_of(self.evaluator.split) > 0
        centred = stacked_features(self.features, trained)
        return {"content_profile": stacked_features(self.features), "content_centred": centred}

    @functools.cached_property
    def _drawn(self) -> Draws | None:
        return self.draws if self.evaluator.engine.method.sampling.negatives else None

    @functools.cached_property
    def _took_part(self) -> Bool[Array, "slots rounds"] | None:
        if self._drawn is None or self._drawn.took_part is None:
            return None
        engine, took_part = self.evaluator.engine, self._drawn.took_part
        by_slot = np.zeros((engine.clients.num_slots, took_part.shape[1]), bool)
        by_slot[engine.clients.slots] = took_part
        # where the ranking wants it, which would else lay it out anew for each ranker
        return jax.device_put(by_slot, NamedSharding(engine.mesh, P(AXIS)))

    @functools.cached_property
    def _nothing(self) -> _Told:
        """Values of the shapes that the compiled function was made for."""
        items = self.evaluator.split.num_items
        features = self._contents.get("content_profile", jnp.zeros((items, 0)))
        rounds = None if self._drawn is None else jnp.asarray(self._drawn.rounds, jnp.int32)
        return _Told(jnp.zeros((), jnp.int32), jnp.zeros(items), jax.random.key(0), features, rounds)

    def _ranks(self, which: int, **told) -> Ranks:
        told = self._nothing._replace(which=jnp.asarray(which, jnp.int32), **told)
        return self.evaluator.ranks_of(_told_scores, told, self._took_part, self.cohort)


def affordable_share(evaluator: Evaluator, rounds: int) -> float:
    """The share of clients on which replaying all draws stays below MAX_REPLAYED."""
    negatives = evaluator.engine.method.sampling.negatives
    draws = len(evaluator.split.train.item) * negatives * max(rounds, 1)
    return min(1.0, MAX_REPLAYED / max(draws, 1))
