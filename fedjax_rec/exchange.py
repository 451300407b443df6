"""Exchanges: dense passes over all clients' whole tables, which some rounds of some methods end (or begin) with.

Two compiled functions, up and down, streamed in blocks; see `Exchange` in method.py.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, ArrayLike, Int, Integer

from fedjax_rec.client_step import SERVER, client_key, record_at, restrict_client, store_clients, streams
from fedjax_rec.data.sampling import Record, Sizes, draw_local_data, epoch_steps, sizes
from fedjax_rec.layout import AXIS, Layout
from fedjax_rec.method import Client, Method, Server
from fedjax_rec.precision import in_float32
from fedjax_rec.types import Params, PRNGKey


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
@in_float32
def exchange_up(layout: Layout, key: PRNGKey, server: Server, clients: Client, round_: Int[Array, ""]) -> Server:
    """All clients' uploads, folded block by block into their mean, and the server's answer to it."""
    exchange, spec, block = layout.method.exchange, layout.clients, layout.exchange_block()
    slots = spec.users_per_device

    filled = np.bincount(spec.slots // slots, minlength=spec.num_devices)

    def on_device(clients):
        users = jnp.asarray(filled)[jax.lax.axis_index(AXIS)]
        sent = jax.eval_shape(lambda x: exchange.upload(restrict_client(x, jnp.int32(0), None)), clients)

        def one_block(i, total):
            slot = i * block + jnp.arange(block)
            real = slot < users
            uploads = jax.vmap(lambda s: exchange.upload(restrict_client(clients, s, None)))(slot)
            return jax.tree.map(lambda t, x: t + jnp.tensordot(real.astype(x.dtype), x, 1), total, uploads)

        total = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), sent)
        return jax.lax.psum(jax.lax.fori_loop(0, -(-slots // block), one_block, total), AXIS)

    total = jax.shard_map(on_device, mesh=layout.mesh, in_specs=P(AXIS), out_specs=P(), check_vma=False)(clients)
    mean = jax.tree.map(lambda x: x / spec.num_users, total)
    return exchange.server_update(exchange_key(client_key(key, round_, SERVER)), server, mean)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=3)
@in_float32
def exchange_down(layout: Layout, key: PRNGKey, shared: Params, clients: Client, round_: Int[Array, ""]):
    """Every client takes the server's answer into its whole state, in place: (their state, means for the log)."""
    clients, totals = jax.shard_map(
        functools.partial(_exchange_pass, layout),
        mesh=layout.mesh,
        in_specs=(P(), P(), P(), P(AXIS), P(AXIS), P()),
        out_specs=(P(AXIS), P()),
        check_vma=False,
    )(key, round_, shared, clients, layout.buckets, layout.pool)
    return clients, {name: total / layout.clients.num_users for name, total in totals.items()}


def exchange_key(key: PRNGKey) -> PRNGKey:
    """A client's (or the server's) stream for a round's exchange; see `streams` for the others."""
    return jax.random.fold_in(key, 5)


def exchange_step(
    method: Method,
    size: Sizes,
    num_items: int,
    pool: Array | None,
    key: PRNGKey,
    round_: Int[Array, ""],
    shared: Params,
    client: Client,
    record: Record,
    steps: Integer[ArrayLike, ""],
) -> tuple[Client, dict[str, Array]]:
    """One client's part in an exchange. Its samples come from the stream of the round's own."""
    exchange, mine = method.exchange, client_key(key, round_, record.user)
    data = draw_local_data(streams(mine)[0], record, exchange.sampling, size, num_items, pool, steps, round_)
    return exchange.apply(exchange_key(mine), shared, client, data)


def _exchange_pass(layout: Layout, key, round_, shared, clients, buckets, pool):
    """All blocks of one device."""
    method, spec, most = layout.method, layout.clients, layout.exchange_block()
    sampling, slots = method.exchange.sampling, spec.users_per_device
    totals = None
    for bucket in buckets:
        size = sizes(sampling, bucket.history.shape[1], spec.num_items, all_rows=method.rows == "all")
        count = bucket.user.shape[0]
        block = min(most, count)

        def on_block(clients, position, bucket=bucket, size=size):
            record = record_at(bucket, position, spec.num_users, spec.num_items, spec.pool_size)
            real = record.user < spec.num_users
            slot = bucket.slot.at[position].get(mode="fill", fill_value=slots)
            steps = epoch_steps(sampling, size, record.length.max())
            run = functools.partial(exchange_step, method, size, spec.num_items, pool, key, round_, shared)
            new, info = jax.vmap(lambda s, r: run(restrict_client(clients, s, None), r, steps))(slot, record)
            told = {name: jnp.where(real, value, 0).sum() for name, value in info.items()}
            return store_clients(clients, slot, None, new), told

        def one_block(i, carry, on_block=on_block, block=block):
            clients, totals = carry
            # positions beyond the bucket give empty clients
            clients, told = on_block(clients, i * block + jnp.arange(block))
            return clients, jax.tree.map(jnp.add, totals, told)

        if totals is None:
            _, told = jax.eval_shape(on_block, clients, jnp.arange(block))
            totals = {name: jnp.zeros(()) for name in told}
        clients, totals = jax.lax.fori_loop(0, -(-count // block), one_block, (clients, totals))
    return clients, jax.lax.psum(totals, AXIS)
