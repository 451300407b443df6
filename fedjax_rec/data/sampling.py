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
from jaxtyping import Array, Int, UInt32

from fedjax_rec.method import LocalData, Sampling
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


def _positions_of_sorted_ranks(ranks, gaps, valid_gap, free, draws) -> Int[Array, "most"]:
    """Pool position of each sorted stratified rank: rank + number of forbidden positions at or before it."""
    most = ranks.shape[0]
    scale = draws.astype(jnp.float32) / jnp.maximum(free, 1).astype(jnp.float32)
    first = jnp.clip((gaps.astype(jnp.float32) * scale).astype(jnp.int32) - 1, 0, most)
    for _ in range(3):  # the stratum is known to within one place on either side
        behind = (first < most) & (ranks[jnp.minimum(first, most - 1)] < gaps)
        first = first + behind.astype(jnp.int32)
    first = jnp.where(valid_gap, first, most)
    return ranks + jnp.cumsum(jnp.zeros(most + 1, jnp.int32).at[first].add(1))[:most]


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


def _permuted(key: PRNGKey, count: UInt32[Array, ""], size: Sizes, steps: Int[Array, ""], epochs: int):
    """Sample index of each place of [epochs * steps, batch], and whether the place holds a sample.

    `steps` (traced) is the number of steps an epoch takes in this block: step t is batch t mod steps of epoch
    t // steps.
    """
    step = jnp.arange(epochs * size.steps, dtype=jnp.int32)
    epoch = jnp.minimum(step // steps, epochs - 1)
    start = ((step - epoch * steps) * size.batch).astype(jnp.uint32)
    slot = jnp.arange(size.batch, dtype=jnp.uint32)
    place = start[:, None] + slot
    mask = (place < count) & (step < epochs * steps)[:, None]
    safe = jnp.maximum(count, 1)
    if size.steps == 1:  # one step sees the whole epoch: its order does not matter
        return jnp.minimum(place, safe - 1).astype(jnp.int32), mask, epoch
    choice, shift = jax.random.bits(key, (2, epochs), jnp.uint32)
    pick = choice % len(PRIMES)
    prime, other = jnp.asarray(PRIMES)[pick], jnp.asarray(PRIMES)[(pick + 1) % len(PRIMES)]
    # two different primes of this size cannot both divide a number below 2**20
    factor = (jnp.where(safe % prime == 0, other, prime) % safe)[epoch]
    offset = (shift % safe)[epoch]
    base = (_product_mod(factor, start, safe, size.epoch) + offset) % safe
    largest = size.epoch * (size.batch + 1)
    if largest < 2**32:
        line = base[:, None] + factor[:, None] * slot
        index = line - safe * _divide(line, safe, largest)
    else:
        index = (base[:, None] + _product_mod(factor[:, None], slot % safe, safe, size.epoch)) % safe
    return index.astype(jnp.int32), mask, epoch


def _product_mod(a, b, modulus, largest: int):
    """a b mod modulus for a, b < largest <= 2**20, in 32 bits."""
    b = b % modulus
    if largest <= 2**16:
        return (a * b) % modulus
    high = ((a >> 10) * b) % modulus
    return ((high << 10) + ((a & 1023) * b) % modulus) % modulus


def draw_local_data(
    key: PRNGKey,
    record: Record,
    sampling: Sampling,
    size: Sizes,
    num_items: int,
    pool: Int[Array, "pool"] | None,
    steps: Int[Array, ""],
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
    epochs = sampling.local_epochs
    fresh = epochs if sampling.redraw == "epoch" else 1
    can_draw = record.num_forbidden < pool_size
    negatives = jnp.where(can_draw, record.length * sampling.negatives, 0)
    count = (record.length + negatives).astype(jnp.uint32)
    sample, mask, epoch = _permuted(k_order, count, size, steps, epochs)
    positive = sample < record.length

    j = jnp.arange(size.draws)
    in_use = j < negatives * fresh
    if size.draws:
        position = draw_positions(k_draw, record, negatives * fresh, size.draws, pool_size, sampling.draw)
        drawn = position if pool is None else pool[jnp.minimum(position, pool_size - 1)]
        drawn = jnp.where(in_use, drawn, num_items)
        first_of_run = jnp.concatenate([jnp.ones(1, bool), drawn[1:] != drawn[:-1]])
        place = _place_of_negative(k_epoch, sample - record.length, epoch, size, fresh, negatives, sampling)
    else:
        drawn = jnp.zeros(0, jnp.int32)

    if size.dense:
        rows = jnp.arange(num_items, dtype=jnp.int32)
        history, row_of_draw = record.history, drawn
        item = record.history.at[jnp.clip(sample, 0, size.history - 1)].get(mode="promise_in_bounds")
    else:
        # equal draws are neighbours: the first keeps the row, the others point to it and leave a hole
        rows = record.history
        row_of_draw = drawn
        if size.draws:
            rows = jnp.concatenate([rows, jnp.where(first_of_run, drawn, num_items)])
            row_of_draw = size.history + jax.lax.cummax(jnp.where(first_of_run, j, 0))
        history = jnp.arange(size.history, dtype=jnp.int32)
        item = sample  # a positive's row is its place in the history
    if size.draws:
        item = jnp.where(positive, item, row_of_draw.at[place].get(mode="promise_in_bounds"))
    in_history = jnp.arange(size.history) < record.length
    return LocalData(
        rows=rows.astype(jnp.int32),
        row_mask=rows < num_items,
        item=jnp.where(mask, item, 0).astype(jnp.int32),
        label=(positive & mask).astype(jnp.float32),
        mask=mask.astype(jnp.float32),
        history=jnp.where(in_history, history, 0).astype(jnp.int32),
        history_mask=in_history,
        num_samples=count.astype(jnp.float32),
        num_steps=epochs * steps,
        round=round_,
    )


def _place_of_negative(key, index, epoch, size: Sizes, fresh: int, negatives, sampling: Sampling):
    """Which of the sorted draws is negative `index` of an epoch.

    With fresh draws every epoch the strata are cut `fresh` times finer, and each epoch takes one piece of every
    stratum, which one being random: each epoch's draws are stratified, and no two epochs share a piece.
    """
    index = jnp.clip(index, 0, max(size.draws // fresh - 1, 0))
    if fresh == 1:
        return index
    if sampling.draw == "stratified" and size.draws <= MAX_STRATA:
        shift = (jax.random.bits(key, (size.draws // fresh,), jnp.uint32) % fresh).astype(jnp.int32)
        return index * fresh + (shift[index] + epoch[:, None]) % fresh
    # independent draws were sorted: deal them out again by a random permutation of all of them
    order = jax.random.uniform(key, (size.draws,))
    dealt = jnp.argsort(jnp.where(jnp.arange(size.draws) < negatives * fresh, order, 2.0))
    return dealt[jnp.clip(epoch[:, None] * negatives + index, 0, size.draws - 1)]
