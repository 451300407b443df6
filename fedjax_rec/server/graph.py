"""A graph of users from their item tables, and message passing over it, a few items at a time.

Tables [users, items, dim] are read and written in slices of the item axis: beside them only a slice and matrices
[users, users] exist, on one device or spread over several.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

ITEMS_AT_ONCE = 64


def gram(tables: Float[Array, "users items dim"]) -> Float[Array, "users users"]:
    """Inner products of the users' flattened tables."""
    users, items, _ = tables.shape
    add = lambda total, start, part: total + jnp.einsum("uid,vid->uv", part, part)
    return over_items(add, jnp.zeros((users, users)), tables, items)


def cosine(tables: Float[Array, "users items dim"]) -> Float[Array, "users users"]:
    """Cosine similarity of the users' flattened tables; 0 beside a table of zeros."""
    products = gram(tables)
    length = jnp.sqrt(jnp.maximum(jnp.diagonal(products), 0.0))
    return products / jnp.maximum(length[:, None] * length[None, :], 1e-12)


def neighbours(
    affinity: Float[Array, "users users"], present: Bool[Array, "users"], threshold: float
) -> Float[Array, "users users"]:
    """Row-stochastic weights: equal over those whose affinity exceeds `threshold` times the mean affinity.

    Only present users count and are counted. A user without neighbours, or absent, keeps its own table.
    """
    pairs = present[:, None] & present[None, :]
    mean = jnp.where(pairs, affinity, 0.0).sum() / jnp.maximum(pairs.sum(), 1)
    near = pairs & (affinity > threshold * mean)
    alone = ~near.any(axis=1)
    weights = jnp.where(alone[:, None], jnp.eye(len(present)), near.astype(jnp.float32))
    return weights / weights.sum(axis=1, keepdims=True)


def pass_messages(
    weights: Float[Array, "users users"], tables: Float[Array, "users items dim"], layers: int = 1
) -> Float[Array, "users items dim"]:
    """weights^layers applied over the users, written over `tables` where its buffer may be reused."""
    power = jnp.linalg.matrix_power(weights, layers) if layers > 1 else weights

    def put(tables, start, part):
        return jax.lax.dynamic_update_slice_in_dim(tables, jnp.einsum("uv,vid->uid", power, part), start, axis=1)

    return over_items(put, tables, None, tables.shape[1])


def over_items(body, carry, tables, items: int):
    """body(carry, start, slice) for every slice of the item axis of `tables` (None: of the carry)."""
    width = min(ITEMS_AT_ONCE, items)
    whole = items // width

    def step(start, carry, width=width):
        source = carry if tables is None else tables
        return body(carry, start, jax.lax.dynamic_slice_in_dim(source, start, width, axis=1))

    carry = jax.lax.fori_loop(0, whole, lambda i, c: step(i * width, c), carry)
    # the rest apart: a slice that overlapped the last one would be mixed twice
    return step(whole * width, carry, items - whole * width) if items % width else carry
