"""Evaluation: the rank of every held-out item among all candidates, without sorting, in blocks of clients.

Whatever can score the catalogue for a client (a method, or a ranker without training) goes through the same pass:
scores -> mask -> count the strictly greater and the equal ones.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from fedjax_rec.client_step import local_step, record_at, restrict_client
from fedjax_rec.data.clients import padded_rows, row_offsets
from fedjax_rec.data.sampling import Record, Sizes, epoch_steps
from fedjax_rec.data.splits import Pairs, Split
from fedjax_rec.layout import AXIS
from fedjax_rec.method import Batch, Listed, LocalData
from fedjax_rec.precision import in_float32
from fedjax_rec.protocols import HONEST, Protocol
from fedjax_rec.roles import item_roles, put_rows
from fedjax_rec.rounds import Cohort, Engine, State, publish
from fedjax_rec.types import PRNGKey, PyTree

TOP = 10  # length of the lists behind coverage and popularity bias
SAMPLED_NEGATIVES = 99
CPU_BLOCK_BYTES = 2**22
DEVICE_BLOCK_BYTES = 2**29

Scorer = Callable[[Engine, PyTree, PyTree, Int[Array, ""], Record, Sizes, Int[Array, ""]], Float[Array, "items"]]
"""(engine, replicated, sharded, slot, record, sizes, steps) -> scores of the catalogue for one client."""


class Ranks(NamedTuple):
    """Ranks by user id, [users, targets], NaN where there is no target or the client was not evaluated."""

    valid: np.ndarray
    test: np.ndarray
    recommended: np.ndarray  # [items] clients whose top list holds the item
    nonfinite: int  # scores that were not finite numbers


@dataclasses.dataclass(frozen=True, eq=False)
class Evaluator:
    """Ranks the held-out items of a split for the clients of an engine.

    Attributes:
        engine: whose clients are evaluated.
        protocol: masks.
        sampled: rank against 99 sampled items instead of the catalogue (named, never the default).
        targets: per bucket (valid [n, t], test [n, t]) item ids padded with num_items.
        known: per bucket all items of each user (for `sampled`), else ().
        candidates: (valid, test) ids of the items that compete, or None for all.
    """

    engine: Engine
    split: Split
    protocol: Protocol
    sampled: bool
    targets: tuple[tuple[Array, Array], ...]
    known: tuple[Array, ...]
    candidates: tuple[Array, Array] | None

    def ranks(self, key: PRNGKey, state: State, round_: int, cohort: Cohort | None = None) -> Ranks:
        """Ranks under the method's current state; `round_` is the number of rounds it has seen."""
        round_ = jnp.asarray(round_, jnp.int32)  # as in a round: `publish` compiles once
        shared = publish(self.engine, key, state.server, round_)
        replicated = (key, round_, shared)
        return self.ranks_of(method_scorer, replicated, (state.clients, state.mail), cohort)

    def ranks_of(self, scorer: Scorer, replicated: PyTree, sharded: PyTree, cohort: Cohort | None = None) -> Ranks:
        """Ranks under any scorer. `sharded` leaves have a leading axis of user slots.

        The scorer is called as scorer(engine, replicated, sharded, slot, record, sizes, steps) for one client.
        """
        valid, test, recommended, bad = _rank_pass(
            self, scorer, replicated, sharded, cohort or self.engine.everybody, self.engine.buckets, self.targets,
            self.known, self.candidates, self.engine.pool,
        )  # fmt: skip
        slots = self.engine.clients.slots
        return Ranks(np.asarray(valid)[slots], np.asarray(test)[slots], np.asarray(recommended), int(bad))


def make_evaluator(engine: Engine, split: Split, *, protocol: Protocol = HONEST, sampled: bool = False) -> Evaluator:
    """Lays the targets out like the engine's buckets."""
    place = lambda x: jax.device_put(x, NamedSharding(engine.mesh, P(AXIS)))
    valid, test = _layout(split.valid, engine), _layout(split.test, engine)
    targets = tuple((place(v), place(t)) for v, t in zip(valid, test, strict=True))
    known = ()
    if sampled:
        joined = [np.concatenate(part) for part in zip(split.train, split.valid, split.test, strict=True)]
        order = np.lexsort((joined[1], joined[0]))
        known = tuple(place(x) for x in _layout(Pairs(joined[0][order], joined[1][order]), engine, by_bucket=True))
    candidates = None
    if split.candidates is not None:
        candidates = tuple(jnp.asarray(np.flatnonzero(split.candidates[part])) for part in ("valid", "test"))
    return Evaluator(engine, split, protocol, sampled, targets, known, candidates)


def _layout(pairs: Pairs, engine: Engine, *, by_bucket: bool = False) -> list[np.ndarray]:
    """Each bucket's items per client, padded to the most that any user has (`by_bucket`: any of the bucket)."""
    spec = engine.clients
    offsets = row_offsets(pairs.user, spec.num_users)
    counts = np.append(np.diff(offsets), 0)  # padding users have none
    users = [np.asarray(bucket.user) for bucket in spec.buckets]
    most = [max(int(counts[of if by_bucket else slice(None)].max(initial=0)), 1) for of in users]
    return [padded_rows(pairs, of, offsets, width, spec.num_items) for of, width in zip(users, most, strict=True)]


def catalogue_data(record: Record, num_items: int, round_: Int[Array, ""]) -> LocalData:
    """A client's data with the catalogue as its rows and no training samples: what scoring needs."""
    in_history = record.history < num_items
    return LocalData(
        rows=jnp.arange(num_items, dtype=jnp.int32),
        row_mask=jnp.ones(num_items, bool),
        samples=Listed(Batch(jnp.zeros((1, 1), jnp.int32), jnp.zeros((1, 1)), jnp.zeros((1, 1)))),
        history=jnp.where(in_history, record.history, 0),
        history_mask=in_history,
        num_samples=jnp.zeros(()),
        num_steps=jnp.zeros((), jnp.int32),
        round=round_,
    )


def method_scorer(engine: Engine, replicated, sharded, slot, record: Record, size: Sizes, steps):
    """Scores of a client under the method, before (post_aggregate) or after (post_local) a local update."""
    return engine.method.score(*client_model(engine, replicated, sharded, slot, record, size, steps))


def client_model(engine: Engine, replicated, sharded, slot, record: Record, size: Sizes, steps):
    """(shared, params, data): what a client is judged by, over the catalogue."""
    method, num_items = engine.method, engine.clients.num_items
    key, round_, shared = replicated
    clients, mail = sharded
    data = catalogue_data(record, num_items, round_)
    client = restrict_client(clients, slot, None)
    mine = jax.tree.map(lambda x: x.at[slot].get(mode="clip"), mail)
    params = method.download(shared, mine, client, data)
    if method.evaluate_at == "post_local":
        # the local update that round number `round_` would begin with, so what the clients will hold next
        step = local_step(
            method, size, num_items, engine.pool, key, round_, shared, clients, mail, slot, record, steps
        )  # fmt: skip
        rows = data.rows if size.dense else step.rows
        tuned = {
            role: put_rows(params[role], rows, step.params[role]) if role in item_roles(params) else value
            for role, value in step.params.items()
        }
        params = {**params, **tuned}
    return shared, params, data


def rank_of(
    scores: Float[Array, "items"],
    targets: Int[Array, "targets"],
    competing: Float[Array, "competing"] | None = None,
    count: Int[Array, ""] | None = None,
) -> Float[Array, "targets"]:
    """1 + (strictly greater) + (ties) / 2 of each target, counted over the other items whose score is above -inf.

    Padding targets (>= items) get NaN.

    Args:
        competing: scores of the items that compete, the targets among them; default: all.
        count: targets beyond so many are padding, and not looked at.
    """
    competing = scores if competing is None else competing

    def one(target):
        own = scores.at[target].get(mode="fill", fill_value=jnp.nan)
        # an item at -inf does not compete: nothing is greater because of it, and it ties with nobody
        ties = jnp.where(own > -jnp.inf, (competing == own).sum() - 1, 0)
        return jnp.where(jnp.isnan(own), jnp.nan, 1.0 + (competing > own).sum() + 0.5 * ties)

    if targets.shape[0] == 1:
        return one(targets[0])[None]
    body = lambda i, ranks: ranks.at[i].set(one(targets[i]))
    return jax.lax.fori_loop(0, targets.shape[0] if count is None else count, body, jnp.full(targets.shape, jnp.nan))


def _eval_block(engine: Engine, scorer: Scorer, width: int) -> int:
    """Clients scored at once, so that their score vectors and private tables fit the cache or the device."""
    items = engine.clients.num_items
    tables = engine.row_bytes() if scorer is method_scorer else 0
    budget = CPU_BLOCK_BYTES if jax.default_backend() == "cpu" else DEVICE_BLOCK_BYTES
    block = max(budget // (items * (16 + 2 * tables)), 1)
    return int(min(2 ** int(np.log2(block)), width))


@functools.partial(jax.jit, static_argnums=(0, 1))
@in_float32
def _rank_pass(evaluator: Evaluator, scorer, replicated, sharded, cohort, buckets, targets, known, candidates, pool):
    engine = evaluator.engine
    body = functools.partial(_rank_device, evaluator, scorer)
    return jax.shard_map(
        body,
        mesh=engine.mesh,
        in_specs=(P(), P(AXIS), P(AXIS), P(AXIS), P(AXIS), P(AXIS), P(), P()),
        out_specs=(P(AXIS), P(AXIS), P(), P()),
        check_vma=False,
    )(replicated, sharded, cohort, buckets, targets, known, candidates, pool)


def _rank_device(evaluator: Evaluator, scorer, replicated, sharded, cohort, buckets, targets, known, candidates, pool):
    """One device's clients: ranks by slot, and what their lists hold."""
    # an array on the mesh must come in as an argument: scorers read the pool from the engine
    engine, protocol = dataclasses.replace(evaluator.engine, pool=pool), evaluator.protocol
    spec, method = engine.clients, engine.method
    slots = spec.users_per_device
    top = min(TOP, spec.num_items)

    def one_client(slot, record, valid_items, test_items, known_items, size, steps, counts):
        scores = scorer(engine, replicated, sharded, slot, record, size, steps)
        real = record.user < spec.num_users
        bad = ((~jnp.isfinite(scores)).sum() * real).astype(jnp.int32)
        # -inf is for items that do not compete: what has no usable score competes, and comes last
        scores = jnp.maximum(jnp.where(jnp.isnan(scores), -jnp.inf, scores), jnp.finfo(scores.dtype).min)
        scores = scores.at[record.history].set(-jnp.inf, mode="drop")
        at_valid = at_test = scores
        if candidates is None and protocol.mask_valid_at_test:
            at_test = scores.at[valid_items].set(-jnp.inf, mode="drop")
        if evaluator.sampled:
            at_valid, at_test = (
                jnp.where(_sampled_items(part, record.user, known_items, wanted, allowed, spec.num_items), at, -jnp.inf)
                for part, at, wanted, allowed in zip(
                    (0, 1), (at_valid, at_test), (valid_items, test_items), candidates or (None, None), strict=True
                )
            )
        # of a split by items few compete: only their scores are compared
        few = () if candidates is None or evaluator.sampled else candidates
        competing = tuple(scores[ids] for ids in few) or (at_valid, at_test)
        best, listed = jax.lax.top_k(competing[1], min(top, competing[1].shape[0]))
        listed = few[1][listed] if few else listed
        listed = jnp.where((best > -jnp.inf) & real, listed, spec.num_items)
        valid = rank_of(at_valid, valid_items, competing[0], counts[0])
        return valid, rank_of(at_test, test_items, competing[1], counts[1]), listed, bad

    widths = [t.shape[1] for t in targets[0]]
    carry = (
        jnp.full((slots, widths[0]), jnp.nan),
        jnp.full((slots, widths[1]), jnp.nan),
        jnp.zeros(spec.num_items, jnp.int32),
        jnp.zeros((), jnp.int32),
    )
    for b, bucket in enumerate(buckets):
        most = cohort.positions[b].shape[0]
        block = _eval_block(engine, scorer, most)
        count = cohort.blocks[b][0] * engine.block[b]
        positions = jnp.pad(cohort.positions[b], (0, -most % block), constant_values=most)

        def one_block(i, carry, b=b, bucket=bucket, block=block, positions=positions):
            valid, test, recommended, bad = carry
            position = jax.lax.dynamic_slice(positions, (i * block,), (block,))
            record = record_at(bucket, position, spec.num_users, spec.num_items, spec.pool_size)
            slot = bucket.slot.at[position].get(mode="fill", fill_value=slots)
            take = lambda x: x.at[position].get(mode="fill", fill_value=spec.num_items)
            steps = epoch_steps(method.sampling, engine.sizes[b], record.length.max())
            seen = take(known[b]) if evaluator.sampled else record.history
            wanted = take(targets[b][0]), take(targets[b][1])
            counts = tuple((items < spec.num_items).sum(1).max() for items in wanted)
            run = lambda s, r, v, t, k: one_client(s, r, v, t, k, engine.sizes[b], steps, counts)
            v, t, listed, wrong = jax.vmap(run)(slot, record, *wanted, seen)
            return (
                valid.at[slot].set(v, mode="drop"),
                test.at[slot].set(t, mode="drop"),
                recommended.at[listed.reshape(-1)].add(1, mode="drop"),
                bad + wrong.sum(),
            )

        carry = jax.lax.fori_loop(0, -(-count // block), one_block, carry)
    valid, test, recommended, bad = carry
    return valid, test, jax.lax.psum(recommended, AXIS), jax.lax.psum(bad, AXIS)


def _sampled_items(
    part: int,
    user: Int[Array, ""],
    known: Int[Array, "known"],
    wanted: Int[Array, "targets"],
    candidates: Int[Array, "candidates"] | None,
    num_items: int,
) -> Bool[Array, "items"]:
    """Mask of the wanted items and of 99 outside all of a user's items (fewer where fewer compete), fixed by the
    user and the part (0 validation, 1 test)."""
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(SAMPLED_NEGATIVES), part), user)
    order = jax.random.uniform(key, (num_items,)).at[known].set(-1.0, mode="drop")
    if candidates is not None:
        order = jnp.full(num_items, -1.0).at[candidates].set(order[candidates])
    value, drawn = jax.lax.top_k(order, min(SAMPLED_NEGATIVES, num_items))
    return jnp.zeros(num_items, bool).at[drawn].set(value >= 0).at[wanted].set(True, mode="drop")
