"""Training samples of one client, drawn on the device without sorting.

Stratified negatives. A client with c items it may draw and q negatives to draw takes, for j = 0..q-1, the item
of rank floor((j c + v_j) / q) among them, v_j uniform in {0..c-1}. Every item is expected q / c times (exactly,
in integers); the draws come out sorted, so that equal draws are neighbours and no sort is needed to find the
distinct ones. Given one draw the others are not independent of it: they keep to their own strata, which only
lowers the variance of the sample.

A rank becomes a position in the pool by counting the forbidden positions before it: forbidden position f_i has
f_i - i free ones before it, and since the strata say where f_i - i falls among the draws to within one place,
the count is a histogram and a running sum instead of a binary search per draw.

Batches come from an affine permutation of the sample index, i -> (a i + b) mod s with a prime that does not
divide s.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, ArrayLike, Float, Int, Integer, UInt32

from fedjax_rec.method import Batch, LocalData, Sampling
from fedjax_rec.types import PRNGKey

EXACT_FLOAT = 2**24  # integers below this are exact in float32
MAX_SAMPLES = 2**20  # per client and epoch; the affine permutation multiplies two such numbers in two halves
MAX_STRATA = 2**15  # above, j * (c mod q) + v no longer fits 32 bits and draws are independent instead


def _primes(low: int, high: int) -> np.ndarray:
    candidates = np.arange(low, high)
    divisors = np.arange(2, int(high**0.5) + 1)
    return candidates[(candidates[:, None] % divisors != 0).all(1)]


PRIMES = _primes(2**16 - 2**12, 2**16).astype(np.uint32)


class Record(NamedTuple):
    """One client as the sampler sees it (Bucket without its leading axis)."""

    user: Int[Array, ""]
    history: Int[Array, "history"]
    length: Int[Array, ""]
    forbidden: Int[Array, "forbidden"]
    num_forbidden: Int[Array, ""]


class Sizes(NamedTuple):
    """Static sizes of a bucket's LocalData."""

    history: int
    draws: int  # negatives held in the working set
    epoch: int  # samples of one epoch
    batch: int
    steps: int  # steps of one epoch
    rows: int
    dense: bool  # the working set is the catalogue


def sizes(sampling: Sampling, history: int, num_items: int, *, all_rows: bool = False) -> Sizes:
    """Sizes for histories of up to `history` items. A working set as large as the catalogue becomes it."""
    negatives = history * sampling.negatives
    draws = negatives * (sampling.local_epochs if sampling.redraw == "epoch" else 1)
    epoch = history + negatives
    batch = epoch if sampling.batch_size == 0 else min(sampling.batch_size, epoch)
    dense = all_rows or history + draws >= num_items
    rows = num_items if dense else history + draws
    return Sizes(history, draws, epoch, batch, -(-epoch // batch), rows, dense)


def epoch_steps(sampling: Sampling, size: Sizes, longest: Int[Array, ""]) -> Int[Array, ""]:
    """Steps that an epoch of a client with `longest` positives takes."""
    return jnp.maximum(-(-longest * (1 + sampling.negatives) // size.batch), 1)


def _divide(x: UInt32[Array, "*n"], by: UInt32[Array, ""], largest: int) -> UInt32[Array, "*n"]:
    """x // by. Integer division does not vectorise on CPUs; below 2**24 a float product and one correction is
    exact."""
    if largest >= EXACT_FLOAT:
        return x // by
    by_signed = by.astype(jnp.int32)
    signed = x.astype(jnp.int32)
    guess = (signed.astype(jnp.float32) * (1.0 / by_signed.astype(jnp.float32))).astype(jnp.int32)
    rest = signed - guess * by_signed
    guess = guess + (rest >= by_signed).astype(jnp.int32) - (rest < 0).astype(jnp.int32)
    return guess.astype(jnp.uint32)


def _uniform_below(key: PRNGKey, count: int, bound: UInt32[Array, ""]) -> UInt32[Array, "count"]:
    """`count` integers in 0..bound-1; the bias is below bound / 2**24."""
    unit = (jax.random.bits(key, (count,), jnp.uint32) >> 8).astype(jnp.float32)
    scaled = unit * (bound.astype(jnp.float32) / EXACT_FLOAT)
    return jnp.minimum(scaled.astype(jnp.uint32), jnp.maximum(bound, 1) - 1)


def stratified_ranks(
    key: PRNGKey, free: UInt32[Array, ""], draws: UInt32[Array, ""], most: int, pool: int
) -> Int[Array, "most"]:
    """Sorted ranks in 0..free-1, one per stratum; entries from `draws` on are meaningless."""
    j = jnp.arange(most, dtype=jnp.uint32)
    safe = jnp.maximum(draws, 1)
    whole = free // safe
    v = _uniform_below(key, most, free)
    # floor((j c + v) / q) with c = whole q + r, so that no product leaves 32 bits
    return (j * whole + _divide(j * (free - whole * safe) + v, safe, most * most + pool)).astype(jnp.int32)


def _running_sum(x: Float[Array, "n"]) -> Int[Array, "n"]:
    """Running sum of small counts, exact below 2**24: sums inside pieces of 32 by one triangular product, which takes
    a third of the time of `cumsum` on CPUs."""
    pieces = jnp.pad(x, (0, -x.shape[0] % 32)).reshape(-1, 32)
    inside = jnp.matmul(pieces, jnp.triu(jnp.ones((32, 32))), precision="highest")
    before = jnp.cumsum(inside[:, -1]) - inside[:, -1]
    return (inside + before[:, None]).reshape(-1)[: x.shape[0]].astype(jnp.int32)


def _positions_of_sorted_ranks(ranks, gaps, valid_gap, free, draws) -> Int[Array, "most"]:
    """Pool position of each sorted stratified rank: rank + number of forbidden positions at or before it."""
    most = ranks.shape[0]
    scale = draws.astype(jnp.float32) / jnp.maximum(free, 1).astype(jnp.float32)
    first = jnp.clip((gaps.astype(jnp.float32) * scale).astype(jnp.int32) - 1, 0, most)
    for _ in range(3):  # the stratum is known to within one place on either side
        behind = (first < most) & (ranks[jnp.minimum(first, most - 1)] < gaps)
        first = first + behind.astype(jnp.int32)
    first = jnp.where(valid_gap, first, most)
    return ranks + _running_sum(jnp.zeros(most, jnp.float32).at[first].add(1.0, mode="drop"))


def draw_positions(
    key: PRNGKey, record: Record, draws: Int[Array, ""], most: int, pool: int, draw: str
) -> Int[Array, "most"]:
    """Sorted pool positions outside the forbidden ones; entries from `draws` on are meaningless.

    With `draw="stratified"` one per stratum, else independent with replacement (sorted afterwards).
    """
    index = jnp.arange(record.forbidden.shape[0])
    valid = index < record.num_forbidden
    gaps = jnp.where(valid, record.forbidden - index, jnp.iinfo(jnp.int32).max)
    free = (pool - record.num_forbidden).astype(jnp.uint32)
    if draw == "stratified" and most <= MAX_STRATA:
        ranks = stratified_ranks(key, free, draws.astype(jnp.uint32), most, pool)
        return _positions_of_sorted_ranks(ranks, gaps, valid, free, draws)
    ranks = _uniform_below(key, most, free).astype(jnp.int32)
    ranks = jnp.sort(jnp.where(jnp.arange(most) < draws, ranks, jnp.iinfo(jnp.int32).max - pool))
    return ranks + jnp.searchsorted(gaps, ranks, side="right").astype(jnp.int32)


class Order(NamedTuple):
    """The affine permutations of one client's sample indices, one per epoch."""

    factor: UInt32[Array, "epochs"]
    offset: UInt32[Array, "epochs"]


def draw_order(key: PRNGKey, count: UInt32[Array, ""], epochs: int) -> Order:
    """Permutations of 0..count-1."""
    safe = jnp.maximum(count, 1)
    choice, shift = jax.random.bits(key, (2, epochs), jnp.uint32)
    pick = choice % len(PRIMES)
    prime, other = jnp.asarray(PRIMES)[pick], jnp.asarray(PRIMES)[(pick + 1) % len(PRIMES)]
    # two different primes of this size cannot both divide a number below 2**20
    return Order(jnp.where(safe % prime == 0, other, prime) % safe, shift % safe)


def samples_of_step(
    order: Order, count: UInt32[Array, ""], size: Sizes, steps: Integer[ArrayLike, ""], step: Int[Array, ""]
):
    """(sample indices [batch], whether each place holds a sample [batch], epoch []) of one local step.

    `steps` is the number of steps that an epoch takes in this block: step t is batch t mod steps of epoch t // steps.
    """
    epochs = order.factor.shape[0]
    epoch = jnp.minimum(step // steps, epochs - 1)
    start = ((step - epoch * steps) * size.batch).astype(jnp.uint32)
    slot = jnp.arange(size.batch, dtype=jnp.uint32)
    mask = (start + slot < count) & (step < epochs * steps)
    safe = jnp.maximum(count, 1)
    if size.steps == 1:  # one step sees the whole epoch: its order does not matter
        return jnp.minimum(start + slot, safe - 1).astype(jnp.int32), mask, epoch
    factor = order.factor[epoch]
    base = (_product_mod(factor, start, safe, size.epoch) + order.offset[epoch]) % safe
    largest = size.epoch * (size.batch + 1)
    if largest < 2**32:
        line = base + factor * slot
        index = line - safe * _divide(line, safe, largest)
    else:
        index = (base + _product_mod(factor, slot % safe, safe, size.epoch)) % safe
    return index.astype(jnp.int32), mask, epoch


def _product_mod(a, b, modulus, largest: int):
    """a b mod modulus for a, b < largest <= 2**20, in 32 bits."""
    b = b % modulus
    if largest <= 2**16:
        return (a * b) % modulus
    high = ((a >> 10) * b) % modulus
    return ((high << 10) + ((a & 1023) * b) % modulus) % modulus


@struct.dataclass
class Drawn:
    """One client's samples of a round. Batches are made when a step asks for them: nothing is stored for the steps
    that only longer histories take.

    Attributes:
        length: positives.   count: samples of an epoch.   steps: steps of an epoch in this block.
        lookup: row of every negative after the rows of the positives, these as -1 - row: one gather gives a sample's
            row and its label.
        deal: which draws an epoch takes (see _place_of_negative).
    """

    length: Int[Array, ""]
    count: UInt32[Array, ""]
    steps: Integer[ArrayLike, ""]
    order: Order
    lookup: Int[Array, "history_and_draws"]
    deal: Int[Array, "draws_of_epoch"] | None
    size: Sizes = struct.field(pytree_node=False)
    sampling: Sampling = struct.field(pytree_node=False)

    @property
    def most_steps(self) -> int:
        """Steps that the longest history of the bucket takes in a round."""
        return self.size.steps * self.sampling.local_epochs

    def at(self, step: Int[Array, ""]) -> Batch:
        """The samples of one local step."""
        index, mask, epoch = samples_of_step(self.order, self.count, self.size, self.steps, step)
        if self.size.draws:
            place = self._place_of_negative(index - self.length, epoch)
            index = jnp.where(index < self.length, index, self.size.history + place)
        found = self.lookup.at[jnp.minimum(index, self.lookup.shape[0] - 1)].get(mode="promise_in_bounds")
        positive = found < 0
        return Batch(
            jnp.where(mask, jnp.where(positive, -1 - found, found), 0),
            (positive & mask).astype(jnp.float32),
            mask.astype(jnp.float32),
        )

    def negatives(self) -> tuple[Int[Array, "draws"], Float[Array, "draws"]]:
        """The rows drawn as negatives, and how many of a round's samples each of them is: `at` over all steps, in a
        fraction of its time."""
        fresh = _fresh(self.sampling)
        in_use = (self.count.astype(jnp.int32) - self.length) * fresh
        times = self.sampling.local_epochs // fresh
        return self.lookup[self.size.history :], jnp.where(jnp.arange(self.size.draws) < in_use, float(times), 0.0)

    def _place_of_negative(self, index: Int[Array, "batch"], epoch: Int[Array, ""]) -> Int[Array, "batch"]:
        """Which of the sorted draws is negative `index` of an epoch.

        With fresh draws every epoch the strata are cut `local_epochs` times finer, and each epoch takes one piece of
        every stratum, which one being random (`deal`): each epoch's draws are stratified, and no two epochs share a
        piece. Independent draws are dealt out again by a random permutation of all of them.
        """
        fresh = _fresh(self.sampling)
        index = jnp.clip(index, 0, max(self.size.draws // fresh - 1, 0))
        if fresh == 1:
            return index
        if _stratified(self.sampling, self.size):
            return index * fresh + (self.deal[index] + epoch) % fresh
        negatives = self.count.astype(jnp.int32) - self.length
        return self.deal[jnp.clip(epoch * negatives + index, 0, self.size.draws - 1)]


def _fresh(sampling: Sampling) -> int:
    """How many times a round draws negatives."""
    return sampling.local_epochs if sampling.redraw == "epoch" else 1


def _stratified(sampling: Sampling, size: Sizes) -> bool:
    return sampling.draw == "stratified" and size.draws <= MAX_STRATA


def _deal(key: PRNGKey, size: Sizes, in_use: Int[Array, ""], sampling: Sampling) -> Int[Array, "n"] | None:
    """See Drawn._place_of_negative; None where all epochs share their draws."""
    fresh = _fresh(sampling)
    if fresh == 1:
        return None
    if _stratified(sampling, size):
        return (jax.random.bits(key, (size.draws // fresh,), jnp.uint32) % fresh).astype(jnp.int32)
    order = jax.random.uniform(key, (size.draws,))
    return jnp.argsort(jnp.where(jnp.arange(size.draws) < in_use, order, 2.0))


def draw_local_data(
    key: PRNGKey,
    record: Record,
    sampling: Sampling,
    size: Sizes,
    num_items: int,
    pool: Int[Array, "pool"] | None,
    steps: Integer[ArrayLike, ""],
    round_: Int[Array, ""],
) -> LocalData:
    """Draws one client's samples and its working set.

    Args:
        key: of this client and round.
        record: the client; `history` holds item ids, `forbidden` pool positions.
        sampling, size: how to draw, and the static sizes of the client's bucket.
        num_items: catalogue size.
        pool: item id of each pool position, or None for the identity.
        steps: steps of an epoch in this block (at least what this client needs).
        round_: 0-based round, passed through.
    """
    k_draw, k_order, k_epoch = (jax.random.fold_in(key, stream) for stream in range(3))
    pool_size = num_items if pool is None else pool.shape[0]
    can_draw = record.num_forbidden < pool_size
    negatives = jnp.where(can_draw, record.length * sampling.negatives, 0)
    count = (record.length + negatives).astype(jnp.uint32)
    in_use = negatives * _fresh(sampling)

    # not more stratified draws than free items: an item lies in two strata at most, and no scan is needed
    pairs_only = _stratified(sampling, size) and size.draws + record.forbidden.shape[0] <= pool_size
    j = jnp.arange(size.draws)
    if size.draws:

        def draw():
            position = draw_positions(k_draw, record, in_use, size.draws, pool_size, sampling.draw)
            drawn = position if pool is None else pool[jnp.minimum(position, pool_size - 1)]
            return jnp.where(j < in_use, drawn, num_items).astype(jnp.int32)

        # as a branch (always taken) its result is stored: XLA would work it out again in each of its uses
        drawn = jax.lax.cond(steps > 0, draw, lambda: jnp.zeros(size.draws, jnp.int32))
        first_of_run = jnp.concatenate([jnp.ones(1, bool), drawn[1:] != drawn[:-1]])
    else:
        drawn = jnp.zeros(0, jnp.int32)

    history = jnp.arange(size.history, dtype=jnp.int32)
    if size.dense:
        rows = jnp.arange(num_items, dtype=jnp.int32)
        history, row_of_draw = record.history, drawn
    else:
        # equal draws are neighbours: the first keeps the row, the others point to it and leave a hole
        rows, row_of_draw = record.history, drawn
        if size.draws:
            rows = jnp.concatenate([rows, jnp.where(first_of_run, drawn, num_items)])
            first = j - ~first_of_run if pairs_only else jax.lax.cummax(jnp.where(first_of_run, j, 0))
            row_of_draw = size.history + first
    in_history = jnp.arange(size.history) < record.length
    return LocalData(
        rows=rows.astype(jnp.int32),
        row_mask=rows < num_items,
        samples=Drawn(
            length=record.length,
            count=count,
            steps=steps,
            order=draw_order(k_order, count, sampling.local_epochs),
            lookup=jnp.concatenate([-1 - history, row_of_draw]).astype(jnp.int32),
            deal=_deal(k_epoch, size, in_use, sampling),
            size=size,
            sampling=sampling,
        ),
        history=jnp.where(in_history, history, 0).astype(jnp.int32),
        history_mask=in_history,
        num_samples=count.astype(jnp.float32),
        num_steps=sampling.local_epochs * steps,
        round=round_,
    )
