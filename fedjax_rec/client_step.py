"""One client's part in a round: its randomness, its rows of the tables, and the step from download to upload."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Int, Integer

from fedjax_rec.data.clients import Bucket
from fedjax_rec.data.sampling import Record, Sizes, draw_local_data
from fedjax_rec.method import Client, Mail, Method
from fedjax_rec.roles import restrict
from fedjax_rec.types import ITEM_ROLES, Params, PRNGKey

SERVER = np.uint32(2**32 - 1)  # the server's stream of randomness: no user has this id
START = np.uint32(2**32 - 1)  # the stream of the state before the first round: no round has this number


class Step(NamedTuple):
    """One client's outcome in a block."""

    client: Client
    upload: Params
    weight: Array
    info: dict[str, Array]
    rows: Array
    params: Params


def record_at(bucket: Bucket, position: Int[Array, "block"], num_users: int, num_items: int, pool_size: int):
    """The clients at `position` of a bucket; positions beyond it give empty clients of user id `num_users`."""
    take = lambda x, fill: x.at[position].get(mode="fill", fill_value=fill)
    history, length = take(bucket.history, num_items), take(bucket.length, 0)
    if bucket.forbidden is None:
        forbidden, num_forbidden = history, length
    else:
        forbidden, num_forbidden = take(bucket.forbidden, pool_size), take(bucket.num_forbidden, 0)
    return Record(take(bucket.user, num_users), history, length, forbidden, num_forbidden)


def client_key(key: PRNGKey, round_: Integer[ArrayLike, ""], user: Integer[ArrayLike, ""]) -> PRNGKey:
    """Randomness of one client in one round: of (run, round, user), never of a position. `user` may be SERVER,
    `round_` may be START."""
    return jax.random.fold_in(jax.random.fold_in(key, round_), user)


def streams(key: PRNGKey) -> tuple[PRNGKey, PRNGKey, PRNGKey]:
    """A client key's streams: for the sampler (which folds 0, 1, 2 into its own), for training, for the upload."""
    return key, jax.random.fold_in(key, 3), jax.random.fold_in(key, 4)


def restrict_client(clients: Client, slot: Int[Array, ""], rows: Int[Array, "rows"] | None) -> Client:
    """One client's state, its item roles cut to `rows` (None: whole)."""

    def take(role):
        if role in ITEM_ROLES and rows is not None:
            return jax.tree.map(lambda x: x.at[slot, rows].get(mode="clip"), clients[role])
        return jax.tree.map(lambda x: x.at[slot].get(mode="clip"), clients[role])

    return {role: take(role) for role in clients}


def read_once(clients: Client, slot: Int[Array, ""], steps: Integer[ArrayLike, ""]) -> Client:
    """`restrict_client` to whole tables whose result is stored, for the only client of a block.

    XLA on the CPU works out a slice again wherever its result is used. A method that compares what it has trained with
    what it began with uses it after the new state was written over the old, and XLA then copied all clients' state
    for each of them. A loop whose length it cannot know (it is 1) is not taken apart.
    """
    read = functools.partial(restrict_client, clients, slot, None)
    empty = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(read))
    return jax.lax.fori_loop(0, jnp.minimum(steps + 1, 1), lambda _, held: read(), empty)


def store_clients(clients: Client, slots: Int[Array, "block"], rows: Int[Array, "block rows"] | None, new: Client):
    """Writes a block's clients back; padding slots and rows are dropped."""

    def put(role):
        if role in ITEM_ROLES and rows is not None:
            return lambda x, v: x.at[slots[:, None], rows].set(v, mode="drop")
        return lambda x, v: x.at[slots].set(v, mode="drop")

    return {role: jax.tree.map(put(role), clients[role], new[role]) for role in clients}


def local_step(
    method: Method,
    size: Sizes,
    num_items: int,
    pool: Array | None,
    key: PRNGKey,
    round_: Int[Array, ""],
    shared: Params,
    clients: Client,
    mail: Mail,
    slot: Int[Array, ""],
    record: Record,
    steps: Integer[ArrayLike, ""],
    alone: bool = False,
) -> Step:
    """Draw, download, train, upload: one client of a block, `alone` if it is the only one."""
    k_draw, k_train, k_upload = streams(client_key(key, round_, record.user))
    data = draw_local_data(k_draw, record, method.sampling, size, num_items, pool, steps, round_)
    rows = None if size.dense else data.rows
    shared = each_round(method, shared)
    view = shared if size.dense else restrict(shared, data.rows)
    tables = ITEM_ROLES & clients.keys()
    client = restrict_client(clients, slot, rows)
    if alone and size.dense and tables:
        client |= read_once({role: clients[role] for role in tables}, slot, steps)
    mine = jax.tree.map(lambda x: x.at[slot].get(mode="clip"), mail)
    params = method.download(view, mine, client, data)
    params, update, info = method.local_update(k_train, view, params, data)
    client, upload = method.upload(k_upload, view, params, update, data)
    return Step(client, upload, method.aggregator.weight(data), info, data.rows, params)


def each_round(method: Method, shared: Params) -> Params:
    """What of the shared roles travels in every round."""
    apart = method.exchange.roles if method.exchange else ()
    return {role: value for role, value in shared.items() if role not in apart}
