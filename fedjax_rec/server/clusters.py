"""Clusters of items (k-means) and the group of users that are alike in one of them (CoFedRec's server).

Tables [users, items, dim] are read and written in slices of the item axis, as in graph.py.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from fedjax_rec.server.graph import over_items
from fedjax_rec.types import PRNGKey


def kmeans_start(key: PRNGKey, points: Float[Array, "n dim"], count: int) -> Float[Array, "count dim"]:
    """k-means++ (Arthur and Vassilvitskii 2007): every further centre is a point drawn in proportion to its squared
    distance to the nearest centre so far."""
    keys = jax.random.split(key, count)
    distance_to = lambda centre: ((points - centre) ** 2).sum(-1)

    def pick(i, carry):
        centres, nearest = carry
        # a point that is a centre has logarithm -inf: it is drawn only where all points are centres
        centre = points[jax.random.categorical(keys[i], jnp.log(nearest))]
        return centres.at[i].set(centre), jnp.minimum(nearest, distance_to(centre))

    first = points[jax.random.randint(keys[0], (), 0, points.shape[0])]
    centres = jnp.broadcast_to(first, (count, points.shape[1]))
    return jax.lax.fori_loop(1, count, pick, (centres, distance_to(first)))[0]


def nearest_centre(points: Float[Array, "n dim"], centres: Float[Array, "count dim"]) -> Int[Array, "n"]:
    """Index of the nearest centre; the first of equally near ones."""
    products = jnp.matmul(points, centres.T, precision="highest")
    return jnp.argmin((centres**2).sum(-1) - 2.0 * products, axis=1)


@functools.partial(jax.jit, static_argnames=("count", "iterations"))
def kmeans(key: PRNGKey, points: Float[Array, "n dim"], count: int, iterations: int) -> Int[Array, "n"]:
    """Labels 0..count-1 after `iterations` of Lloyd's steps from a k-means++ start.

    A centre that loses all its points stays where it is, so a label may be nobody's.
    """
    points = points - points.mean(0)  # squares of a common offset would drown the differences in float32

    def step(_, centres):
        labels = nearest_centre(points, centres)
        size = jnp.zeros(count).at[labels].add(1.0)[:, None]
        total = jnp.zeros_like(centres).at[labels].add(points)
        return jnp.where(size > 0, total / jnp.maximum(size, 1.0), centres)

    return nearest_centre(points, jax.lax.fori_loop(0, iterations, step, kmeans_start(key, points, count)))


def draw_among(key: PRNGKey, allowed: Bool[Array, "n"]) -> tuple[Int[Array, ""], Float[Array, "n"]]:
    """(a random index among the allowed ones, the draws it is the largest of). Index k's draw depends on the key and k
    alone, not on how many there are."""
    draws = jax.vmap(lambda k: jax.random.uniform(jax.random.fold_in(key, k)))(jnp.arange(allowed.shape[0]))
    return jnp.argmax(jnp.where(allowed, draws, -1.0)), draws


def similarity_to(
    tables: Float[Array, "users items dim"], anchor: Int[Array, ""], chosen: Bool[Array, "items"]
) -> Float[Array, "users"]:
    """Sum over the chosen items of the cosine between each user's row and the anchor's."""

    def add(total, start, part):
        products = jnp.einsum("uid,id->ui", part, part[anchor], precision="highest")
        length = jnp.sqrt((part**2).sum(-1))
        cosine = products / jnp.maximum(length * length[anchor], 1e-8)
        return total + jnp.where(jax.lax.dynamic_slice_in_dim(chosen, start, part.shape[1]), cosine, 0.0).sum(1)

    return over_items(add, jnp.zeros(tables.shape[0]), tables, tables.shape[1])


def elbow(falling: Float[Array, "n"], count: Int[Array, ""]) -> Int[Array, ""]:
    """Index of the point (i, falling[i]), i < count, that is farthest from the chord of the first and the last one."""
    index = jnp.arange(falling.shape[0])
    first, last = falling[0], falling[jnp.maximum(count - 1, 0)]
    # the distance times the length of the chord
    apart = jnp.abs((falling - first) * (count - 1) - (last - first) * index)
    return jnp.argmax(jnp.where(index < count, apart, -1.0))


def similar_group(
    similarity: Float[Array, "users"], present: Bool[Array, "users"], draws: Float[Array, "users"]
) -> Bool[Array, "users"]:
    """The present users from the most similar one to the one at the elbow; `draws` order equally similar users."""
    falling = jnp.where(present, -similarity, jnp.inf)
    order = jnp.lexsort((draws, falling))
    count = present.sum()
    in_order = jnp.where(jnp.arange(similarity.shape[0]) < count, similarity[order], 0.0)
    members = jnp.arange(similarity.shape[0]) <= elbow(in_order, count)
    return jnp.zeros_like(present).at[order].set(members) & present


def share_mean(tables: Float[Array, "users items dim"], group: Bool[Array, "users"]) -> Float[Array, "users items dim"]:
    """Every member's table replaced by the group's mean, written over `tables` where its buffer may be reused."""
    weights = group.astype(tables.dtype) / jnp.maximum(group.sum(), 1)

    def put(tables, start, part):
        mean = jnp.tensordot(weights, part, 1)
        return jax.lax.dynamic_update_slice_in_dim(tables, jnp.where(group[:, None, None], mean, part), start, axis=1)

    return over_items(put, tables, None, tables.shape[1])
