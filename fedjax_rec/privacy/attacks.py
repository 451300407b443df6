"""Attacks: features from item rows, interactions and identity from uploads; each beside what needs no attack.

    inversion        from leaked pairs (row of an item, its features) learn the features of the other items, by
      network        mean + MLP(row), least squares (MDiffFR's shadow network, section 6.7: 20 % of the pairs leaked)
      ridge          mean + linear map of the row, in closed form: what a network of this size finds of a linear maker
                     after ever more steps, and what invents least where there are few pairs
      mean           control: the mean of the leaked features for every item. A method hides features where no attack
                     is better than this, however large its error is
    reconstruction   which items has the sender of an upload? Gradients of a positive's and a negative's row point in
                     opposite directions of one line (the user's), and negatives are the more numerous side: items by
                     their place on the main axis of the upload's rows
      norm           items by the length of their row: which were touched, negatives included
      popularity     control: items by how many users have them, without any upload
    membership       was an upload trained on a given history? Mean place of the history's items on that axis, for the
                     sender's own history and for other users'

    noise share      of generated rows: variance over noise draws / (variance over draws + variance over items)

AUCs count ties as half; 0.5 is chance. Follows: MDiffFR section 6.7 for inversion (it gives no sizes of the network,
and no control, and its network alone attacks); the rest are the project's own. Deviations: a fifth of the leaked pairs
chooses the step at which the network stops, the mean being step 0, the ridge's penalty, and which of the two is the
attack, so that a weak or overfitted attacker does not count as privacy; the structural similarity difference is over
all items that were not leaked, where the paper draws 20 of them.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

from fedjax_rec.client_step import local_step, record_at
from fedjax_rec.data.sampling import epoch_steps
from fedjax_rec.method import Method, Server
from fedjax_rec.precision import in_float32
from fedjax_rec.rounds import Engine, State, publish
from fedjax_rec.types import ITEM_ROLES, PRNGKey, PyTree
from fedjax_rec.validate import between, whole_number

# ---- from rows to features ---------------------------------------------------------------------------------


class Shadow(nn.Module):
    """The attacker's network; zero before its first step."""

    hidden: tuple[int, ...]
    width: int

    @nn.compact
    def __call__(self, rows: Float[Array, "n dim"]) -> Float[Array, "n feat"]:
        for size in self.hidden:
            rows = nn.relu(nn.Dense(size)(rows))
        return nn.Dense(self.width, kernel_init=nn.initializers.zeros)(rows)


class Inversion(NamedTuple):
    """Features of the items that were not leaked, in random order, and how well they come back.

    Attributes:
        true: what the rows were made from.
        guess: the same by "network" and "ridge", and by "mean", the control.
        measures: `closeness` of every guess.
        attack: which of the guesses had the least squared error on the leaked pairs that were held back.
    """

    true: Float[Array, "n feat"]
    guess: dict[str, Float[Array, "n feat"]]
    measures: dict[str, dict[str, float]]
    attack: str


RIDGES = tuple(10.0**power for power in range(-4, 5))
"""Penalties of the linear attacker, on rows of variance 1, times the number of pairs."""


def inversion(
    key: PRNGKey,
    rows: Float[Array, "items dim"],
    features: Float[Array, "_ feat"],
    *,
    leaked: float = 0.2,
    hidden: tuple[int, ...] = (128, 128),
    steps: int = 500,
    lr: float = 1e-3,
) -> Inversion:
    """Features of items from their rows.

    Args:
        rows: what the server sends of the attacked items.
        features: what they were made from.
        leaked: share of the pairs that the attacker has; the others are judged. Which ones depends on the key and on
            the number of items alone.
        hidden, steps, lr: of the network, full-batch Adam.

    Raises:
        ValueError: rows and features of different numbers of items, fewer than 2 pairs leaked or left, no steps.
    """
    between("leaked", leaked, 0.0, 1.0)
    whole_number("steps", steps)
    items = rows.shape[0]
    if features.shape[0] != items:
        raise ValueError(
            f"rows of {items} items and features of {features.shape[0]}: expected pairs; give both for the same items, "
            "in the same order"
        )
    known = round(leaked * items)
    chosen_by = max(known // 5, 1)
    if known < 2 or known > items - 2:
        raise ValueError(
            f"leaked={leaked:g} of {items} items are {known}: expected at least 2 pairs to learn from and 2 to judge by"
        )
    k_order, k_net = jax.random.split(key)
    order = jax.random.permutation(k_order, items)
    network = Shadow(hidden, features.shape[1])
    guesses, held = _invert(network, k_net, rows[order], features[order], known, chosen_by, steps, lr)
    true = features[order][known:]
    measures = {by: {n: float(v) for n, v in closeness(true, one).items()} for by, one in guesses.items()}
    return Inversion(true, guesses, measures, min(held, key=lambda by: float(held[by])))


@functools.partial(jax.jit, static_argnums=(0, 4, 5, 6, 7))
@in_float32
def _invert(network: Shadow, key, rows, features, known: int, chosen_by: int, steps: int, lr: float):
    """(features of the rows that were not leaked, by attacker; its squared error on the leaked rows held back)."""
    mean = features[:known].mean(0)
    rows = (rows - rows[:known].mean(0)) / jnp.maximum(rows[:known].std(0), 1e-12)
    targets = features - mean
    fit, judge = slice(chosen_by, known), slice(0, chosen_by)
    params = network.init(key, rows[:1])
    adam = optax.adam(lr)

    def error(params, part):
        return ((network.apply(params, rows[part]) - targets[part]) ** 2).mean()

    def step(carry, _):
        params, moments, best, least = carry
        change, moments = adam.update(jax.grad(error)(params, fit), moments, params)
        params = optax.apply_updates(params, change)
        now = error(params, judge)
        best = jax.tree.map(lambda new, old: jnp.where(now < least, new, old), params, best)
        return (params, moments, best, jnp.minimum(now, least)), None

    start = (params, adam.init(params), params, error(params, judge))
    (_, _, best, least), _ = jax.lax.scan(step, start, length=steps)

    def linear(part, penalty):
        x, y = rows[part], targets[part]
        gram = x.T @ x / x.shape[0] + penalty * jnp.eye(x.shape[1])
        return jnp.linalg.solve(gram, x.T @ y / x.shape[0])

    errors = jnp.stack([((rows[judge] @ linear(fit, p) - targets[judge]) ** 2).mean() for p in RIDGES])
    chosen = jnp.asarray(RIDGES)[errors.argmin()]
    guesses = {
        "network": mean + network.apply(best, rows[known:]),
        "ridge": mean + rows[known:] @ linear(slice(0, known), chosen),
        "mean": jnp.broadcast_to(mean, features[known:].shape),
    }
    return guesses, {"network": least, "ridge": errors.min(), "mean": (targets[judge] ** 2).mean()}


@jax.jit
def closeness(true: Float[Array, "n feat"], guess: Float[Array, "n feat"]) -> dict[str, Float[Array, ""]]:
    """MSE and MAE over all entries; cosine and Pearson of each item's features, on average; and the mean of
    `structural_difference` over all pairs of items (0 is a full leak)."""
    apart = lambda x: x - x.mean(1, keepdims=True)
    n = true.shape[0]
    return {
        "MSE": ((true - guess) ** 2).mean(),
        "MAE": jnp.abs(true - guess).mean(),
        "cosine": (_unit(true) * _unit(guess)).sum(1).mean(),
        "Pearson": (_unit(apart(true)) * _unit(apart(guess))).sum(1).mean(),
        "structure": structural_difference(true, guess).sum() / (n * (n - 1)),  # the diagonal is 0
    }


def structural_difference(true: Float[Array, "n feat"], guess: Float[Array, "n feat"]) -> Float[Array, "n n"]:
    """Absolute differences of the items' cosine similarities to each other (structural similarity difference)."""
    return jnp.abs(_unit(true) @ _unit(true).T - _unit(guess) @ _unit(guess).T)


def _unit(x: Float[Array, "n feat"]) -> Float[Array, "n feat"]:
    return x / jnp.maximum(jnp.linalg.norm(x, axis=1, keepdims=True), 1e-12)


def generated(method: Method, key: PRNGKey, server: Server, items: Int[np.ndarray, "n"], draws: int):
    """What the server would publish of some items under so many noise draws, [draws, n, width].

    Raises:
        ValueError: it publishes no item rows.
    """
    if "item" not in jax.eval_shape(method.publish, key, server):
        raise ValueError(f"{method.name} publishes no item rows; expected a method that makes rows of cold items")
    make = jax.jit(in_float32(lambda k: method.publish(k, server)["item"][items]))
    return jnp.stack([make(k) for k in jax.random.split(key, draws)])


def noise_share(rows: Float[Array, "draws items width"]) -> float:
    """Share of the rows' variance that is the noise's: 0 for rows that features determine, 1 for pure noise.

    Raises:
        ValueError: for fewer than 2 draws.
    """
    if rows.shape[0] < 2:
        raise ValueError(
            f"rows of {rows.shape[0]} draws: expected 2 or more, as noise is what differs between draws; make more"
        )
    over_draws = rows.var(0, ddof=1).mean()
    # a mean of few draws still holds noise, which is not the items'
    over_items = jnp.maximum(rows.mean(0).var(0).mean() - over_draws / rows.shape[0], 0.0)
    return float(over_draws / jnp.maximum(over_draws + over_items, 1e-30))


# ---- from uploads to interactions --------------------------------------------------------------------------


def uploads(
    engine: Engine, key: PRNGKey, state: State, round_: int, users: Int[np.ndarray, "users"]
) -> Float[np.ndarray, "users items width"]:
    """What some users would send of their item tables in round number `round_`, over the catalogue.

    With a mechanism the engine's method must draw noise client by client (private(..., per_client=True)).
    """
    shared = publish(engine, key, state.server, round_)
    held = {}
    for b, bucket in enumerate(engine.buckets):
        of = np.asarray(bucket.user)
        places = np.flatnonzero(np.isin(of, users))
        if len(places):
            sent = _sent(
                engine, b, key, jnp.int32(round_), shared, state.clients, state.mail, bucket, engine.pool, places
            )  # fmt: skip
            held |= dict(zip(of[places].tolist(), np.asarray(sent), strict=True))
    return np.stack([held[int(user)] for user in users])


@functools.partial(jax.jit, static_argnums=(0, 1))
def _sent(engine: Engine, b: int, key, round_, shared, clients, mail, bucket, pool, places):
    spec, size = engine.clients, engine.sizes[b]

    def one(place):
        several = record_at(bucket, place[None], spec.num_users, spec.num_items, spec.pool_size)
        record = jax.tree.map(lambda x: x[0], several)
        steps = epoch_steps(engine.method.sampling, size, several.length.max())
        done = local_step(
            engine.method, size, spec.num_items, pool, key, round_, shared, clients, mail,
            jnp.asarray(spec.slots)[record.user], record, steps,
        )  # fmt: skip
        return over_catalogue(done.upload, done.rows, spec.num_items)

    return jax.lax.map(one, places)


def over_catalogue(upload: PyTree, rows: Int[Array, "rows"], items: int) -> Float[Array, "items width"]:
    """All item roles of an upload side by side."""
    leaves = jax.tree.leaves({role: value for role, value in upload.items() if role in ITEM_ROLES})
    if not leaves:
        raise ValueError("the upload holds no item table: probes look at tables; attack its exchange instead")
    flat = jnp.concatenate([x.reshape(x.shape[0], -1) for x in leaves], axis=1)
    return jnp.zeros((items, flat.shape[1])).at[rows].set(flat, mode="drop")


@jax.jit
def auc(scores: Float[Array, "n"], positive: Bool[Array, "n"]) -> Float[Array, ""]:
    """Chance that a positive has the higher score, ties half; NaN without positives or negatives."""
    ordered = jnp.sort(scores)
    rank = (jnp.searchsorted(ordered, scores, side="left") + jnp.searchsorted(ordered, scores, side="right") + 1) / 2
    ones = positive.sum()
    above = jnp.where(positive, rank, 0.0).sum() - ones * (ones + 1) / 2
    return above / (ones * (scores.shape[0] - ones))


@jax.jit
@in_float32
def on_main_axis(upload: Float[Array, "items width"]) -> Float[Array, "items"]:
    """Each item's place on the line along which the upload's rows lie, towards the less numerous side.

    Rows count for their side by x / (|x| + rms), so that untouched rows and noise about zero count for neither.
    """
    _, axes = jnp.linalg.eigh(upload.T @ upload)
    place = upload @ axes[:, -1]
    rms = jnp.sqrt((place**2).mean())
    more = (place / jnp.maximum(jnp.abs(place) + rms, 1e-30)).sum() > 0
    return jnp.where(more, -place, place)


@jax.jit
@in_float32
def probes(
    sent: Float[Array, "users items width"], history: Bool[Array, "users items"], users_of: Int[Array, "items"]
) -> dict[str, Float[Array, ""]]:
    """AUCs of the attacks on uploads, as means over users; see the module docstring.

    Args:
        sent, history: uploads of some users, and what they have.
        users_of: how many users in all have each item.
    """
    place = jax.vmap(on_main_axis)(sent)
    size = jnp.linalg.norm(sent, axis=2)
    popular = users_of - history.astype(jnp.float32)  # among the others
    found = jax.vmap(lambda s, h: (jnp.argsort(-s).argsort() < h.sum()) @ h / jnp.maximum(h.sum(), 1))(
        place, history.astype(jnp.float32)
    )
    # [sender, history]: the sender's upload against every history
    fits = place @ (history / jnp.maximum(history.sum(1, keepdims=True), 1)).T
    own = jnp.eye(sent.shape[0], dtype=bool)
    by_user = jax.vmap(auc)
    return {
        "reconstruction": jnp.nanmean(by_user(place, history)),
        "found": found.mean(),
        "norm": jnp.nanmean(by_user(size, history)),
        "popularity": jnp.nanmean(by_user(popular, history)),
        "membership": jnp.nanmean(by_user(fits, own)),
    }
