"""What a server that sees everybody's samples receives, and one pass over it in random order, without a sort.

Index k of a pass is sample (b + a k) mod the number of samples, a and b random, a coprime to it: a random lattice, of
which each batch is spread over the users.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt32

from fedjax_rec.aggregate import equal
from fedjax_rec.data.sampling import PRIMES
from fedjax_rec.method import Aggregate, Aggregator, LocalData, Mail, Method, Server, batch_at
from fedjax_rec.roles import binary_cross_entropy
from fedjax_rec.sharing import LocalConfig
from fedjax_rec.types import Params, PRNGKey, PyTree


def all_samples(data: LocalData) -> dict[str, Array]:
    """A client's upload, where the whole epoch is one step (batch_size 0): `samples`, item ids, positives first and as
    -1 - id, and their `count`."""
    batch = batch_at(data, jnp.int32(0))
    item = data.rows[batch.item]
    return {"samples": jnp.where(batch.label > 0, -1 - item, item), "count": batch.mask.sum().astype(jnp.int32)}


def everybodys_samples() -> Aggregator:
    """Keeps the `all_samples` of all clients: (samples [clients, most], count [clients])."""

    def add(held, uploads, weights, rows, clients):
        item, count = held
        place = jnp.arange(uploads["samples"].shape[1])
        item = item.at[clients[:, None], place].set(uploads["samples"], mode="drop")
        return item, count.at[clients].set(uploads["count"], mode="drop")

    return Aggregator(
        init=lambda upload, num_items, num_clients: (
            jnp.zeros((num_clients, *upload["samples"].shape), jnp.int32),
            jnp.zeros(num_clients, jnp.int32),
        ),
        add=add,
        merge=lambda held, axis: jax.tree.map(lambda x: jax.lax.all_gather(x, axis, tiled=True), held),
        finish=lambda held, weight, count: Aggregate(held, weight, count),
        weight=equal,
        by_client=True,
    )


def random_factor(key: PRNGKey, total: UInt32[Array, ""]) -> UInt32[Array, ""]:
    """A number below `total` (at least 1) that has no divisor in common with it."""
    safe = jnp.maximum(total, 1)
    primes = jnp.asarray(PRIMES)
    pick = jax.random.randint(key, (2,), 0, len(PRIMES))
    # two different primes of this size cannot both divide a number below 2**31
    first, second = jnp.where(safe % primes[pick] == 0, primes[(pick + 1) % len(PRIMES)], primes[pick])
    return (first * second) % safe


def multiples(factor: UInt32[Array, ""], count: int, modulus: UInt32[Array, ""]) -> UInt32[Array, "count"]:
    """factor k mod modulus for k = 0..count-1, by doubling: no product leaves 32 bits."""
    found, stride = jnp.zeros(1, jnp.uint32), factor
    while len(found) < count:
        found = jnp.concatenate([found, (found + stride) % modulus])
        stride = (stride + stride) % modulus
    return found[:count]


def in_batches(
    key: PRNGKey,
    total: Int[Array, ""],
    batch_size: int,
    step: Callable[[PyTree, Int[Array, "batch"], Float[Array, "batch"], Int[Array, ""]], PyTree],
    carry: PyTree,
) -> PyTree:
    """Folds `step(carry, indices, mask, number of the batch)` over mini-batches that hold each of 0..total-1 once."""
    k_factor, k_offset = jax.random.split(key)
    total = total.astype(jnp.uint32)
    safe = jnp.maximum(total, 1)
    factor = random_factor(k_factor, total)
    steps = multiples(factor, batch_size, safe)
    stride = (steps[-1] + factor) % safe
    start = jax.random.bits(k_offset, (), jnp.uint32) % safe

    def one(t, held):
        carry, first = held
        index = ((first + steps) % safe).astype(jnp.int32)
        mask = (t * batch_size + jnp.arange(batch_size) < total).astype(jnp.float32)
        return step(carry, index, mask, t), (first + stride) % safe

    number = ((total + batch_size - 1) // batch_size).astype(jnp.int32)
    return jax.lax.fori_loop(0, number, one, (carry, start))[0]


def places(count: Int[Array, "clients"], index: Int[Array, "batch"]) -> tuple[Array, Array]:
    """(client [batch], place among its own [batch]) of indices that run through the clients' `count` samples, one
    client after another."""
    ends = jnp.cumsum(count)
    client = jnp.searchsorted(ends, index, side="right")
    return client, index - (ends - count)[client]


def answered_by_mail(
    name: str,
    config: LocalConfig,
    init_server: Callable[[PRNGKey], Server],
    server_update: Callable[..., tuple[Server, Mail]],
    predict: Callable[[Params, Float[Array, "n width"]], Float[Array, "n"]],
) -> Method:
    """The method whose clients send `all_samples` and get their `user` back as mail. What is shared is `item`, the
    networks, and as `user` what stands for one who has no mail.

    Args:
        predict: (parameters, item vectors) -> logits, as Backbone's.
    """

    def local_update(key, shared, params, data):
        batch = batch_at(data, jnp.int32(0))
        loss = binary_cross_entropy(predict(params, params["item"][batch.item]), batch)
        return params, all_samples(data), {"loss": loss}

    return Method(
        name=name,
        init_server=init_server,
        init_client=lambda key, shared: {},
        publish=lambda key, server: server.shared,
        download=lambda shared, mail, client, data: {**shared, **mail} if mail else shared,
        local_update=local_update,
        upload=lambda key, shared, params, update, data: ({}, update),
        server_update=server_update,
        score=lambda shared, params, data: predict(params, params["item"]),
        aggregator=everybodys_samples(),
        # the whole epoch in one step: the server makes the mini-batches
        sampling=dataclasses.replace(config.sampling(), batch_size=0),
        config=config,
        init_mail=lambda server: {"user": server.shared["user"]},
    )
