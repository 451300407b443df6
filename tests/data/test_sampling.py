"""The sampler against slow loops: what is drawn, where it points, and that every sample comes exactly once."""

from __future__ import annotations

import functools
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from fedjax_rec.data import sampling
from fedjax_rec.data.sampling import Record, draw_local_data, draw_positions, epoch_steps, sizes, stratified_ranks
from fedjax_rec.method import Sampling

ITEMS = 97


def padded(values, width: int, fill: int):
    values = np.sort(np.asarray(values, np.int32))
    return jnp.asarray(np.append(values, np.full(width - len(values), fill)).astype(np.int32))


def record(history, forbidden=None, *, width=None, num_items=ITEMS, pool_size=None) -> Record:
    """`forbidden`: pool positions, default the history."""
    forbidden = history if forbidden is None else forbidden
    pool_size = num_items if pool_size is None else pool_size
    wide = max(width or 0, len(history), 1)
    return Record(
        user=jnp.int32(0),
        history=padded(history, wide, num_items),
        length=jnp.int32(len(history)),
        forbidden=padded(forbidden, max(wide, len(forbidden)), pool_size),
        num_forbidden=jnp.int32(len(forbidden)),
    )


def some(rng, pool: int, count: int) -> np.ndarray:
    return np.sort(rng.choice(pool, count, replace=False))


# ---- positions ---------------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames=("most", "pool", "draw"))
def ranks_and_positions(keys, records, draws, *, most: int, pool: int, draw: str = "stratified"):
    def one(key, record, q):
        free = (pool - record.num_forbidden).astype(jnp.uint32)
        ranks = stratified_ranks(key, free, q.astype(jnp.uint32), most, pool)
        return ranks, draw_positions(key, record, q, most, pool, draw)

    return jax.vmap(one)(keys, records, draws)


@pytest.mark.parametrize("pool", [1, 2, 3, 17, 60, 257, 1000])
@pytest.mark.parametrize("most", [1, 40, 300])
def test_ranks_become_positions_as_in_a_slow_loop(pool, most):
    """Also more draws than free items, one free item, and none."""
    rng = np.random.default_rng(pool * 1000 + most)
    forbidden = [some(rng, pool, n) for n in [0, pool // 2, pool - 1, *rng.integers(0, pool, 60)]]
    draws = np.append([most, most, most], rng.integers(1, most + 1, 60))
    records = [record(f, width=pool, num_items=pool) for f in forbidden]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *records)
    keys = jax.random.split(jax.random.key(1), len(draws))
    ranks, positions = ranks_and_positions(keys, stacked, jnp.asarray(draws), most=most, pool=pool)
    for f, q, rank, position in zip(forbidden, draws, np.asarray(ranks), np.asarray(positions), strict=True):
        free = np.setdiff1d(np.arange(pool), f)
        np.testing.assert_array_equal(position[:q], free[rank[:q]])


@pytest.mark.parametrize("pool", [1_300_000, 2**24 - 3])
@pytest.mark.parametrize("most", [5, sampling.MAX_STRATA])
@pytest.mark.parametrize("forbidden", [0, 3000])
def test_big_pools(pool, most, forbidden):
    """No 32-bit overflow, no float error: up to 16 million items and the most strata there can be."""
    rng = np.random.default_rng(0)
    # the ends and neighbours are the hard places
    f = np.unique(np.append([0, 1, pool - 1], rng.integers(0, pool, forbidden))) if forbidden else []
    free = np.delete(np.arange(pool), np.asarray(f, int))
    for q in {most, max(most // 3, 1)}:
        one = jax.tree.map(lambda x: x[None], record(f, width=3003, num_items=pool))
        ranks, positions = ranks_and_positions(
            jax.random.split(jax.random.key(q), 1), one, jnp.array([q]), most=most, pool=pool
        )
        rank, position = np.asarray(ranks)[0, :q], np.asarray(positions)[0, :q]
        j = np.arange(q, dtype=np.int64)
        assert (rank >= j * len(free) // q).all()
        assert (rank <= ((j + 1) * len(free) - 1) // q).all()
        np.testing.assert_array_equal(position, free[rank])


@pytest.mark.parametrize("free", [1, 2, 7, 23, 96])
@pytest.mark.parametrize("draws", [1, 5, 23, 40, 200])
def test_one_draw_per_stratum_sorted_and_uniform(free, draws):
    trials = 4000
    forbidden = some(np.random.default_rng(free), 97, 97 - free)
    keys = jax.random.split(jax.random.key(draws), trials)
    same = jax.tree.map(lambda x: jnp.broadcast_to(x, (trials, *x.shape)), record(forbidden))
    ranks, positions = ranks_and_positions(keys, same, jnp.full(trials, draws), most=200, pool=97)
    ranks, positions = np.asarray(ranks)[:, :draws], np.asarray(positions)[:, :draws]
    j = np.arange(draws)
    assert (ranks >= j * free // draws).all() and (ranks <= ((j + 1) * free - 1) // draws).all()
    assert (np.diff(positions, axis=1) >= 0).all()
    assert not np.isin(positions, forbidden).any()
    counts = np.bincount(positions.ravel(), minlength=97)
    assert counts.sum() == trials * draws
    expected = trials * draws / free
    drawn = np.delete(counts, forbidden)
    # strata only lower a count's variance below the multinomial's: chi-square of free - 1 degrees, 5 deviations
    assert ((drawn - expected) ** 2 / expected).sum() < free + 5 * np.sqrt(2 * free)
    assert abs(drawn - expected).max() < 5 * np.sqrt(expected)


@pytest.mark.parametrize("free", [1, 7, 90])
def test_independent_draws_are_uniform_and_repeat(free):
    trials, draws = 4000, 12
    forbidden = some(np.random.default_rng(free), 97, 97 - free)
    keys = jax.random.split(jax.random.key(3), trials)
    same = jax.tree.map(lambda x: jnp.broadcast_to(x, (trials, *x.shape)), record(forbidden))
    _, positions = ranks_and_positions(keys, same, jnp.full(trials, draws), most=20, pool=97, draw="independent")
    positions = np.asarray(positions)[:, :draws]
    assert (np.diff(positions, axis=1) >= 0).all()
    assert not np.isin(positions, forbidden).any()
    drawn = np.delete(np.bincount(positions.ravel(), minlength=97), forbidden)
    expected = trials * draws / free
    # chi-square of free - 1 degrees, 5 deviations
    assert ((drawn - expected) ** 2 / expected).sum() < free + 5 * np.sqrt(2 * free)
    # distinct items among 12 independent draws: free (1 - (1 - 1/free)^12), to 5 standard errors (deviation < 2)
    distinct = np.mean([len(np.unique(row)) for row in positions])
    assert abs(distinct - free * (1 - (1 - 1 / free) ** draws)) < 5 * 2 / np.sqrt(trials)


def test_too_many_strata_fall_back_to_independent_draws():
    most, pool = sampling.MAX_STRATA + 1, 200_000
    forbidden = some(np.random.default_rng(0), pool, 500)
    position = np.asarray(draw_positions(jax.random.key(0), record(forbidden, num_items=pool), jnp.int32(most), most,
                                         pool, "stratified"))  # fmt: skip
    assert (np.diff(position) >= 0).all()
    assert position[0] >= 0 and position[-1] < pool
    assert not np.isin(position, forbidden).any()


def test_draws_do_not_depend_on_the_padding():
    """A client's samples must not change with the bucket it is put into."""
    history = [3, 4, 50, 96]
    for draw in ("stratified", "independent"):
        narrow, wide = (
            draw_positions(jax.random.key(5), record(history, width=w), jnp.int32(8), 2 * w, ITEMS, draw)
            for w in (4, 32)
        )
        np.testing.assert_array_equal(narrow[:8], wide[:8])


# ---- batches -----------------------------------------------------------------------------------------------


def order_of(key, count: int, negatives: int, batch: int, width: int, epochs: int = 1) -> np.ndarray:
    """Sample indices in the order in which they are trained on, [epochs, count]."""
    how = Sampling(negatives, batch, epochs)
    size = sizes(how, width, 10**7)
    steps = epoch_steps(how, size, jnp.int32(-(-count // (1 + negatives))))

    @jax.jit
    def orders(step):
        order = sampling.draw_order(key, jnp.uint32(count), epochs)
        return sampling.samples_of_step(order, jnp.uint32(count), size, steps, step)

    index, mask, epoch = jax.vmap(orders)(jnp.arange(epochs * size.steps))
    index, mask = np.asarray(index), np.asarray(mask)
    assert (np.asarray(epoch)[: epochs * int(steps)] == np.repeat(np.arange(epochs), int(steps))).all()
    assert not mask[epochs * int(steps) :].any()
    return index[mask].reshape(epochs, -1)


@pytest.mark.parametrize(
    ("width", "negatives", "batch"),
    [(4, 1, 1), (64, 4, 7), (64, 4, 0), (13107, 4, 1024), (13108, 4, 1024), (20000, 4, 99999), (2**18, 3, 4095),
     (2**18, 3, 2**16)],
)  # fmt: skip
def test_every_sample_comes_exactly_once_an_epoch(width, negatives, batch):
    """Also beyond 2**16 samples, where the product mod s is taken in two halves, and up to MAX_SAMPLES."""
    most = width * (1 + negatives)
    assert most <= sampling.MAX_SAMPLES
    shares = (most, most - (1 + negatives), most // 2 // (1 + negatives) * (1 + negatives), 1 + negatives)
    for i, count in enumerate(shares):
        orders = order_of(jax.random.key(i), count, negatives, batch, width, epochs=2)
        np.testing.assert_array_equal(np.sort(orders, axis=1), np.tile(np.arange(count), (2, 1)))


@pytest.mark.parametrize("multiple", [1, 2, 15])
def test_sizes_that_a_prime_of_the_table_divides(multiple, monkeypatch):
    few = sampling.PRIMES[[0, -1]]
    monkeypatch.setattr(sampling, "PRIMES", few)
    for prime in few:
        count = int(prime) * multiple
        orders = np.concatenate([order_of(jax.random.key(i), count, 0, 5000, count, epochs=4) for i in range(3)])
        np.testing.assert_array_equal(np.sort(orders, axis=1), np.tile(np.arange(count), (len(orders), 1)))


def test_the_table_holds_primes_of_16_bits():
    primes = sampling.PRIMES.astype(int)
    assert len(primes) > 100 and primes.max() < 2**16
    assert all(all(p % d for d in range(2, 257)) for p in primes)


def test_epochs_are_ordered_anew():
    first, second = order_of(jax.random.key(0), 300, 4, 16, 64, epochs=2)
    assert (first != second).mean() > 0.5


# ---- one client's data -------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames=("how", "size", "num_items"))
def draw(key, client, steps, pool, *, how, size, num_items):
    return draw_local_data(key, client, how, size, num_items, pool, steps, jnp.int32(2))


def local(history, how: Sampling, *, forbidden=None, pool=None, width=None, num_items=ITEMS, seed=0, all_rows=False):
    """(LocalData on the host, Sizes); the block's longest client has 3 more positives than this one, if they fit."""
    pool_size = num_items if pool is None else len(pool)
    client = record(history, forbidden, width=width, num_items=num_items, pool_size=pool_size)
    size = sizes(how, client.history.shape[0], num_items, all_rows=all_rows)
    steps = epoch_steps(how, size, jnp.int32(min(len(history) + 3, size.history)))
    places = None if pool is None else jnp.asarray(pool)
    data = draw(jax.random.key(seed), client, steps, places, how=how, size=size, num_items=num_items)
    return oracle.data_on_host(data), size


def epochs_of(data, how: Sampling):
    """Per epoch: (positive item ids, negative item ids), each in the order of training."""
    used = int(data.num_steps)
    assert used % how.local_epochs == 0
    assert not data.mask[used:].any()
    found = []
    for steps in np.split(np.arange(used), how.local_epochs):
        there = data.mask[steps] > 0
        items, labels = data.rows[data.item[steps]][there], data.label[steps][there]
        found.append((items[labels == 1], items[labels == 0]))
    return found


HISTORY = [0, 1, 2, 40, 41, 77, 96]
MODES = [
    Sampling(negatives, batch, epochs, redraw, draw)
    for draw in ("stratified", "independent")
    for redraw in ("round", "epoch")
    for negatives, batch, epochs in ((3, 4, 3), (2, 0, 2))
]


@pytest.mark.parametrize("how", MODES, ids=str)
@pytest.mark.parametrize("layout", ["tight", "padded", "dense"])
def test_every_epoch_has_each_positive_once_and_its_negatives(how, layout):
    # 'tight': just so many items that the working set is smaller than the catalogue
    num_items = 97 if layout == "dense" else 1000
    width = 16 if layout == "padded" else None
    data, size = local(HISTORY, how, width=width, num_items=num_items, all_rows=layout == "dense")
    assert size.dense == (layout == "dense")
    epochs = epochs_of(data, how)
    for positives, negatives in epochs:
        np.testing.assert_array_equal(np.sort(positives), HISTORY)
        assert len(negatives) == how.negatives * len(HISTORY)
        assert not np.isin(negatives, HISTORY).any()
        assert (negatives >= 0).all() and (negatives < num_items).all()
    drawn = [Counter(n.tolist()) for _, n in epochs]
    if how.redraw == "round":
        assert all(d == drawn[0] for d in drawn)
    else:
        assert all(d != drawn[0] for d in drawn[1:])
    assert data.num_samples == (1 + how.negatives) * len(HISTORY)
    assert data.round == 2


@pytest.mark.parametrize("how", MODES, ids=str)
def test_rows_are_distinct_and_cover_exactly_what_is_used(how):
    data, size = local(HISTORY, how, width=16, num_items=1000)
    assert not size.dense and data.rows.shape == (size.rows,)
    real = data.rows[data.row_mask]
    assert len(np.unique(real)) == len(real)
    assert (data.rows[~data.row_mask] == 1000).all() and (real < 1000).all()
    np.testing.assert_array_equal(data.rows[data.history[data.history_mask]], HISTORY)
    assert data.history_mask.sum() == len(HISTORY)
    assert not data.history[~data.history_mask].any()
    seen = {int(i) for positives, negatives in epochs_of(data, how) for i in (*positives, *negatives)}
    assert set(real) == seen


@pytest.mark.parametrize("redraw", ["round", "epoch"])
def test_a_dense_working_set_is_the_same_draw(redraw):
    how = Sampling(3, 4, 2, redraw)
    few, _ = local(HISTORY, how, num_items=1000)
    all_, size = local(HISTORY, how, num_items=1000, all_rows=True)
    assert size.dense
    np.testing.assert_array_equal(all_.rows, np.arange(1000))
    np.testing.assert_array_equal(all_.history, HISTORY)
    np.testing.assert_array_equal(few.rows[few.item] * few.mask, all_.item * all_.mask)
    np.testing.assert_array_equal(few.label, all_.label)


@pytest.mark.parametrize("draw", ["stratified", "independent"])
def test_a_pool_with_gaps(draw):
    """Only items of the pool are drawn; forbidden positions count in the pool, not in the catalogue."""
    rng = np.random.default_rng(0)
    pool = some(rng, 500, 60)
    history = np.union1d(pool[[0, 5, 6, 59]], [499, 3])  # some history is outside the pool
    forbidden = np.flatnonzero(np.isin(pool, history))
    how = Sampling(8, 5, 3, "epoch", draw)
    seen = set()
    for seed in range(20):
        data, _ = local(history, how, forbidden=forbidden, pool=pool.astype(np.int32), num_items=500, seed=seed)
        for positives, negatives in epochs_of(data, how):
            np.testing.assert_array_equal(np.sort(positives), history)
            seen |= set(negatives.tolist())
    assert seen == set(pool) - set(history)


@pytest.mark.parametrize("draw", ["stratified", "independent"])
@pytest.mark.parametrize("redraw", ["round", "epoch"])
@pytest.mark.parametrize("free", [0, 1])
def test_hardly_anything_to_draw(draw, redraw, free):
    history = np.arange(12 - free)
    how = Sampling(4, 5, 2, redraw, draw)
    data, _ = local(history, how, width=16, num_items=12)
    for positives, negatives in epochs_of(data, how):
        np.testing.assert_array_equal(np.sort(positives), history)
        np.testing.assert_array_equal(negatives, [11] * (4 * len(history) * free))


@pytest.mark.parametrize("how", MODES, ids=str)
@pytest.mark.parametrize("num_items", [20, 1000])
def test_a_client_without_history(how, num_items):
    data, _ = local([], how, width=16, num_items=num_items)
    assert data.num_samples == 0
    assert not data.mask.any() and not data.label.any() and not data.history_mask.any()
    assert data.num_steps >= how.local_epochs
    assert (data.item >= 0).all() and (data.item < len(data.rows)).all()


def test_no_negatives_at_all():
    how = Sampling(0, 3, 2)
    data, size = local(HISTORY, how, width=8)
    np.testing.assert_array_equal(data.rows[data.row_mask], HISTORY)
    for positives, negatives in epochs_of(data, how):
        np.testing.assert_array_equal(np.sort(positives), HISTORY)
        assert not len(negatives)
    assert size.rows == 8


def test_fresh_draws_of_all_epochs_are_stratified_each():
    """Each epoch takes one piece of every stratum, so no two negatives of an epoch are from one stratum."""
    how = Sampling(2, 5, 4, "epoch")
    data, _ = local(HISTORY, how, num_items=1007)
    free = np.setdiff1d(np.arange(1007), HISTORY)
    q = 2 * len(HISTORY)
    for _, negatives in epochs_of(data, how):
        stratum = np.searchsorted(free, np.sort(negatives)) * q // len(free)
        np.testing.assert_array_equal(stratum, np.arange(q))


def test_other_keys_give_other_negatives():
    how = Sampling(3, 4)
    drawn = [epochs_of(local(HISTORY, how, num_items=1000, seed=s)[0], how)[0][1] for s in range(3)]
    assert len({tuple(sorted(d)) for d in drawn}) == 3
