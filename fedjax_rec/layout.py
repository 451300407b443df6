"""How a method lies on devices: blocks of clients, their static sizes, and what a round of it costs in bytes."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh
from jaxtyping import Array

from fedjax_rec.client_step import Step, each_round, local_step, record_at
from fedjax_rec.data.clients import Bucket, Clients
from fedjax_rec.data.sampling import Sizes, epoch_steps
from fedjax_rec.method import Client, Mail, Method, Server
from fedjax_rec.types import ITEM_ROLES, Params, PyTree

AXIS = "clients"
CPU_BLOCK_BYTES = 2**18  # a few clients: their rows, changes and batches together stay in one core's L2 cache
EXCHANGE_CPU_BYTES = 2**22  # whole tables of a few clients
DEVICE_BLOCK_BYTES = 2**30  # enough clients to occupy an accelerator
DEVICE_BLOCK_SHARE = 1 / 48  # of its memory, at most: what is in flight takes about eight times a block's rows


def clients_mesh(num_devices: int | None = None) -> Mesh:
    """A 1-D mesh named `clients` over the first `num_devices` devices (default: all)."""
    # not jax.make_mesh, which on TPUs wants the devices to be a block of the machine: three of four are none
    return Mesh(np.array(jax.devices()[:num_devices]), (AXIS,), axis_types=(AxisType.Auto,))


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
class Layout:
    """One method on one population, laid out on a mesh.

    Attributes:
        method: what to run.
        clients: who runs it (see data/clients.py).
        mesh: 1-D mesh over which clients are spread; its size equals clients.num_devices.
        block_size: clients per block; 0 chooses per bucket so that a block's rows fit the cache (CPU) or occupy
            the device, and that a cohort fills its blocks. Part of a run's identity: sums are ordered by it.
        sizes: of every bucket's samples and rows (see data/sampling.py).
        steps, block: for every bucket, the shapes of one client's step and the clients per block.
        fixed: for every bucket, the steps of an epoch where all its blocks take as many, else 0 (see fixed_steps).
        buckets: the clients' arrays on the devices.
        pool: the candidates of protocols that draw negatives from a list, on the devices; else None.
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

    def __repr__(self) -> str:  # by sizes: the default prints every array
        spec = self.clients
        what = (
            f"{spec.num_users:,} clients", f"{spec.num_items:,} items", f"{len(spec.buckets)} buckets",
            f"{spec.num_devices} devices",
        )  # fmt: skip
        return f"{type(self).__name__}({self.method.name}: {', '.join(what)})"

    def per_device(self) -> list[int]:
        """Clients of every bucket on one device."""
        return [b.user.shape[0] // self.clients.num_devices for b in self.clients.buckets]

    def exchange_block(self) -> int:
        """Clients whose whole tables are in flight at once, before and after an exchange."""
        budget = EXCHANGE_CPU_BYTES if jax.default_backend() == "cpu" else device_block_bytes()
        fits = max(budget // (3 * self.clients.num_items * self.row_bytes()), 1)
        return int(min(2 ** int(np.log2(fits)), max(self.per_device())))

    def row_bytes(self) -> int:
        """Bytes of one item row over all item roles that a client holds in a round."""
        _, client, mail, published = _shapes(self.method)
        shared = each_round(self.method, published)
        mail = mail if isinstance(mail, dict) else {}
        tables = [v for tree in (shared, client, mail) for r, v in tree.items() if r in ITEM_ROLES]
        return sum(int(np.prod(x.shape[1:])) * x.dtype.itemsize for x in jax.tree.leaves(tables))

    def bytes_per_client(self) -> dict[str, int]:
        """Bytes that one client receives and sends in a round: `down`, `up` count full tables (what the
        protocols exchange); `down_rows`, `up_rows` only the working set of the largest bucket; `exchange_down`,
        `exchange_up` what a round with an exchange adds."""
        _, client, mail, published = _shapes(self.method)
        shared = each_round(self.method, published)
        largest = int(np.argmax([s.rows for s in self.sizes]))
        rows, upload = self.sizes[largest].rows, self.steps[largest].upload
        in_exchange = {}
        if self.method.exchange:
            sent = jax.eval_shape(self.method.exchange.upload, client)
            in_exchange = {"exchange_down": _bytes(published) - _bytes(shared), "exchange_up": _bytes(sent)}
        up_rows, up_tables = _bytes(upload), _bytes(_tables(upload))
        down, down_tables = _bytes(shared) + _bytes(mail), _bytes(_tables(shared))
        return {
            "down": down,
            "up": up_rows - up_tables + up_tables // rows * self.clients.num_items,
            "down_rows": down - down_tables + down_tables // self.clients.num_items * rows,
            "up_rows": up_rows,
            **in_exchange,
        }

    def memory_bytes(self) -> dict[str, int]:
        """Estimated bytes of all devices together: server and client state, folded uploads, data, the largest block."""
        spec, row = self.clients, self.row_bytes()
        server, client, mail, _ = _shapes(self.method)
        # a block holds rows and networks before and after training, their change, the batch's vectors and gradients
        beside_rows = lambda tree: _bytes(tree) - _bytes(_tables(tree))
        in_flight = max(
            block * ((4 * size.rows + 3 * size.batch) * row + 16 * (size.epoch + size.draws))
            + block * max(4 * beside_rows(step.params), beside_rows(step.upload))
            for size, block, step in zip(self.sizes, self.block, self.steps, strict=True)
        )
        if self.method.exchange:
            in_flight = max(in_flight, 3 * self.exchange_block() * spec.num_items * row)
        parts = {
            "clients": _bytes(client) * spec.num_slots,
            "mail": _bytes(mail) * spec.num_slots,
            # every device holds it whole
            "server": (3 * _bytes(server) + self.method.scratch) * spec.num_devices,
            "uploads": self._folded_bytes() * spec.num_devices,
            "data": sum(x.nbytes for b in spec.buckets for x in b if x is not None),
            "block": in_flight * spec.num_devices,
        }
        return {**parts, "total": sum(parts.values())}

    def _folded_bytes(self) -> int:
        """What one device folds its clients' uploads into."""
        spec, aggregator = self.clients, self.method.aggregator
        if aggregator.over_mail:
            return 0
        fold = lambda one: aggregator.init(one, spec.num_items, spec.users_per_device)
        return _bytes(jax.eval_shape(fold, self.steps[-1].upload))


# ---- what is decided when an engine is made ------------------------------------------------------------------


def fixed_steps(layout: Layout, cohort: int) -> tuple[int, ...]:
    """Where a bucket's clients of a round lie in one block on an accelerator: the steps of its longest history, which
    decides anyway.

    An accelerator asks the host before every pass of a loop whose length it does not know. CPUs ask nobody, and their
    blocks are small.
    """
    if jax.default_backend() == "cpu":
        return (0,) * len(layout.block)
    longest = [
        int(epoch_steps(layout.method.sampling, size, jnp.int32(bucket.length.max())))
        for bucket, size in zip(layout.clients.buckets, layout.sizes, strict=True)
    ]
    each = zip(layout.block, _expected(layout, cohort), longest, strict=True)
    return tuple(steps if block >= n else 0 for block, n, steps in each)


def block_sizes(layout: Layout, cohort: int) -> tuple[int, ...]:
    """Clients per block for every bucket."""
    if layout.block_size:
        return tuple(min(layout.block_size, n) for n in layout.per_device())
    per_row, chosen = layout.row_bytes(), []
    for size, step, n in zip(layout.sizes, layout.steps, _expected(layout, cohort), strict=True):
        # what training leaves as it was (views) is held once; clients without tables (of centralised methods) hold
        # what they send
        trained = _bytes(_tables(step.params))
        held = (size.rows * per_row + trained) // 2 if per_row else _bytes(step.upload)
        fits = max(default_block_bytes() // max(held, 1), 1)
        blocks = -(-n // fits)
        chosen.append(-(-n // blocks))  # equal ones: what is missing in the last one is computed all the same
    return tuple(chosen)


def _expected(layout: Layout, cohort: int) -> list[int]:
    """How many clients of every bucket take part on one device in most rounds."""
    here = layout.per_device()
    share = cohort / layout.clients.num_users if cohort else 1.0
    if share >= 1:
        return here
    # what a bucket sends varies: its mean with its standard deviation
    means = [n * share for n in here]
    return [min(int(np.ceil(mean + np.sqrt(mean))), n) for mean, n in zip(means, here, strict=True)]


# ---- shapes --------------------------------------------------------------------------------------------------


def one_step(layout: Layout, b: int) -> Step:
    """Shapes of one client's step in bucket b, of an engine whose state does not exist yet."""
    _, client, mail, published = _shapes(layout.method)
    stacked = lambda tree: jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, *x.shape), x.dtype), tree)
    return jax.eval_shape(
        lambda k, r, s, c, m: step_shapes(layout, b, k, r, s, c, m, layout.buckets, layout.pool),
        jax.eval_shape(lambda: jax.random.key(0)),
        jax.ShapeDtypeStruct((), jnp.int32),
        each_round(layout.method, published),
        stacked(client),
        stacked(mail),
    )


def step_shapes(layout: Layout, b: int, key, round_, shared, clients, mail, buckets, pool) -> Step:
    """Shapes of one client's step in bucket b."""
    spec = layout.clients

    def run(position):
        record = record_at(buckets[b], position[None], spec.num_users, spec.num_items, spec.pool_size)
        one = jax.tree.map(lambda x: x[0], record)
        return local_step(
            layout.method, layout.sizes[b], spec.num_items, pool, key, round_, shared, clients, mail,
            position, one, jnp.int32(1),
        )  # fmt: skip

    return jax.eval_shape(run, jax.ShapeDtypeStruct((), jnp.int32))


def _shapes(method: Method) -> tuple[Server, Client, Mail, Params]:
    """Shapes of the server, of one client and its mail, and of what is published."""

    def fresh(key):
        server = method.init_server(key)
        shared = method.publish(key, server)
        return server, method.init_client(key, shared), method.init_mail(server), shared

    return jax.eval_shape(fresh, jax.eval_shape(lambda: jax.random.key(0)))


def _tables(tree: Params) -> Params:
    """The item roles of a role tree."""
    return {role: value for role, value in tree.items() if role in ITEM_ROLES}


def _bytes(tree: PyTree) -> int:
    return sum(int(np.prod(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))
