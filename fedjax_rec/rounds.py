"""The engine: one federated round as one compiled step.

Clients are mapped in blocks of one bucket; the state (client tables, accumulators) is carried through the loop over
blocks and donated, so that it is updated in place. On a mesh every device loops over its own clients and the
accumulators are summed once at the end of the round: the loop holds no collective.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, ArrayLike, Int, Integer

from fedjax_rec.client_step import SERVER, START, client_key, local_step, record_at, store_clients
from fedjax_rec.data.clients import Clients
from fedjax_rec.data.sampling import MAX_SAMPLES, epoch_steps, sizes
from fedjax_rec.exchange import exchange_down, exchange_up
from fedjax_rec.layout import AXIS, Layout, block_sizes, clients_mesh, fixed_steps, one_step, step_shapes
from fedjax_rec.method import Aggregate, Client, Mail, Method, Server
from fedjax_rec.precision import in_float32
from fedjax_rec.types import Params, PRNGKey, PyTree


@struct.dataclass
class State:
    """Everything a run carries from round to round.

    Attributes:
        server: see Server.   clients: Client with a leading axis of user slots.   mail: see Mail.
    """

    server: Server
    clients: Client
    mail: Mail


class Cohort(NamedTuple):
    """Who takes part: per bucket, positions [devices * most] into the device's clients, and blocks [devices]."""

    positions: tuple[Int[Array, "n"], ...]
    blocks: tuple[Int[Array, "devices"], ...]


class Engine(Layout):
    """Runs one method on one population; see Layout for what it knows of both."""

    def init(self, key: PRNGKey) -> State:
        """State before the first round. Client k's draw depends on `key` and k alone."""
        users = jax.device_put(self.clients.users, NamedSharding(self.mesh, P(AXIS)))
        return _init(self, key, users)

    def shapes(self, key: PRNGKey) -> State:
        """`init` as shapes and places alone: what a restore needs, without a second state beside it."""
        fresh = jax.eval_shape(self.init, key)

        def placed(tree, spec):
            sharding = NamedSharding(self.mesh, spec)
            return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)

        return State(placed(fresh.server, P()), placed(fresh.clients, P(AXIS)), placed(fresh.mail, P(AXIS)))

    def round(self, key: PRNGKey, state: State, round_: int, cohort: Cohort | None = None):
        """One federated round: (state, info). `state` is donated.

        Three compiled functions: what the server publishes (fusion, generation), all clients' local work with its
        aggregation, and the server's step. Only the second one's cost grows with the clients.

        Args:
            key: the run's key; the round's is folded from it.
            round_: 0-based.
            cohort: who takes part; default everybody.

        Returns:
            the new state, and info: means over the clients that took part, with `clients` their number. A round with
            an exchange (see method.py) adds what its clients tell, and calls three functions more.
        """
        exchange, told = self.method.exchange, {}
        due = exchange is not None and exchange.due(int(round_))
        round_ = jnp.asarray(round_, jnp.int32)
        if due and exchange.at_start:
            state, told = self.exchange(key, state, round_)
        shared = publish(self, key, state.server, round_)
        clients, received, info = local_round(self)(
            self, key, shared, state.clients, state.mail, round_, cohort or self.everybody
        )
        if self.method.aggregator.over_mail:
            tables, weights = received.value
            server, mail = server_step_over_mail(
                self, key, state.server, round_, tables, received._replace(value=weights)
            )
        else:
            server, mail = server_step(self, key, state.server, round_, received)
        state = State(server, clients, mail)
        if due and not exchange.at_start:
            state, told = self.exchange(key, state, round_)
        return state, {**info, **told}

    def exchange(self, key: PRNGKey, state: State, round_: Int[Array, ""]):
        """The dense pass of a method with an Exchange: (state, means over all users). `state` is donated."""
        server = exchange_up(self, key, state.server, state.clients, round_)
        shared = publish(self, key, server, round_)
        clients, told = exchange_down(self, key, shared, state.clients, round_)
        return State(server, clients, state.mail), told

    @functools.cached_property
    def published(self) -> tuple[jax.tree_util.PyTreeDef, tuple[int | None, ...]]:
        """How what is published is built, and for each of its leaves the leaf of the server's state that it is, or
        None if it is made of them."""
        key = jax.eval_shape(lambda: jax.random.key(0))
        server = jax.eval_shape(self.method.init_server, key)
        traced, shapes = jax.make_jaxpr(lambda k, s: _published(self, k, s, 0), return_shape=True)(key, server)
        places = {id(variable): place for place, variable in enumerate(traced.jaxpr.invars[1:])}
        return jax.tree.structure(shapes), tuple(places.get(id(leaf)) for leaf in traced.jaxpr.outvars)

    @functools.cached_property
    def everybody(self) -> Cohort:
        return self.cohort(None)

    def cohort(self, users: np.ndarray | None) -> Cohort:
        """The cohort of the given user ids (None: everybody), laid out by bucket and device.

        Shapes depend on the buckets alone, so that changing cohorts never recompiles.

        Raises:
            ValueError: for an id that is no user's.
        """
        devices = self.clients.num_devices
        if users is not None and len(users) and not 0 <= np.min(users) <= np.max(users) < self.clients.num_users:
            raise ValueError(
                f"cohort with ids {np.min(users)}..{np.max(users)}: expected 0..{self.clients.num_users - 1}"
            )
        chosen = np.ones(self.clients.num_users + 1, bool)
        if users is not None:
            chosen[:] = False
            chosen[users] = True
        chosen[-1] = False
        positions, blocks = [], []
        for bucket, block in zip(self.clients.buckets, self.block, strict=True):
            mask = chosen[bucket.user].reshape(devices, -1)
            most = -(-mask.shape[1] // block) * block
            padded = np.full((devices, most), mask.shape[1], np.int32)
            for row, chosen_here in zip(padded, mask, strict=True):
                at = np.flatnonzero(chosen_here)
                row[: len(at)] = at
            positions.append(padded.reshape(-1))
            blocks.append((-(-mask.sum(1) // block)).astype(np.int32))
        sharding = NamedSharding(self.mesh, P(AXIS))
        return Cohort(*jax.device_put((tuple(positions), tuple(blocks)), sharding))


def make_engine(
    method: Method, clients: Clients, *, mesh: Mesh | None = None, block_size: int = 0, cohort: int = 0
) -> Engine:
    """Places the clients on the mesh and fixes the static sizes.

    Args:
        method, clients, mesh, block_size: see Layout.
        cohort: how many clients rounds are expected to have, 0 for everybody: what blocks are made for.

    Raises:
        ValueError: if the mesh and the clients disagree, or one client has too many samples for the sampler.
    """
    mesh = mesh or clients_mesh(clients.num_devices)
    if mesh.size != clients.num_devices:
        raise ValueError(
            f"mesh of {mesh.size} devices, clients built for {clients.num_devices}: build both for one number"
        )
    size = tuple(
        sizes(method.sampling, b.history.shape[1], clients.num_items, all_rows=method.rows == "all")
        for b in clients.buckets
    )
    for s in size:
        if s.epoch > MAX_SAMPLES:
            raise ValueError(
                f"{s.epoch} samples per client and epoch (history of up to {s.history}): "
                f"expected at most {MAX_SAMPLES}; set fewer negatives or filter the longest histories"
            )
    spec = NamedSharding(mesh, P(AXIS))
    buckets = tuple(jax.tree.map(lambda x: jax.device_put(x, spec), b) for b in clients.buckets)
    pool = None if clients.pool is None else jax.device_put(clients.pool, NamedSharding(mesh, P()))
    engine = Engine(method, clients, mesh, block_size, size, (), (), (), buckets, pool)
    steps = [one_step(engine, b) for b in reversed(range(len(size)))]  # what does not fit is said of the widest
    engine = dataclasses.replace(engine, steps=tuple(reversed(steps)))
    engine = dataclasses.replace(engine, block=block_sizes(engine, cohort))
    return dataclasses.replace(engine, fixed=fixed_steps(engine, cohort))


# ---- all clients -------------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=0)
@in_float32
def _init(engine: Engine, key: PRNGKey, users: Int[Array, "slots"]) -> State:
    method, slots = engine.method, engine.clients.num_slots
    k_server, k_publish = jax.random.split(client_key(key, START, SERVER))
    server = method.init_server(k_server)
    shared = method.publish(k_publish, server)
    users = users if method.client_init == "random" else jnp.zeros(slots, jnp.int32)
    clients = jax.vmap(lambda user: method.init_client(client_key(key, START, user), shared))(users)
    everywhere, spread = NamedSharding(engine.mesh, P()), NamedSharding(engine.mesh, P(AXIS))
    constrain = jax.lax.with_sharding_constraint
    mail = jax.tree.map(lambda x: jnp.broadcast_to(x, (slots, *x.shape)), method.init_mail(server))
    return State(constrain(server, everywhere), constrain(clients, spread), constrain(mail, spread))


def publish(engine: Engine, key: PRNGKey, server: Server, round_: Integer[ArrayLike, ""]) -> Params:
    """What clients may see at the start of a round (and at an evaluation before it): a function of its own, so
    that server-made item rows are computed once, whatever the number of clients.

    What the server publishes as it is, like an ID table, is not copied: it is the server's own array, which the round's
    `server_step` is given to write over.
    """
    tree, lent = engine.published
    held = jax.tree.leaves(server)
    made = iter(make_published(engine, key, server, jnp.asarray(round_, jnp.int32)) if None in lent else ())
    return jax.tree.unflatten(tree, [next(made) if place is None else held[place] for place in lent])


def _published(engine: Engine, key: PRNGKey, server: Server, round_: Integer[ArrayLike, ""]) -> Params:
    k_publish, _ = jax.random.split(client_key(key, round_, SERVER))
    return engine.method.publish(k_publish, server)


@functools.partial(jax.jit, static_argnums=0)
@in_float32
def make_published(engine: Engine, key: PRNGKey, server: Server, round_: Int[Array, ""]) -> list[Array]:
    """Those leaves of what is published that are not the server's own arrays."""
    made = jax.tree.leaves(_published(engine, key, server, round_))
    return [leaf for leaf, place in zip(made, engine.published[1], strict=True) if place is None]


@in_float32
def _client_round(engine: Engine, key, shared: Params, clients: Client, mail: Mail, round_, cohort: Cohort):
    """All clients' local work: (their state, the uploads folded but not finished, means for the log)."""
    method = engine.method
    clients, folded, totals = jax.shard_map(
        functools.partial(_local_pass, engine),
        mesh=engine.mesh,
        in_specs=(P(), P(), P(), P(AXIS), P(AXIS), P(AXIS), P(AXIS), P()),
        out_specs=(P(AXIS), P(AXIS) if method.aggregator.over_mail else P(), P()),
        check_vma=False,
    )(key, round_, shared, clients, mail, engine.buckets, cohort, engine.pool)
    count = totals["clients"]
    info = {name: total / jnp.maximum(count, 1) for name, total in totals["info"].items()}
    return clients, Aggregate(folded, totals["weight"], count), {**info, "clients": count}


client_round = jax.jit(_client_round, static_argnums=0, donate_argnums=(3, 4))
client_round_beside_mail = jax.jit(_client_round, static_argnums=0, donate_argnums=3)


def local_round(engine: Engine):
    """`client_round` where uploads take the mail's places, else the one that leaves the mail as it is."""
    return client_round if engine.method.aggregator.over_mail else client_round_beside_mail


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
@in_float32
def server_step(engine: Engine, key: PRNGKey, server: Server, round_: Int[Array, ""], received: Aggregate):
    """The server's answer to a round: (server, mail). Uploads are finished here, where that is no pass of its own."""
    aggregator, spec = engine.method.aggregator, engine.clients
    folded = received.value
    if aggregator.by_client and spec.num_devices > 1:
        folded = jax.tree.map(lambda x: x[spec.slots], folded)
    received = aggregator.finish(folded, received.weight, received.count)
    _, k_server = jax.random.split(client_key(key, round_, SERVER))
    server, mail = engine.method.server_update(k_server, server, received)
    if not aggregator.over_mail and spec.num_devices > 1:
        users = np.minimum(spec.users, spec.num_users - 1)  # empty slots get anybody's
        mail = jax.tree.map(lambda x: x[users], mail)
    return server, jax.lax.with_sharding_constraint(mail, NamedSharding(engine.mesh, P(AXIS)))


@functools.partial(jax.jit, static_argnums=0, donate_argnums=(2, 4))
@in_float32
def server_step_over_mail(engine: Engine, key: PRNGKey, server: Server, round_, tables: PyTree, weights: Aggregate):
    """`server_step` for uploads that lie in the mail's places; the answers are written over them."""
    received = weights._replace(value=(tables, weights.value))
    return server_step(engine, key, server, round_, received)


def _local_pass(engine: Engine, key, round_, shared, clients, mail, buckets, cohort, pool):
    """All blocks of one device: the clients' new state, the folded uploads, and sums for the log."""
    method, spec = engine.method, engine.clients
    slots = spec.users_per_device
    pool_size = spec.pool_size
    # of the widest bucket: an upload as long as a history fits the accumulator whatever its sender's bucket
    example = step_shapes(engine, len(buckets) - 1, key, round_, shared, clients, mail, buckets, pool)
    over_mail = method.aggregator.over_mail
    if over_mail:
        folded = mail, jnp.zeros(slots)
    else:
        folded = method.aggregator.init(example.upload, spec.num_items, slots)
    carry = (
        clients,
        folded,
        {
            "info": {name: jnp.zeros(()) for name in example.info},
            "weight": jnp.zeros(()),
            "clients": jnp.zeros(()),
        },
    )
    for b, bucket in enumerate(buckets):
        size, block, fixed = engine.sizes[b], engine.block[b], engine.fixed[b]

        def one_block(i, carry, bucket=bucket, size=size, block=block, fixed=fixed, b=b):
            clients, folded, totals = carry
            position = jax.lax.dynamic_slice(cohort.positions[b], (i * block,), (block,))
            record = record_at(bucket, position, spec.num_users, spec.num_items, pool_size)
            real = record.user < spec.num_users
            slot = bucket.slot.at[position].get(mode="fill", fill_value=slots)
            steps = np.int32(fixed) if fixed else epoch_steps(method.sampling, size, record.length.max())
            # read where it is written: a second reference to the mail would be a copy
            letters = folded[0] if over_mail else mail
            run = functools.partial(
                local_step, method, size, spec.num_items, pool, key, round_, shared, clients, letters
            )
            done = jax.vmap(lambda s, r: run(s, r, steps, block == 1))(slot, record)
            rows = None if size.dense else done.rows
            weight = done.weight * real
            clients = store_clients(clients, slot, rows, done.client)
            folded = method.aggregator.add(folded, done.upload, weight, rows, slot)
            totals = {
                "info": {n: totals["info"][n] + (v * real).sum() for n, v in done.info.items()},
                "weight": totals["weight"] + weight.sum(),
                "clients": totals["clients"] + real.sum(),
            }
            return clients, folded, totals

        whole = fixed and cohort.positions[b].shape[0] == block
        carry = one_block(0, carry) if whole else jax.lax.fori_loop(0, cohort.blocks[b][0], one_block, carry)
    clients, folded, totals = carry
    return clients, method.aggregator.merge(folded, AXIS), jax.lax.psum(totals, AXIS)
