"""Aggregators: folds over client uploads that stream over blocks and devices.

Item roles arrive as rows of the catalogue and are scatter-added; with `rows=None` (working set = catalogue)
they are summed as they are. Sums and weights are carried; the division comes once, at the end.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from fedjax_rec.method import Aggregate, Aggregator, LocalData
from fedjax_rec.types import ITEM_ROLES, Params, PyTree


def equal(data: LocalData) -> Float[Array, ""]:
    """Every client counts the same."""
    return jnp.ones(())


def by_size(data: LocalData) -> Float[Array, ""]:
    """A client counts by the number of its training samples (McMahan et al. 2017)."""
    return data.num_samples


def _zeros(upload: Params, num_items: int) -> Params:
    """Accumulators: the upload's shapes, with the catalogue in place of the rows."""
    full = lambda x: jnp.zeros((num_items, *x.shape[1:]), x.dtype)
    plain = lambda x: jnp.zeros(x.shape, x.dtype)
    return {role: jax.tree.map(full if role in ITEM_ROLES else plain, v) for role, v in upload.items()}


def _scale(x: Array, weights: Float[Array, "block"]) -> Array:
    return x * weights.reshape((-1,) + (1,) * (x.ndim - 1))


def _add_rows(total: Array, x: Array, weights, rows: Int[Array, "block rows"] | None) -> Array:
    if rows is None:
        return total + jnp.tensordot(weights, x, 1)
    return total.at[rows].add(_scale(x, weights), mode="drop")


def _add_all(totals: Params, uploads: Params, weights, rows) -> Params:
    def add(role):
        row_wise = role in ITEM_ROLES
        return jax.tree.map(
            lambda t, x: _add_rows(t, x, weights, rows) if row_wise else t + jnp.tensordot(weights, x, 1),
            totals[role],
            uploads[role],
        )

    return {role: add(role) for role in totals}


def weighted_mean(weight: Callable[[LocalData], Float[Array, ""]] = equal) -> Aggregator:
    """Sum of w_k upload_k over sum of w_k. A row that a client did not touch counts as an upload of zero."""

    def finish(totals: Params, weight_sum, count) -> Aggregate:
        mean = jax.tree.map(lambda t: t / jnp.maximum(weight_sum, 1e-12), totals)
        return Aggregate(mean, weight_sum, count)

    return Aggregator(
        init=lambda upload, num_items, num_clients: _zeros(upload, num_items),
        add=lambda totals, uploads, weights, rows, clients: _add_all(totals, uploads, weights, rows),
        merge=lambda totals, axis: jax.lax.psum(totals, axis),
        finish=finish,
        weight=weight,
        is_mean=True,
    )


def per_row_mean(weight: Callable[[LocalData], Float[Array, ""]] = equal) -> Aggregator:
    """As weighted_mean, but each row of an item role is averaged over the clients whose upload moved it.

    Discloses to the server how many clients touched each row.
    """

    def init(upload, num_items, num_clients):
        touched = {role: jnp.zeros(num_items) for role in upload if role in ITEM_ROLES}
        return _zeros(upload, num_items), touched

    def add(state, uploads, weights, rows, clients):
        totals, touched = state
        moved = {role: _moved(uploads[role]) for role in touched}
        touched = {role: _add_rows(touched[role], moved[role], weights, rows) for role in touched}
        return _add_all(totals, uploads, weights, rows), touched

    def finish(state, weight_sum, count) -> Aggregate:
        totals, touched = state
        mean = {
            role: jax.tree.map(lambda t, r=role: _scale(t, 1.0 / jnp.maximum(touched[r], 1e-12)), value)
            if role in touched
            else jax.tree.map(lambda t: t / jnp.maximum(weight_sum, 1e-12), value)
            for role, value in totals.items()
        }
        return Aggregate(mean, weight_sum, count)

    return Aggregator(init, add, lambda state, axis: jax.lax.psum(state, axis), finish, weight, by_row=True)


def _moved(upload: PyTree) -> Float[Array, "block rows"]:
    """1 for each row of an upload that is not zero."""
    flags = [jnp.any(x != 0, axis=tuple(range(2, x.ndim))) for x in jax.tree.leaves(upload)]
    return jnp.any(jnp.stack(flags), axis=0).astype(jnp.float32)


WEIGHTS = {"equal": equal, "by_size": by_size}
"""How a client counts in a mean: name -> its weight."""


def mean_of(weighting: str) -> Aggregator:
    """The mean of the uploads: a name of WEIGHTS, or `by_row` for per_row_mean."""
    return per_row_mean() if weighting == "by_row" else weighted_mean(WEIGHTS[weighting])


def stacked(weight: Callable[[LocalData], Float[Array, ""]] = equal) -> Aggregator:
    """Keeps every client's upload apart, [clients, ...], with zeros for absent clients and untouched rows.

    For servers that compare clients or answer each of them. Memory is clients x upload. The value is a pair
    (uploads, weights [clients]); weight 0 marks a client that was absent or had nothing to weigh.
    """

    def init(upload, num_items, num_clients):
        zeros = jax.tree.map(lambda x: jnp.zeros((num_clients, *x.shape), x.dtype), _zeros(upload, num_items))
        return zeros, jnp.zeros(num_clients)

    def add(state, uploads, weights, rows, clients):
        held, present = state

        def put(role):
            if role in ITEM_ROLES and rows is not None:
                return lambda h, x: h.at[clients[:, None], rows].set(x, mode="drop")
            return lambda h, x: h.at[clients].set(x, mode="drop")

        held = {role: jax.tree.map(put(role), held[role], uploads[role]) for role in held}
        return held, present.at[clients].set(weights, mode="drop")

    def merge(state, axis):
        return jax.tree.map(lambda x: jax.lax.all_gather(x, axis, tiled=True), state)

    return Aggregator(init, add, merge, lambda state, w, n: Aggregate(state, w, n), weight, by_client=True)


def stacked_over_mail(weight: Callable[[LocalData], Float[Array, ""]] = equal) -> Aggregator:
    """As `stacked`, but every upload takes the place of its sender's mail, which it equals in shape.

    A client has read its mail when its upload is written, and nobody else reads it. Absent clients' places keep their
    mail, with weight 0. For methods whose working set is the catalogue (`rows="all"`).
    """

    def add(state, uploads, weights, rows, clients):
        held, present = state
        held = jax.tree.map(lambda h, x: h.at[clients].set(x, mode="drop"), held, uploads)
        return held, present.at[clients].set(weights, mode="drop")

    def init(upload, num_items, num_clients):
        raise TypeError("stacked_over_mail starts from the mail")

    return Aggregator(init, add, lambda s, axis: s, lambda s, w, n: Aggregate(s, w, n), weight, over_mail=True)
