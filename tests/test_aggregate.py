"""Folds over uploads against NumPy, streamed in blocks of clients."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_rec import aggregate, methods, rounds
from fedjax_rec.data import clients, splits, synthetic
from fedjax_rec.layout import clients_mesh

ITEMS, CLIENTS, ROWS = 9, 6, 4
WEIGHTS = np.array([1.0, 3.0, 0.5, 2.0, 7.0, 0.0], np.float32)  # the last one is padding


def uploads(rows):
    """[clients, ...] uploads, and the same as full tables."""
    rng = np.random.default_rng(1)
    item = rng.normal(size=(CLIENTS, ROWS, 2)).astype(np.float32)
    network = {"kernel": rng.normal(size=(CLIENTS, 3, 2)).astype(np.float32), "bias": rng.normal(size=CLIENTS)}
    network["bias"] = network["bias"].astype(np.float32)
    item[rows == ITEMS] = 99.0  # what lies in padding rows must not count
    item[2, 1] = 0.0  # a row in the working set that did not move
    full = np.zeros((CLIENTS, ITEMS, 2), np.float32)
    for client in range(CLIENTS):
        real = rows[client] < ITEMS
        full[client, rows[client][real]] = item[client][real]
    return {"item": item, "network": network}, {"item": full, "network": network}


def draw_rows():
    rng = np.random.default_rng(0)
    rows = np.stack([rng.choice(ITEMS - 1, ROWS, replace=False) for _ in range(CLIENTS)])
    rows[0, 2:] = ITEMS  # padding; and item ITEMS - 1 is touched by nobody
    return rows.astype(np.int32)


def fold(aggregator, uploads, rows, block: int):
    state = aggregator.init(jax.tree.map(lambda x: x[0], uploads), ITEMS, CLIENTS - 1)
    for start in range(0, CLIENTS, block):
        part = slice(start, start + block)
        take = jax.tree.map(lambda x, p=part: jnp.asarray(x[p]), uploads)
        of_block = None if rows is None else jnp.asarray(rows[part])
        slots = jnp.minimum(jnp.arange(CLIENTS), CLIENTS - 1)[part]  # padding: beyond the last slot
        state = aggregator.add(state, take, jnp.asarray(WEIGHTS[part]), of_block, slots)
    return aggregator.finish(state, jnp.float32(WEIGHTS.sum()), jnp.float32(CLIENTS - 1))


def assert_close(a, b):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)  # float32 sums of six terms of size 10


@pytest.mark.parametrize("block", [1, 2, CLIENTS])
@pytest.mark.parametrize("dense", [False, True])
def test_weighted_mean(block, dense):
    rows = draw_rows()
    sparse, full = uploads(rows)
    got = fold(aggregate.weighted_mean(), full if dense else sparse, None if dense else rows, block)
    mean = lambda x: np.tensordot(WEIGHTS, x, 1) / WEIGHTS.sum()
    jax.tree.map(assert_close, got.value, jax.tree.map(mean, full))
    assert got.weight == WEIGHTS.sum() and got.count == CLIENTS - 1


@pytest.mark.parametrize("block", [1, CLIENTS])
@pytest.mark.parametrize("dense", [False, True])
def test_per_row_mean(block, dense):
    rows = draw_rows()
    sparse, full = uploads(rows)
    got = fold(aggregate.per_row_mean(), full if dense else sparse, None if dense else rows, block)
    moved = (full["item"] != 0).any(-1)
    per_row = np.tensordot(WEIGHTS, moved, 1)
    total = np.tensordot(WEIGHTS, full["item"], 1)
    assert not per_row[ITEMS - 1] and not got.value["item"][ITEMS - 1].any()
    assert_close(got.value["item"], total / np.maximum(per_row, 1e-12)[:, None])
    assert_close(got.value["network"]["bias"], WEIGHTS @ full["network"]["bias"] / WEIGHTS.sum())


@pytest.mark.parametrize("block", [1, 2, CLIENTS])
@pytest.mark.parametrize("dense", [False, True])
def test_stacked_keeps_every_upload_apart(block, dense):
    rows = draw_rows()
    sparse, full = uploads(rows)
    held, weights = fold(aggregate.stacked(), full if dense else sparse, None if dense else rows, block).value
    jax.tree.map(lambda h, x: np.testing.assert_array_equal(h, x[: CLIENTS - 1]), held, full)
    np.testing.assert_array_equal(weights, WEIGHTS[:-1])


def test_stacked_leaves_absent_clients_at_zero():
    rows = draw_rows()
    sparse, _ = uploads(rows)
    aggregator = aggregate.stacked()
    state = aggregator.init(jax.tree.map(lambda x: x[0], sparse), ITEMS, 10)
    one = jax.tree.map(lambda x: jnp.asarray(x[:1]), sparse)
    held, weights = aggregator.add(state, one, jnp.ones(1), jnp.asarray(rows[:1]), jnp.array([7]))
    np.testing.assert_array_equal(np.flatnonzero(weights), [7])
    np.testing.assert_array_equal(np.flatnonzero(np.asarray(held["item"]).any((1, 2))), [7])


@pytest.mark.parametrize("make", [aggregate.weighted_mean, aggregate.per_row_mean])
def test_nobody_uploads(make):
    sparse, _ = uploads(draw_rows())
    aggregator = make()
    state = aggregator.init(jax.tree.map(lambda x: x[0], sparse), ITEMS, CLIENTS)
    got = aggregator.finish(state, jnp.zeros(()), jnp.zeros(()))
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(got.value))


@pytest.mark.skipif(len(jax.devices()) < 3, reason="needs 3 devices")
@pytest.mark.parametrize("name", ["weighted_mean", "per_row_mean", "stacked"])
def test_merge_over_devices(name):
    """Device k folds clients 2k and 2k + 1; merged, that is everybody."""
    rows = draw_rows()
    sparse, _ = uploads(rows)
    aggregator = getattr(aggregate, name)()
    mesh = clients_mesh(3)

    def on_device(uploads, weights, rows):
        state = aggregator.init(jax.tree.map(lambda x: x[0], uploads), ITEMS, 2)
        return aggregator.merge(aggregator.add(state, uploads, weights, rows, jnp.arange(2)), "clients")

    split, whole = jax.P("clients"), jax.P()
    merged = jax.jit(
        jax.shard_map(on_device, mesh=mesh, in_specs=(split, split, split), out_specs=whole, check_vma=False)
    )(sparse, WEIGHTS, rows)
    alone = aggregator.init(jax.tree.map(lambda x: x[0], sparse), ITEMS, CLIENTS)
    args = (jax.tree.map(jnp.asarray, sparse), jnp.asarray(WEIGHTS), jnp.asarray(rows), jnp.arange(CLIENTS))
    jax.tree.map(assert_close, merged, aggregator.add(alone, *args))


@pytest.mark.parametrize(
    ("name", "settings"),
    [("gpfedrec", {"layers": (4,)}), ("cofedrec_anchors", {"item_clusters": 4, "contrast_items": 8})],
)
def test_tables_over_the_mail_are_held_once(name, settings):
    """The compiled functions write the uploads and the server's answers over the mail."""
    users, items, dim, key = 23, 500, 4, jax.random.key(1)
    split = splits.leave_one_out(
        synthetic.make(users, items, min_history=4, median_history=9, max_history=30).interactions
    )
    method = methods.build(name, users, items, dim=dim, **settings)
    engine = rounds.make_engine(method, clients.build(split, max_buckets=1))
    state, table = engine.init(key), users * items * dim * 4
    shared = rounds.publish(engine, key, state.server, 0)
    arguments = (engine, key, shared, state.clients, state.mail, jnp.int32(0), engine.everybody)
    assert rounds.client_round.lower(*arguments).compile().memory_analysis().alias_size_in_bytes >= table
    received = rounds.client_round(*arguments)[1]
    tables, weights = received.value
    lowered = rounds.server_step_over_mail.lower(
        engine, key, state.server, jnp.int32(0), tables, received._replace(value=weights)
    )
    memory = lowered.compile().memory_analysis()
    assert memory.alias_size_in_bytes >= table
    assert memory.temp_size_in_bytes < table  # some slices of 64 items, and [users, users] or the clusters


@pytest.mark.parametrize("name", ["fedrap", "plgc", "fedrkg"])
def test_private_tables_are_held_once(name):
    """The compiled round writes every client's new table over its old one, also in blocks of one client."""
    users, items, dim, key = 60, 200, 8, jax.random.key(1)
    split = splits.leave_one_out(
        synthetic.make(users, items, min_history=40, median_history=60, max_history=90).interactions
    )
    method = methods.build(name, users, items, dim=dim, negatives=4)
    engine = rounds.make_engine(method, clients.build(split, max_buckets=1), block_size=1)
    assert engine.sizes[0].dense
    state, tables = engine.init(key), users * items * dim * 4
    shared = rounds.publish(engine, key, state.server, 0)
    arguments = (engine, key, shared, state.clients, state.mail, jnp.int32(0), engine.everybody)
    compiled = rounds.client_round.lower(*arguments).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < tables / 4
