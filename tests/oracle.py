"""One federated round as the papers write it: a Python loop over clients, without the engine.

No vmap, blocks, buckets, working sets or devices: every client holds whole tables. Two things are the engine's: the
keys, and `draw_local_data`, which has its own tests.
"""

from __future__ import annotations

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_rec.client_step import SERVER, client_key, streams
from fedjax_rec.data.sampling import Record, draw_local_data, epoch_steps, sizes
from fedjax_rec.data.splits import Split
from fedjax_rec.exchange import exchange_key
from fedjax_rec.method import Aggregate, Batch, Listed, LocalData, Method, Sampling
from fedjax_rec.rounds import State
from fedjax_rec.types import ITEM_ROLES


@jax.jit
def all_batches(data: LocalData) -> Batch:
    """Every step's samples [steps, batch]."""
    return jax.vmap(data.samples.at)(jnp.arange(data.samples.most_steps))


def data_on_host(data: LocalData) -> types.SimpleNamespace:
    """LocalData in NumPy, with every step's `item`, `label` and `mask` [steps, batch]."""
    told = {name: np.asarray(value) for name, value in vars(data).items() if name != "samples"}
    return types.SimpleNamespace(**told, **{k: np.asarray(v) for k, v in all_batches(data)._asdict().items()})


@dataclasses.dataclass(frozen=True, eq=False)
class Oracle:
    """A method on a split. `pool`: item ids that may be negatives, or None for the catalogue; `spare_held_out`: a
    user's validation and test items are never its negatives."""

    method: Method
    split: Split
    pool: np.ndarray | None = None
    spare_held_out: bool = False

    def round(self, key, state: State, round_: int, users=None):
        """(state, mean of the clients' infos); `users` take part, default all."""
        exchange = self.method.exchange
        if exchange and exchange.at_start and exchange.due(round_):
            state = self.exchange(key, state, round_)
        users = range(self.split.num_users) if users is None else users
        k_publish, k_server = jax.random.split(client_key(key, jnp.int32(round_), SERVER))
        shared = self.published(k_publish, state)
        clients = jax.tree.map(np.array, state.clients)
        sent, weights, infos = [], [], []
        over_mail = self.method.aggregator.over_mail
        for user in users:
            own = jax.tree.map(lambda x, u=user: x[u], clients)
            mine = jax.tree.map(lambda x, u=user: x[u], state.mail)
            key_of_user = client_key(key, jnp.int32(round_), jnp.int32(user))
            own, upload, weight, info, _ = self.client(key_of_user, shared, mine, own, user, round_)
            for kept, new in zip(jax.tree.leaves(clients), jax.tree.leaves(own), strict=True):
                kept[user] = new
            sent.append(upload)
            weights.append(float(weight))
            infos.append(info)
        mean = by_row_mean if self.method.aggregator.by_row else weighted_mean
        value = stacked(state.mail, sent, weights, users) if over_mail else mean(sent, weights)
        received = Aggregate(value, jnp.float32(sum(weights)), jnp.float32(len(weights)))
        server, mail = self.method.server_update(k_server, state.server, received)
        info = {name: np.mean([float(i[name]) for i in infos]) for name in infos[0]}
        state = State(server, clients, mail)
        if exchange and not exchange.at_start and exchange.due(round_):
            state = self.exchange(key, state, round_)
        return state, info

    def exchange(self, key, state: State, round_: int) -> State:
        """The dense pass over all users, one after the other."""
        everybody, exchange = range(self.split.num_users), self.method.exchange
        clients = jax.tree.map(np.array, state.clients)
        one = lambda user: jax.tree.map(lambda x: x[user], clients)
        mean = weighted_mean([exchange.upload(one(user)) for user in everybody], [1.0] * len(everybody))
        k_server = client_key(key, jnp.int32(round_), SERVER)
        server = exchange.server_update(exchange_key(k_server), state.server, mean)
        shared = self.method.publish(jax.random.key(0), server)
        for user in everybody:
            mine = client_key(key, jnp.int32(round_), jnp.int32(user))
            data = self.data(streams(mine)[0], user, round_, exchange.sampling)
            new, _ = self._apply(exchange_key(mine), shared, one(user), data)
            for kept, value in zip(jax.tree.leaves(clients), jax.tree.leaves(new), strict=True):
                kept[user] = value
        return State(server, clients, state.mail)

    def client(self, key, shared, mail, own, user: int, round_: int):
        """One client's round: (what stays, upload, weight, info, model)."""
        k_draw, k_train, k_upload = streams(key)
        data = self.data(k_draw, user, round_)
        return self._train(k_train, k_upload, shared, mail, own, data)

    def published(self, key, state: State):
        """What the server hands out, also of a state on the host."""
        return self.method.publish(key, jax.tree.map(jnp.asarray, state.server))

    def scores(self, state: State, user: int):
        """The user's logits [items], with the server's present state."""
        shared = self.published(jax.random.key(0), state)
        own = jax.tree.map(lambda x: jnp.asarray(x[user]), state.clients)
        data = self.data(jax.random.key(0), user, 0)
        return self._score(shared, own, data)

    def data(self, key, user: int, round_: int, sampling: Sampling | None = None):
        """The client's samples, pointing into the catalogue."""
        mine, sampling = self.history(user), sampling or self.method.sampling
        steps = epoch_steps(sampling, self.sizes(sampling), jnp.int32(len(mine)))
        return self._draw(sampling)(key, self.record(user), steps, jnp.int32(round_))

    def history(self, user: int) -> np.ndarray:
        return self.split.train.item[self.split.train.user == user]

    @functools.cached_property
    def longest(self) -> int:
        return max(len(self.history(user)) for user in range(self.split.num_users))

    def sizes(self, sampling: Sampling):
        return sizes(sampling, self.longest, self.split.num_items)

    def record(self, user: int) -> Record:
        mine, items = self.history(user), self.split.num_items
        pool = np.arange(items) if self.pool is None else self.pool
        parts = (self.split.train, self.split.valid, self.split.test) if self.spare_held_out else (self.split.train,)
        spared = np.concatenate([part.item[part.user == user] for part in parts])
        forbidden = np.flatnonzero(np.isin(pool, spared))
        padded = lambda x, width, fill: jnp.asarray(np.append(x, np.full(width - len(x), fill)).astype(np.int32))
        return Record(
            user=jnp.int32(user),
            history=padded(mine, self.longest, items),
            length=jnp.int32(len(mine)),
            forbidden=padded(forbidden, len(pool), len(pool)),
            num_forbidden=jnp.int32(len(forbidden)),
        )

    # Compiled for one client only so that the loop does not take minutes.
    @functools.cache  # noqa: B019
    def _draw(self, sampling: Sampling):
        pool, items = None if self.pool is None else jnp.asarray(self.pool), self.split.num_items

        def draw(key, record, steps, round_):
            local = draw_local_data(key, record, sampling, self.sizes(sampling), items, pool, steps, round_)
            rows, batches = local.rows, all_batches(local)
            return local.replace(
                rows=jnp.arange(items),
                row_mask=jnp.ones(items, bool),
                samples=Listed(batches._replace(item=rows[batches.item])),
                history=rows[local.history],
            )

        return jax.jit(draw)

    @functools.cached_property
    def _apply(self):
        return jax.jit(self.method.exchange.apply)

    @functools.cached_property
    def _score(self):
        method = self.method
        return jax.jit(lambda shared, own, data: method.score(shared, method.download(shared, (), own, data), data))

    @functools.cached_property
    def _train(self):
        method = self.method

        def train(k_train, k_upload, shared, mail, own, data):
            params = method.download(shared, mail, own, data)
            params, update, info = method.local_update(k_train, shared, params, data)
            own, upload = method.upload(k_upload, shared, params, update, data)
            return own, upload, method.aggregator.weight(data), info, params

        return jax.jit(train)


def weighted_mean(sent: list, weights: list[float]):
    """sum_k w_k upload_k / sum_k w_k, in float64."""
    total = sum(weights)
    add_up = lambda *leaves: sum(w * np.asarray(x, np.float64) for w, x in zip(weights, leaves, strict=True))
    return jax.tree.map(lambda *leaves: jnp.asarray(add_up(*leaves) / total, jnp.float32), *sent)


def by_row_mean(sent: list, weights: list[float]):
    """weighted_mean, but each row of an item table over those who moved it, in float64."""

    def rows(*leaves):
        moved = np.stack([np.any(x != 0, axis=tuple(range(1, np.ndim(x)))) for x in leaves])
        total = np.sum(np.asarray(leaves, np.float64), 0)
        share = 1.0 / np.maximum(moved.sum(0), 1)
        return jnp.asarray(total * share.reshape(-1, *[1] * (total.ndim - 1)), jnp.float32)

    plain = weighted_mean(sent, weights)
    tables = {role: [one[role] for one in sent] for role in ITEM_ROLES & sent[0].keys()}
    return plain | {role: jax.tree.map(rows, *each) for role, each in tables.items()}


def stacked(mail, sent: list, weights: list[float], users):
    """(mail with the senders' places taken by their uploads, weights [users])."""
    tables = jax.tree.map(np.array, mail)
    present = np.zeros(len(jax.tree.leaves(tables)[0]), np.float32)
    for user, upload, weight in zip(users, sent, weights, strict=True):
        present[user] = weight
        for kept, new in zip(jax.tree.leaves(tables), jax.tree.leaves(upload), strict=True):
            kept[user] = new
    return jax.tree.map(jnp.asarray, tables), jnp.asarray(present)
