"""The embedded data set: planted visual and textual tastes, and a cheap population for benchmarks."""

from __future__ import annotations

import dataclasses

import numpy as np

from fedjax_rec.data.features import Features
from fedjax_rec.data.interactions import DataError, Interactions

_START = 1_600_000_000
_YEAR = 365 * 24 * 3600


@dataclasses.dataclass(frozen=True, eq=False)
class Synthetic:
    """Planted feedback with two modalities of item features.

    Attributes:
        interactions: rows of each user stand in time order; time in unix seconds.
        features: "image" and "text", rows of norm about 1, every item present.
        affinity: float32 [users, items], the planted log-odds that a user takes an item (taste plus
            popularity): the oracle's scores.
        visual_share: float32 [users], in 0..1; 1 is a user who looks only at images, 0 only at text.
    """

    interactions: Interactions
    features: dict[str, Features]
    affinity: np.ndarray
    visual_share: np.ndarray


def make(
    num_users: int = 600,
    num_items: int = 400,
    *,
    factors: int = 4,
    image_dim: int = 32,
    text_dim: int = 24,
    taste: float = 3.0,
    skew: float = 0.9,
    feature_noise: float = 0.5,
    drift: float = 0.5,
    late_items: float = 0.02,
    late_users: float = 0.06,
    min_history: int = 8,
    median_history: int = 20,
    max_history: int = 150,
    seed: int = 0,
) -> Synthetic:
    """Makes the synthetic data set; dense in users x items, so for small sizes (see `population`).

    User u takes items without replacement, item i with log-odds

        taste * (sqrt(m_u) <p_u, x_i> + sqrt(1 - m_u) <q_u, y_i>) / sqrt(factors) - skew * log(rank_i),

    where x and y are the item's visual and textual factors, p and q the user's tastes, all standard normal,
    m the share of the visual taste and rank a random popularity rank.

    Args:
        num_users: users.
        num_items: items; all of them are in the catalogue, also one that nobody happens to take.
        factors: latent dimensions per modality.
        image_dim: width of the image features.
        text_dim: width of the text features.
        taste: standard deviation of the log-odds over items, about.
        skew: exponent of the Zipf law of item popularity.
        feature_noise: noise of the features relative to their signal.
        drift: how far the items' seasons lie apart, relative to the length of a user's activity.
        late_items: share of items released after everything else, at least one.
        late_users: share of users whose last item is a late one: these targets are unseen in training
            when the last item is held out.
        min_history: fewest items of a user.
        median_history: median number of items of a user; the lengths are log-normal.
        max_history: most items of a user, and never more than half of the catalogue.
        seed: of everything.

    Raises:
        DataError: sizes that leave no room for the histories.
    """
    if num_users < 1 or not 1 <= min_history <= min(max_history, num_items // 2) or not 0 < late_items <= 0.5:
        raise DataError(
            f"synthetic: num_users={num_users} num_items={num_items} min_history={min_history} "
            f"max_history={max_history} late_items={late_items}; expected at least 1 user, 1 <= min_history "
            "<= max_history, num_items >= 2 * min_history and 0 < late_items <= 0.5; change these"
        )
    rng = np.random.default_rng(seed)
    item_factors = rng.normal(size=(2, num_items, factors))
    user_factors = rng.normal(size=(2, num_users, factors))
    visual_share = rng.beta(0.4, 0.4, size=num_users)
    weight = np.sqrt([visual_share, 1 - visual_share]) / np.sqrt(factors)
    popularity = -skew * np.log1p(rng.permutation(num_items))
    affinity = taste * np.einsum("mu,muf,mif->ui", weight, user_factors, item_factors) + popularity

    late = rng.choice(num_items, max(1, round(late_items * num_items)), replace=False)
    lengths = np.round(median_history * rng.lognormal(0.0, 0.7, size=num_users)).astype(int)
    lengths = lengths.clip(min_history, min(max_history, num_items // 2))
    # The largest Gumbel-perturbed log-odds are a draw without replacement.
    perturbed = affinity + rng.gumbel(size=affinity.shape)
    user, item, time = _histories(rng, perturbed, late, lengths, drift)
    _end_with_late_item(rng, perturbed, late, lengths, late_users, item, time)

    seconds = _START + (time * _YEAR).astype(np.int64)
    interactions = _interactions("synthetic", user, item, seconds, num_users, num_items)
    features = {
        "image": _view(rng, item_factors[0], image_dim, feature_noise, "visual"),
        "text": _view(rng, item_factors[1], text_dim, feature_noise, "textual"),
    }
    return Synthetic(interactions, features, affinity.astype(np.float32), visual_share.astype(np.float32))


def _histories(
    rng: np.random.Generator, perturbed: np.ndarray, late: np.ndarray, lengths: np.ndarray, drift: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Each user's top items that are not late, in time order: user, item, time (in years), each [rows]."""
    perturbed = perturbed.copy()
    perturbed[:, late] = -np.inf
    ranked = np.argsort(-perturbed, axis=1)
    user = np.repeat(np.arange(len(lengths)), lengths)
    slot = np.arange(len(user)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    item = ranked[user, slot]
    season = rng.uniform(size=perturbed.shape[1])
    time = (drift * season[item] + rng.uniform(size=len(item))) / (1 + drift)
    order = np.lexsort((time, user))
    return user, item[order], time[order]


def _end_with_late_item(
    rng: np.random.Generator,
    perturbed: np.ndarray,
    late: np.ndarray,
    lengths: np.ndarray,
    late_users: float,
    item: np.ndarray,
    time: np.ndarray,
) -> None:
    """Replaces the last item of some users by their favourite late one, in place."""
    chosen = rng.choice(len(lengths), round(late_users * len(lengths)), replace=False)
    last = np.cumsum(lengths)[chosen] - 1
    item[last] = late[perturbed[chosen][:, late].argmax(axis=1)]
    time[last] = 1 + 0.1 * rng.uniform(size=len(last))


def _view(rng: np.random.Generator, latent: np.ndarray, dim: int, noise: float, what: str) -> Features:
    """A noisy linear view of latent factors [items, factors] in `dim` dimensions."""
    signal = latent @ rng.normal(size=(latent.shape[1], dim)) / np.sqrt(latent.shape[1])
    values = (signal + noise * rng.normal(size=signal.shape)) / np.sqrt(dim * (1 + noise**2))
    return Features(
        values=values.astype(np.float32),
        present=np.ones(len(values), bool),
        source=f"synthetic: noisy linear view of the planted {what} factors, {len(values)} items",
    )


def population(
    num_users: int, num_items: int, interactions_per_user: int, seed: int = 0, *, skew: float = 0.6
) -> Interactions:
    """A large population without planted tastes, for benchmarks: cost proportional to its rows.

    Every user has exactly `interactions_per_user` distinct items; item popularity falls about as
    rank**-skew, and times are random, so that the held-out items follow the same law.

    Raises:
        DataError: fewer than one user or interaction, more interactions than items, or skew outside [0, 1).
    """
    if num_users < 1 or not 1 <= interactions_per_user <= num_items or not 0 <= skew < 1:
        raise DataError(
            f"population: num_users={num_users} num_items={num_items} "
            f"interactions_per_user={interactions_per_user} skew={skew}; expected num_users >= 1, "
            "1 <= interactions_per_user <= num_items and 0 <= skew < 1; change these"
        )
    rng = np.random.default_rng(seed)
    shape = (num_users, interactions_per_user)
    room = num_items - interactions_per_user + 1
    # u**(1/(1-skew)) has density x**-skew; float64, so that the product stays below `room`.
    low = (room * rng.random(shape) ** (1 / (1 - skew))).astype(np.int32)
    low.sort(axis=1)
    # Adding 0, 1, 2, ... to sorted draws makes them distinct without a rejection step.
    rank = low + np.arange(interactions_per_user, dtype=np.int32)
    item_at_rank = rng.permutation(num_items).astype(np.int32)
    user = np.repeat(np.arange(num_users, dtype=np.int32), interactions_per_user)
    time = rng.integers(0, 2**62, size=rank.size)
    return _interactions("population", user, item_at_rank[rank].ravel(), time, num_users, num_items)


def _interactions(
    name: str, user: np.ndarray, item: np.ndarray, time: np.ndarray, num_users: int, num_items: int
) -> Interactions:
    """Distinct pairs [rows] as Interactions; the raw ids are the indices."""
    rows = len(user)
    return Interactions(
        name=name,
        user=user.astype(np.int32, copy=False),
        item=item.astype(np.int32, copy=False),
        time=time,
        split_label=None,
        user_ids=np.arange(num_users),
        item_ids=np.arange(num_items),
        counts={
            "rows_read": rows,
            "rows_filtered": 0,
            "rows": rows,
            "duplicates": 0,
            "pairs": rows,
            "users": num_users,
            "items": num_items,
        },
    )
