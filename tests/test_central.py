"""Centralised MF and NeuMF through the engine; EASE has its own file."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedjax_rec import methods, metrics, reference, rounds
from fedjax_rec.central import epochs, pointwise
from fedjax_rec.data import clients, splits, synthetic
from fedjax_rec.evaluate import make_evaluator

USERS, ITEMS = 41, 60
KEY = jax.random.key(0)
SMALL = {"dim": 4, "batch_size": 16, "negatives": 2, "init_std": 0.3, "user_init_std": 0.3}


def close(a, b, tolerance=1e-5):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance), a, b)


def small_split():
    return splits.leave_one_out(
        synthetic.make(USERS, ITEMS, min_history=4, median_history=8, max_history=20).interactions
    )


def engine_of(name, *, buckets=2, devices=1, **settings):
    split = small_split()
    method = methods.build(name, USERS, ITEMS, **{**SMALL, **settings})
    return rounds.make_engine(method, clients.build(split, max_buckets=buckets, num_devices=devices))


def everybodys_samples(engine, state):
    """(samples, counts) as the server receives them."""
    shared = rounds.publish(engine, KEY, state.server, 0)
    arguments = (engine, KEY, shared, state.clients, state.mail, jnp.int32(0), engine.everybody)
    return jax.device_get(rounds.local_round(engine)(*arguments)[1].value)


# ---- the epoch ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("total", [1, 2, 97, 1000, 65521, 65521 * 3, 2**21 + 1])
def test_the_lattice_meets_every_sample_once(total):
    for seed in range(3):
        factor = int(epochs.random_factor(jax.random.key(seed), jnp.uint32(total)))
        assert np.gcd(factor, total) == 1
    count = 500
    found = epochs.multiples(jnp.uint32(factor), count, jnp.uint32(total))
    np.testing.assert_array_equal(found, [factor * k % total for k in range(count)])


def test_samples_that_arrive_are_the_histories_and_negatives_outside_them():
    engine, split = engine_of("mf"), small_split()
    assert len(engine.buckets) == 2
    samples, count = everybodys_samples(engine, engine.init(KEY))
    for user in range(USERS):
        mine = samples[user, : count[user]]
        history = split.train.item[split.train.user == user]
        np.testing.assert_array_equal(np.sort(-1 - mine[mine < 0]), np.sort(history))
        assert (mine >= 0).sum() == 2 * len(history)
        assert not set(mine[mine >= 0]) & set(history)


def test_an_epoch_of_sgd_is_the_loop_over_mini_batches():
    """Every mini-batch's users, items and labels, taken one after the other, in float64."""
    rng = np.random.default_rng(0)
    users, items, rate, l2, batch = 5, 7, 0.5, 0.01, 4
    count = np.array([3, 0, 6, 1, 4], np.int32)  # user 1 is absent
    samples = rng.integers(0, items, (users, 8)).astype(np.int32)
    samples = np.where(rng.random((users, 8)) < 0.4, -1 - samples, samples)
    p, q = rng.normal(size=(users, 3)), rng.normal(size=(items, 3))

    seen = []

    def record(grad_of):
        def objective(params, user, b):
            jax.debug.callback(lambda *x: seen.append(x), user, b.item, b.label, b.mask, ordered=True)
            return grad_of(params, user, b)

        return objective

    backbone = pointwise.matrix_factorisation(3, bias=False, init_std=0.1)
    objective = record(pointwise.batch_objective(backbone, l2))
    params = {"user": {"vector": jnp.asarray(p, jnp.float32)}, "item": jnp.asarray(q, jnp.float32)}
    optimizer = optax.sgd(rate)
    after, _ = pointwise.epoch(
        KEY, params, optimizer.init(params), jnp.asarray(samples), jnp.asarray(count), objective, optimizer, batch
    )
    jax.effects_barrier()

    assert len(seen) == 4  # 14 samples
    trained = []
    for user, item, label, mask in (jax.device_get(x) for x in seen):
        real = mask > 0
        trained += list(zip(user[real].tolist(), item[real].tolist(), label[real].tolist(), strict=True))
        p_grad, q_grad = np.zeros_like(p), np.zeros_like(q)
        for u, i, y in zip(user[real], item[real], label[real], strict=True):
            error = (1 / (1 + np.exp(-p[u] @ q[i])) - y) / real.sum()
            p_grad[u] += error * q[i] + 2 * l2 * p[u] / real.sum()
            q_grad[i] += error * p[u] + 2 * l2 * q[i] / real.sum()
        p, q = p - rate * p_grad, q - rate * q_grad
    close(after["user"]["vector"], p)
    close(after["item"], q)
    sent = [(u, -1 - s if s < 0 else s, float(s < 0)) for u in range(users) for s in samples[u, : count[u]].tolist()]
    assert sorted(trained) == sorted(sent)


# ---- in the engine -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mf", "neumf"])
def test_users_are_served_by_their_own_row(name):
    engine = engine_of(name)
    state, info = engine.round(KEY, engine.init(KEY), 0)
    close(jax.tree.map(lambda x: x[:USERS], state.mail["user"]), state.server.private["user"], 0)
    assert 0.3 < info["loss"] < 1.5 and info["clients"] == USERS
    params = {**state.server.shared, "user": jax.tree.map(lambda x: x[3], state.server.private["user"])}
    mine = engine.method.download(state.server.shared, jax.tree.map(lambda x: x[3], state.mail), {}, None)
    close(mine, params, 0)
    scores = engine.method.score(state.server.shared, mine, None)
    if name == "mf":
        close(scores, np.asarray(params["item"]) @ np.asarray(params["user"]["vector"]))
    assert scores.shape == (ITEMS,)


def test_absent_users_are_not_trained_on():
    engine = engine_of("mf", optimizer="sgd", lr=0.5)
    before = engine.init(KEY).server.private["user"]["vector"]
    state, _ = engine.round(KEY, engine.init(KEY), 0, engine.cohort(np.arange(10)))
    after = np.asarray(state.server.private["user"]["vector"])
    moved = (after != np.asarray(before)).any(1)
    np.testing.assert_array_equal(moved, np.arange(USERS) < 10)
    close(state.mail["user"]["vector"][:USERS], after, 0)
    still, _ = engine.round(KEY, engine.init(KEY), 0, engine.cohort(np.array([], int)))
    close(still.server, engine.init(KEY).server, 0)


@pytest.mark.skipif(len(jax.devices()) < 4, reason="needs 4 devices")
def test_buckets_and_devices_change_nothing():
    results = []
    for layout in ({}, {"buckets": 1, "devices": 4}):
        engine = engine_of("neumf", optimizer="sgd", lr=0.5, **layout)
        state, infos = engine.init(KEY), []
        for t in range(2):
            state, info = engine.round(KEY, state, t)
            infos.append(float(info["loss"]))
        results.append((jax.device_get(state.server), infos))
    close(*results, 1e-4)


@pytest.mark.parametrize(("name", "epochs"), [("mf", 12), ("neumf", 12)])
def test_it_beats_popularity_where_tastes_are_planted(name, epochs):
    split = splits.leave_one_out(synthetic.make(200, 100).interactions)
    method = methods.build(name, split.num_users, split.num_items, lr=0.005)
    engine = rounds.make_engine(method, clients.build(split))
    state, losses = engine.init(KEY), []
    for t in range(epochs):
        state, info = engine.round(KEY, state, t)
        losses.append(float(info["loss"]))
    assert losses[-1] < 0.9 * losses[0]
    evaluator = make_evaluator(engine, split)
    hit = lambda ranks: metrics.summarise(ranks.test, (10,))["HR@10"]
    popular = reference.same_for_all(evaluator, reference.popularity_of(evaluator.split))
    assert hit(evaluator.ranks(KEY, state, epochs)) > 1.3 * hit(popular)


@pytest.mark.parametrize(
    ("setting", "message"), [({"batch_size": 0}, "batch_size=0"), ({"local_epochs": 2}, "a round is one epoch")]
)
def test_wrong_settings_are_named(setting, message):
    with pytest.raises(ValueError, match=message):
        pointwise.Config(**setting)
