"""What is special about CoFedRec; that it obeys the laws of all methods is in test_laws.py."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_rec import methods, rounds
from fedjax_rec.data import clients, splits, synthetic
from fedjax_rec.methods import cofedrec
from fedjax_rec.server import clusters

RNG = np.random.default_rng(0)
KEY = jax.random.key(1)
USERS, ITEMS = 23, 90


def close(a, b, tolerance=1e-5):
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)  # float32 sums of some hundred terms of size 1


# ---- the contrast ------------------------------------------------------------------------------------------


def slow_contrast(table, labels, anchors, temperature):
    """T with tau_0 = tau, from its definition, in float64 with loops."""
    unit = np.asarray(table, np.float64)
    unit = unit / np.linalg.norm(unit, axis=1, keepdims=True)
    total = 0.0
    for i in anchors:
        others = [a for a in range(len(unit)) if a != i]
        positives = [p for p in others if labels[p] == labels[i]]
        if positives:
            log_sum = np.log(sum(np.exp(unit[i] @ unit[a] / temperature) for a in others))
            total += log_sum - np.mean([unit[i] @ unit[p] / temperature for p in positives])
    return total / len(anchors)


contrast = jax.jit(cofedrec.contrast, static_argnums=(3, 4))


@pytest.mark.parametrize(("items", "anchors"), [(7, "all"), (70, "all"), (130, "all"), (70, "drawn")])
def test_contrast_in_blocks_is_its_definition(items, anchors):
    table = RNG.normal(size=(items, 3)).astype(np.float32)
    labels = RNG.integers(0, 3, items)
    labels[0] = 3  # alone in its cluster
    chosen = np.arange(items) if anchors == "all" else RNG.integers(0, items, 10)
    value, grad = contrast(jnp.asarray(table), jnp.asarray(labels), jnp.asarray(chosen), 0.3, 5)
    close(value, slow_contrast(table, labels, chosen, 0.3))
    for row, column in [(0, 0), (1, 2), (items - 1, 1)]:
        step = np.zeros(table.shape)
        step[row, column] = 1e-5
        up, down = (slow_contrast(table + sign * step, labels, chosen, 0.3) for sign in (1, -1))
        close(grad[row, column], (up - down) / 2e-5)


def test_rows_of_zeros_get_no_gradient():
    table = jnp.asarray(RNG.normal(size=(6, 3)).astype(np.float32)).at[2].set(0.0)
    value, grad = contrast(table, jnp.array([0, 0, 0, 1, 1, 1]), jnp.arange(6), 0.1, 2)
    assert np.isfinite(value) and np.isfinite(grad).all() and not np.asarray(grad[2]).any()


def test_drawn_anchors_give_the_full_gradient_on_average():
    table, labels = jnp.asarray(RNG.normal(size=(20, 3)).astype(np.float32)), jnp.arange(20) % 4
    of = lambda anchors: contrast(table, labels, anchors, 0.5, 4)[1]
    one_by_one = jax.vmap(of)(jnp.arange(20)[:, None])
    close(one_by_one.mean(0), of(jnp.arange(20)))


# ---- the server --------------------------------------------------------------------------------------------


def slow_kmeans(points, centres, iterations):
    def assign():
        return np.array([np.argmin([((p - c) ** 2).sum() for c in centres]) for p in points])

    for _ in range(iterations):
        labels = assign()
        centres = np.array([points[labels == k].mean(0) if (labels == k).any() else c for k, c in enumerate(centres)])
    return assign()


@pytest.mark.parametrize("iterations", [0, 1, 25])
def test_kmeans_is_lloyds_loop(iterations):
    points = (RNG.normal(size=(60, 4)) + 100.0 * RNG.integers(0, 2, (60, 1))).astype(np.float32)
    centred = jnp.asarray(points) - jnp.asarray(points).mean(0)
    start = np.asarray(clusters.kmeans_start(KEY, centred, 5), np.float64)
    labels = clusters.kmeans(KEY, jnp.asarray(points), 5, iterations)
    np.testing.assert_array_equal(labels, slow_kmeans(np.asarray(centred, np.float64), start, iterations))


def test_kmeans_starts_from_different_points_and_finds_planted_clusters():
    planted = np.repeat(np.arange(6), 10)
    points = RNG.normal(size=(6, 4))[planted] * 10 + RNG.normal(size=(60, 4)) * 0.01
    points = jnp.asarray(points.astype(np.float32))
    start = np.asarray(clusters.kmeans_start(KEY, points, 6))
    assert len(np.unique(start, axis=0)) == 6
    assert all((start == p).all(1).any() for p in np.unique(start, axis=0))
    labels = np.asarray(clusters.kmeans(KEY, points, 6, 10))
    for k in range(6):
        assert len(set(labels[planted == k])) == 1 and len(set(labels)) == 6


def test_a_centre_without_points_stays():
    labels = clusters.kmeans(KEY, jnp.zeros((4, 2)), 3, 5)
    np.testing.assert_array_equal(labels, np.zeros(4))


@pytest.mark.parametrize("items", [5, 64, 150])
def test_similarity_in_slices_is_the_loop(items):
    tables = RNG.normal(size=(6, items, 3)).astype(np.float32)
    chosen = RNG.random(items) < 0.4
    cosine = lambda a, b: a @ b / (np.linalg.norm(a) * np.linalg.norm(b))
    expected = [sum(cosine(t[i], tables[2, i]) for i in np.flatnonzero(chosen)) for t in tables]
    close(clusters.similarity_to(jnp.asarray(tables), jnp.int32(2), jnp.asarray(chosen)), expected, 1e-4)


def slow_elbow(values):
    """Farthest from the chord, by vector geometry."""
    points = np.stack([np.arange(len(values)), values], axis=1)
    line = (points[-1] - points[0]) / np.linalg.norm(points[-1] - points[0])
    offset = points - points[0]
    return np.argmax(np.linalg.norm(offset - np.outer(offset @ line, line), axis=1))


def test_elbow():
    for values in (np.sort(RNG.random(12))[::-1], np.array([5, 4.9, 4.8, 1, 0.9, 0.5]), np.array([5, 1, 0.9, 0.8])):
        padded = jnp.asarray(np.append(values, np.zeros(3)), jnp.float32)
        assert clusters.elbow(padded, jnp.int32(len(values))) == slow_elbow(values)
    assert clusters.elbow(jnp.array([2.0, 9.0]), jnp.int32(1)) == 0


def test_the_group_ends_at_the_elbow():
    similarity = jnp.array([1.0, 4.8, 9.0, 5.0, 0.9, 4.9, 0.5])
    present = jnp.array([True, True, False, True, True, True, True])
    draws = jnp.zeros(7)
    group = clusters.similar_group(similarity, present, draws)
    # 5, 4.9, 4.8 lie above the chord and 4.8 the farthest; user 2 is absent
    np.testing.assert_array_equal(group, [False, True, False, True, False, True, False])
    tied = jnp.array([3.0, 1.0, 1.0, 1.0])
    for first in (1, 2, 3):  # the elbow is at the second place, which the smallest draw takes
        group = clusters.similar_group(tied, jnp.ones(4, bool), jnp.ones(4).at[first].set(0.0))
        np.testing.assert_array_equal(np.flatnonzero(group), [0, first])
    assert not clusters.similar_group(tied, jnp.zeros(4, bool), jnp.zeros(4)).any()


def test_draws_do_not_depend_on_padding():
    allowed = RNG.random(20) < 0.5
    padded = np.append(allowed, np.zeros(4, bool))
    found = {int(clusters.draw_among(jax.random.key(s), jnp.asarray(allowed))[0]) for s in range(200)}
    assert found == set(np.flatnonzero(allowed))
    for s in range(10):
        key = jax.random.key(s)
        assert clusters.draw_among(key, jnp.asarray(padded))[0] == clusters.draw_among(key, jnp.asarray(allowed))[0]


@pytest.mark.parametrize("items", [5, 64, 150])
def test_a_group_shares_its_mean(items):
    tables = RNG.normal(size=(6, items, 3)).astype(np.float32)
    group = np.array([True, False, True, True, False, False])
    shared = np.asarray(clusters.share_mean(jnp.asarray(tables), jnp.asarray(group)))
    np.testing.assert_array_equal(shared[~group], tables[~group])
    close(shared[group], np.broadcast_to(tables[group].mean(0), (3, items, 3)))


# ---- in the engine -----------------------------------------------------------------------------------------


def engine_of(name="cofedrec", **settings):
    split = splits.leave_one_out(
        synthetic.make(USERS, ITEMS, min_history=4, median_history=7, max_history=15).interactions
    )
    small = {"dim": 4, "batch_size": 8, "negatives": 2, "lr": 0.2, "own_lr_scale": 5.0, "item_clusters": 3}
    method = methods.build(name, USERS, ITEMS, **{**small, "init_std": 0.3, **settings})
    return rounds.make_engine(method, clients.build(split, max_buckets=1))


def test_one_group_shares_a_table_and_everybody_else_keeps_his_own():
    engine = engine_of()
    state = engine.init(KEY)
    shared = rounds.publish(engine, KEY, state.server, 0)
    arguments = (engine, KEY, shared, state.clients, jax.tree.map(jnp.copy, state.mail), jnp.int32(0))
    uploads = np.asarray(rounds.client_round(*arguments, engine.everybody)[1].value[0]["item"])
    state, _ = engine.round(KEY, engine.init(KEY), 0)
    tables = np.asarray(state.mail["item"])
    close(state.server.shared["item"], uploads.mean(0))
    changed = (tables != uploads).any(axis=(1, 2))
    assert 1 < changed.sum() < USERS
    close(tables[changed], np.broadcast_to(uploads[changed].mean(0), tables[changed].shape))
    assert set(np.unique(state.server.shared["clusters"])) <= {0, 1, 2}


def test_absent_users_keep_their_table():
    engine = engine_of()
    state, _ = engine.round(KEY, engine.init(KEY), 0)
    before = np.asarray(state.mail["item"])
    state, _ = engine.round(KEY, state, 1, engine.cohort(np.arange(10)))
    after = np.asarray(state.mail["item"])
    np.testing.assert_array_equal(after[10:], before[10:])
    assert (after[:10] != before[:10]).any(axis=(1, 2)).all()
    close(state.server.shared["item"], after[:10].mean(0))


def test_the_contrast_begins_with_the_second_round():
    one, other = engine_of(reg=0.0), engine_of(reg=1.0)
    play = lambda engine, state, t: engine.round(KEY, state, t)[0]
    first = [play(engine, engine.init(KEY), 0) for engine in (one, other)]
    close(first[0].mail["item"], first[1].mail["item"])
    second = [play(engine, state, 1) for engine, state in zip((one, other), first, strict=True)]
    assert np.abs(second[0].mail["item"] - second[1].mail["item"]).max() > 1e-2


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"temperature": 0.0}, "temperature=0"),
        ({"server_lr": 2.0}, "server_lr=2"),
        ({"weighting": "by_size"}, "weighting="),
        ({"preset": "papr"}, "did you mean paper"),
    ],
)
def test_wrong_settings_are_named(setting, message):
    with pytest.raises(ValueError, match=message):
        cofedrec.Config(**setting)


def test_more_clusters_than_items_are_refused():
    with pytest.raises(ValueError, match=r"item_clusters=91: expected a number in \[1, 90\]"):
        engine_of(item_clusters=91)
    with pytest.raises(ValueError, match=r"contrast_items=91: expected a number in \[1, 90\]"):
        engine_of("cofedrec_anchors", contrast_items=91)
