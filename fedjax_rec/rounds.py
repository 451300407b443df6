"""The engine: one federated round as one compiled step.

Clients are mapped in blocks of one bucket; the state (client tables, accumulators) is carried through the loop over
blocks and donated, so that it is updated in place. On a mesh every device loops over its own clients and the
accumulators are summed once at the end of the round: the loop holds no collective.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, ArrayLike, Int, Integer

from fedjax_rec.data.clients import Bucket, Clients
from fedjax_rec.data.sampling import MAX_SAMPLES, Record, Sizes, draw_local_data, epoch_steps, sizes
from fedjax_rec.method import Aggregate, Client, Mail, Method, Server
from fedjax_rec.roles import restrict
from fedjax_rec.types import ITEM_ROLES, Params, PRNGKey, PyTree

AXIS = "clients"
SERVER = np.uint32(2**32 - 1)  # the server's stream of randomness: no user has this id
START = np.uint32(2**32 - 1)  # the stream of the state before the first round: no round has this number
CPU_BLOCK_BYTES = 2**18  # a few clients: their rows, changes and batches together stay in one core's L2 cache
EXCHANGE_CPU_BYTES = 2**22  # whole tables of a few clients
DEVICE_BLOCK_BYTES = 2**30  # enough clients to occupy an accelerator
DEVICE_BLOCK_SHARE = 1 / 48  # of its memory, at most: what is in flight takes about eight times a block's rows


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


class Step(NamedTuple):
    """One client's outcome in a block."""

    client: Client
    upload: Params
    weight: Array
    info: dict[str, Array]
    rows: Array
    params: Params


def clients_mesh(num_devices: int | None = None) -> Mesh:
    """A 1-D mesh named `clients` over the first `num_devices` devices (default: all)."""
    # not jax.make_mesh, which on TPUs wants the devices to be a block of the machine: three of four are none
    return Mesh(np.array(jax.devices()[:num_devices]), (AXIS,), axis_types=(AxisType.Auto,))


def in_float32(function: Callable) -> Callable:
    """`function` (to be compiled), the matrix products of which are float32 on every device.

    Accelerators by default round the factors first, to 8 bits (TPUs) or 11 (GPUs): means by numbers of samples would be
    off, users' similarities near 1 equal, and scores tied. Where the user has chosen a precision
    (JAX_DEFAULT_MATMUL_PRECISION), that holds.
    """

    @functools.wraps(function)
    def traced(*arguments):
        with jax.default_matmul_precision(jax.config.jax_default_matmul_precision or "highest"):
            return function(*arguments)

    return traced


def default_block_bytes() -> int:
    return CPU_BLOCK_BYTES if jax.default_backend() == "cpu" else device_block_bytes()


def device_block_bytes() -> int:
    """Of an accelerator; less where its memory is small. A power of two, so that how much of the memory JAX may take
    seldom changes it."""
    memory = (jax.devices()[0].memory_stats() or {}).get("bytes_limit")
    if not memory:
        return DEVICE_BLOCK_BYTES
    return min(DEVICE_BLOCK_BYTES, 2 ** int(np.log2(DEVICE_BLOCK_SHARE * memory)))


@dataclasses.dataclass(frozen=True, eq=False)
class Engine:
    """Runs one method on one population.

    Attributes:
        method: what to run.
        clients: who runs it (see data/clients.py).
        mesh: 1-D mesh over which clients are spread; its size equals clients.num_devices.
        block_size: clients per block; 0 chooses per bucket so that a block's rows fit the cache (CPU) or occupy
            the device, and that a cohort fills its blocks. Part of a run's identity: sums are ordered by it.
        steps, block: for every bucket, the shapes of one client's step and the clients per block.
        fixed: for every bucket, the steps of an epoch where all its blocks take as many, else 0 (see _fixed).
        buckets: the clients' arrays on the devices.
    """

    method: Method
    clients: Clients
    mesh: Mesh
    block_size: int
    sizes: tuple[Sizes, ...]
    steps: tuple[Step, ...]
    block: tuple[int, ...]
    fixed: tuple[int, ...]
    buckets: tuple[Bucket, ...]
    pool: Array | None

    # ---- state -----------------------------------------------------------------------------------------------

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

    # ---- costs -----------------------------------------------------------------------------------------------

    def bytes_per_client(self) -> dict[str, int]:
        """Bytes that one client receives and sends in a round: `down`, `up` count full tables (what the
        protocols exchange); `down_rows`, `up_rows` only the working set of the largest bucket; `exchange_down`,
        `exchange_up` what a round with an exchange adds."""
        return _bytes_per_client(self)

    def memory_bytes(self) -> dict[str, int]:
        """Estimated bytes of all devices together: server and client state, folded uploads, data, the largest block."""
        return _memory_bytes(self)


def make_engine(
    method: Method, clients: Clients, *, mesh: Mesh | None = None, block_size: int = 0, cohort: int = 0
) -> Engine:
    """Places the clients on the mesh and fixes the static sizes.

    Args:
        method, clients, mesh, block_size: see Engine.
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
    steps = [_one_step(engine, b) for b in reversed(range(len(size)))]  # what does not fit is said of the widest
    engine = dataclasses.replace(engine, steps=tuple(reversed(steps)))
    engine = dataclasses.replace(engine, block=_blocks(engine, cohort))
    return dataclasses.replace(engine, fixed=_fixed(engine, cohort))


def per_device(engine: Engine) -> list[int]:
    """Clients of every bucket on one device."""
    return [b.user.shape[0] // engine.clients.num_devices for b in engine.clients.buckets]


def _expected(engine: Engine, cohort: int) -> list[int]:
    """How many clients of every bucket take part on one device in most rounds."""
    share = cohort / engine.clients.num_users if cohort else 1.0
    if share >= 1:
        return per_device(engine)
    # what a bucket sends varies: its mean with its standard deviation
    means = [n * share for n in per_device(engine)]
    return [min(int(np.ceil(mean + np.sqrt(mean))), n) for mean, n in zip(means, per_device(engine), strict=True)]


def _fixed(engine: Engine, cohort: int) -> tuple[int, ...]:
    """Where a bucket's clients of a round lie in one block on an accelerator: the steps of its longest history, which
    decides anyway.

    An accelerator asks the host before every pass of a loop whose length it does not know. CPUs ask nobody, and their
    blocks are small.
    """
    if jax.default_backend() == "cpu":
        return (0,) * len(engine.block)
    longest = [
        int(epoch_steps(engine.method.sampling, size, jnp.int32(bucket.length.max())))
        for bucket, size in zip(engine.clients.buckets, engine.sizes, strict=True)
    ]
    each = zip(engine.block, _expected(engine, cohort), longest, strict=True)
    return tuple(steps if block >= n else 0 for block, n, steps in each)


def _blocks(engine: Engine, cohort: int) -> tuple[int, ...]:
    """Clients per block for every bucket."""
    if engine.block_size:
        return tuple(min(engine.block_size, n) for n in per_device(engine))
    per_row, chosen = row_bytes(engine), []
    for size, step, n in zip(engine.sizes, engine.steps, _expected(engine, cohort), strict=True):
        # what training leaves as it was (views) is held once; clients without tables (of centralised methods) hold
        # what they send
        trained = _bytes({role: value for role, value in step.params.items() if role in ITEM_ROLES})
        held = (size.rows * per_row + trained) // 2 if per_row else _bytes(step.upload)
        fits = max(default_block_bytes() // max(held, 1), 1)
        blocks = -(-n // fits)
        chosen.append(-(-n // blocks))  # equal ones: what is missing in the last one is computed all the same
    return tuple(chosen)


def row_bytes(engine: Engine) -> int:
    """Bytes of one item row over all item roles that a client holds in a round."""
    state, shared = _shapes(engine.method)
    shared = each_round(engine.method, shared)
    mail = state.mail if isinstance(state.mail, dict) else {}
    tables = [v for tree in (shared, state.clients, mail) for r, v in tree.items() if r in ITEM_ROLES]
    return sum(int(np.prod(x.shape[1:])) * x.dtype.itemsize for x in jax.tree.leaves(tables))


def _shapes(method: Method) -> tuple[State, Params]:
    """Shapes of the server with one client, and of what is published."""

    def fresh(key):
        server = method.init_server(key)
        shared = method.publish(key, server)
        return State(server, method.init_client(key, shared), method.init_mail(server)), shared

    return jax.eval_shape(fresh, jax.eval_shape(lambda: jax.random.key(0)))


# ---- one client --------------------------------------------------------------------------------------------


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
    example = _example_step(engine, len(buckets) - 1, key, round_, shared, clients, mail, buckets, pool)
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


# ---- exchanges: dense passes over all clients --------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
@in_float32
def exchange_up(engine: Engine, key: PRNGKey, server: Server, clients: Client, round_: Int[Array, ""]) -> Server:
    """All clients' uploads, folded block by block into their mean, and the server's answer to it."""
    exchange, spec, block = engine.method.exchange, engine.clients, _exchange_block(engine)
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

    total = jax.shard_map(on_device, mesh=engine.mesh, in_specs=P(AXIS), out_specs=P(), check_vma=False)(clients)
    mean = jax.tree.map(lambda x: x / spec.num_users, total)
    return exchange.server_update(exchange_key(client_key(key, round_, SERVER)), server, mean)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=3)
@in_float32
def exchange_down(engine: Engine, key: PRNGKey, shared: Params, clients: Client, round_: Int[Array, ""]):
    """Every client takes the server's answer into its whole state, in place: (their state, means for the log)."""
    clients, totals = jax.shard_map(
        functools.partial(_exchange_pass, engine),
        mesh=engine.mesh,
        in_specs=(P(), P(), P(), P(AXIS), P(AXIS), P()),
        out_specs=(P(AXIS), P()),
        check_vma=False,
    )(key, round_, shared, clients, engine.buckets, engine.pool)
    return clients, {name: total / engine.clients.num_users for name, total in totals.items()}


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


def _exchange_pass(engine: Engine, key, round_, shared, clients, buckets, pool):
    """All blocks of one device."""
    method, spec, most = engine.method, engine.clients, _exchange_block(engine)
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


def _exchange_block(engine: Engine) -> int:
    """Clients whose whole tables are in flight at once, before and after an exchange."""
    budget = EXCHANGE_CPU_BYTES if jax.default_backend() == "cpu" else device_block_bytes()
    fits = max(budget // (3 * engine.clients.num_items * row_bytes(engine)), 1)
    return int(min(2 ** int(np.log2(fits)), max(per_device(engine))))


def _example_step(engine: Engine, b: int, key, round_, shared, clients, mail, buckets, pool) -> Step:
    """Shapes of one client's step in bucket b."""
    spec = engine.clients

    def run(position):
        record = record_at(buckets[b], position[None], spec.num_users, spec.num_items, spec.pool_size)
        one = jax.tree.map(lambda x: x[0], record)
        return local_step(
            engine.method, engine.sizes[b], spec.num_items, pool, key, round_, shared, clients, mail,
            position, one, jnp.int32(1),
        )  # fmt: skip

    return jax.eval_shape(run, jax.ShapeDtypeStruct((), jnp.int32))


def _bytes(tree: PyTree) -> int:
    return sum(int(np.prod(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _one_step(engine: Engine, b: int) -> Step:
    """Shapes of one client's step in bucket b, of an engine whose state does not exist yet."""
    state, published = _shapes(engine.method)
    stacked = lambda tree: jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, *x.shape), x.dtype), tree)
    return jax.eval_shape(
        lambda k, r, s, c, m: _example_step(engine, b, k, r, s, c, m, engine.buckets, engine.pool),
        jax.eval_shape(lambda: jax.random.key(0)),
        jax.ShapeDtypeStruct((), jnp.int32),
        each_round(engine.method, published),
        stacked(state.clients),
        stacked(state.mail),
    )


def _bytes_per_client(engine: Engine) -> dict[str, int]:
    method, spec = engine.method, engine.clients
    state, published = _shapes(method)
    shared = each_round(method, published)
    largest = int(np.argmax([s.rows for s in engine.sizes]))
    step = engine.steps[largest]
    in_exchange = {}
    if method.exchange:
        sent = jax.eval_shape(method.exchange.upload, state.clients)
        in_exchange = {"exchange_down": _bytes(published) - _bytes(shared), "exchange_up": _bytes(sent)}
    rows = engine.sizes[largest].rows
    table = lambda tree: _bytes({r: v for r, v in tree.items() if r in ITEM_ROLES})
    up_rows, down_full = _bytes(step.upload), _bytes(shared) + _bytes(state.mail)
    up_tables = table(step.upload)
    return {
        "down": down_full,
        "up": up_rows - up_tables + up_tables // rows * spec.num_items,
        "down_rows": down_full - table(shared) + table(shared) // spec.num_items * rows,
        "up_rows": up_rows,
        **in_exchange,
    }


def _uploads_bytes(engine: Engine, upload: Params) -> int:
    """What one device folds its clients' uploads into."""
    spec, aggregator = engine.clients, engine.method.aggregator
    if aggregator.over_mail:
        return 0
    fold = lambda one: aggregator.init(one, spec.num_items, spec.users_per_device)
    return _bytes(jax.eval_shape(fold, upload))


def _memory_bytes(engine: Engine) -> dict[str, int]:
    method, spec = engine.method, engine.clients
    state, _ = _shapes(method)
    row = row_bytes(engine)
    # a block holds rows and networks before and after training, their change, and the batch's vectors with gradients
    beside_rows = lambda tree: _bytes({r: v for r, v in tree.items() if r not in ITEM_ROLES})
    in_flight = max(
        block * ((4 * size.rows + 3 * size.batch) * row + 16 * (size.epoch + size.draws))
        + block * max(4 * beside_rows(step.params), beside_rows(step.upload))
        for size, block, step in zip(engine.sizes, engine.block, engine.steps, strict=True)
    )
    if method.exchange:
        in_flight = max(in_flight, 3 * _exchange_block(engine) * spec.num_items * row)
    parts = {
        "clients": _bytes(state.clients) * spec.num_slots,
        "mail": _bytes(state.mail) * spec.num_slots,
        # every device holds it whole
        "server": (3 * _bytes(state.server) + method.scratch) * spec.num_devices,
        "uploads": _uploads_bytes(engine, engine.steps[-1].upload) * spec.num_devices,
        "data": sum(x.nbytes for b in spec.buckets for x in b if x is not None),
        "block": in_flight * spec.num_devices,
    }
    return {**parts, "total": sum(parts.values())}
