"""Folding in: a model for a user who was not there in training.

The shared state is frozen as the run left it. The user starts like any client of the run before its first round
(the method's init_client on the shared state, no mail) and runs n local updates of the method on their own items and
freshly drawn negatives, downloading the same shared state each time: what a client would do in n rounds in which
nobody else moved. What the updates would send is dropped; the run is not touched.

It needs items of the catalogue and a method whose clients can learn by themselves. What a method says about single
clients through its mail (groups, neighbours) a new user does not get.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from fedjax_rec.client_step import START, client_key, local_step, store_clients
from fedjax_rec.data.sampling import MAX_SAMPLES, Record, Sizes, epoch_steps, sizes
from fedjax_rec.evaluate import method_scorer
from fedjax_rec.method import Client
from fedjax_rec.precision import in_float32
from fedjax_rec.rounds import Engine
from fedjax_rec.types import Params, PRNGKey
from fedjax_rec.validate import positive
from fedjax_rec.workdir import UsageError

if TYPE_CHECKING:
    from fedjax_rec.library import Recommendations, Run


@dataclasses.dataclass(frozen=True, eq=False)
class NewUser:
    """A folded-in user.

    Attributes:
        run: the run whose shared state serves them.
        items: their items, sorted indices [n].
        client: their private state (without a users axis).
        losses: mean training loss of each local update [rounds].
    """

    run: Run
    items: np.ndarray
    client: Client
    losses: np.ndarray

    def scores(self) -> np.ndarray:
        """Scores of the catalogue [items], see Run.scores."""
        engine, run = self.run.experiment.engine, self.run
        record, size = _record(engine, self.items)
        stacked = jax.tree.map(lambda x: x[None], self.client)
        round_ = jnp.asarray(run.round, jnp.int32)
        return np.asarray(_score(engine, size, run.experiment.key, round_, run.shared, stacked, record, engine.pool))

    def recommend(self, k: int = 10, *, exclude_seen: bool = True) -> Recommendations:
        """The k best items by raw ids; `exclude_seen` leaves out the items they came with and, under a cold-item split,
        what is no test item."""
        positive("k", k)
        competing = None
        if exclude_seen:
            competing = self.run.candidates.copy()
            competing[self.items] = False
        return self.run.top(self.scores(), competing, k)


def fold_in(run: Run, items: np.ndarray, rounds: int) -> NewUser:
    """See Run.fold_in.

    Args:
        items: sorted distinct item indices [n].
        rounds: local updates.
    """
    engine, method = run.experiment.engine, run.experiment.method
    record, size = _record(engine, items)
    # a method whose clients all start alike starts them from client 0's draw
    start = int(record.user) if method.client_init == "random" else 0
    fresh = method.init_client(client_key(run.experiment.key, START, jnp.asarray(start)), run.shared)
    clients, losses = _train(
        engine, size, run.experiment.key, jnp.int32(run.round), jnp.int32(rounds), run.shared,
        jax.tree.map(lambda x: x[None], fresh), record, engine.pool, jnp.zeros(_capacity(rounds)),
    )  # fmt: skip
    losses = np.asarray(losses)[:rounds]
    if not np.isfinite(losses).all():
        raise FloatingPointError(f"the new user's loss is not finite after {rounds} local updates: give fewer rounds")
    return NewUser(run, items, jax.tree.map(lambda x: x[0], clients), losses)


def _capacity(rounds: int) -> int:
    """Places for losses: a power of two, so that another number of rounds seldom compiles anew."""
    return 1 << (rounds - 1).bit_length()


def _record(engine: Engine, items: np.ndarray) -> tuple[Record, Sizes]:
    """The user as the sampler sees them, padded to a width of the run's buckets where one fits."""
    spec, method = engine.clients, engine.method
    widths = sorted(b.history.shape[1] for b in spec.buckets)
    width = next((w for w in widths if w >= len(items)), len(items))
    size = sizes(method.sampling, width, spec.num_items, all_rows=method.rows == "all")
    if size.epoch > MAX_SAMPLES:
        raise UsageError(f"{len(items)} items make {size.epoch} samples an epoch: expected at most {MAX_SAMPLES}")
    padded = lambda values, fill: jnp.asarray(np.pad(values, (0, width - len(values)), constant_values=fill), jnp.int32)
    # positions in the pool of what must not be drawn
    forbidden = items if spec.pool is None else np.flatnonzero(np.isin(spec.pool, items))
    record = Record(
        user=jnp.int32(spec.num_users),  # a stream of randomness that is no user's of the run
        history=padded(items, spec.num_items),
        length=jnp.int32(len(items)),
        forbidden=padded(forbidden, spec.pool_size),
        num_forbidden=jnp.int32(len(forbidden)),
    )
    return record, size


@functools.partial(jax.jit, static_argnums=(0, 1))
@in_float32
def _train(
    engine: Engine,
    size: Sizes,
    key: PRNGKey,
    first: Int[Array, ""],
    rounds: Int[Array, ""],
    shared: Params,
    clients: Client,
    record: Record,
    pool: Array | None,
    losses: Float[Array, "capacity"],
) -> tuple[Client, Float[Array, "capacity"]]:
    """`rounds` local updates of one client (leading axis 1) from round number `first` on."""
    slot, items = jnp.int32(0), engine.clients.num_items
    steps = epoch_steps(engine.method.sampling, size, record.length)

    def one(t, state):
        clients, losses = state
        step = local_step(
            engine.method, size, items, pool, key, first + t, shared, clients, (), slot, record, steps
        )  # fmt: skip
        kept = jax.tree.map(lambda x: x[None], step.client)
        rows = None if size.dense else step.rows[None]
        return store_clients(clients, slot[None], rows, kept), losses.at[t].set(step.info["loss"])

    return jax.lax.fori_loop(0, rounds, one, (clients, losses))


@functools.partial(jax.jit, static_argnums=(0, 1))
@in_float32
def _score(engine: Engine, size: Sizes, key, round_, shared, clients, record, pool):
    engine = dataclasses.replace(engine, pool=pool)
    steps = epoch_steps(engine.method.sampling, size, record.length)
    return method_scorer(engine, (key, round_, shared), (clients, ()), jnp.int32(0), record, size, steps)
