"""What is special about GPFedRec; that it obeys the laws of all methods is in test_laws.py."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_rec import methods
from fedjax_rec.data import clients, splits, synthetic
from fedjax_rec.methods import gpfedrec
from fedjax_rec.rounds import make_engine
from fedjax_rec.server import graph

RNG = np.random.default_rng(0)
KEY = jax.random.key(1)


def close(a, b):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)  # float32 sums of some hundred terms of size 1


@pytest.mark.parametrize("items", [5, 64, 150])
def test_graph_in_slices_is_the_whole_matrix_product(items):
    tables = RNG.normal(size=(7, items, 3)).astype(np.float32)
    flat = tables.reshape(7, -1)
    length = np.linalg.norm(flat, axis=1)
    close(graph.cosine(jnp.asarray(tables)), flat @ flat.T / np.outer(length, length))
    weights = RNG.random((7, 7)).astype(np.float32) / 4
    close(graph.pass_messages(jnp.asarray(weights), jnp.asarray(tables)), np.einsum("uv,vid->uid", weights, tables))
    twice = np.einsum("uv,vid->uid", weights @ weights, tables)
    close(graph.pass_messages(jnp.asarray(weights), jnp.asarray(tables), 2), twice)


def test_neighbours():
    near = jnp.array([[1.0, 0.9, 0.0, 0.5], [0.9, 1.0, 0.0, 0.5], [0.0, 0.0, 0.1, 0.5], [0.5, 0.5, 0.5, 1.0]])
    # among 0, 1, 2 the mean is 3.9 / 9: user 2 has nobody above it and keeps its own table
    got = graph.neighbours(near, jnp.array([True, True, True, False]), 1.0)
    close(got, [[0.5, 0.5, 0, 0], [0.5, 0.5, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])


def test_tables_of_zeros_have_no_direction():
    assert not np.asarray(graph.cosine(jnp.zeros((2, 3, 4)))).any()


def engine_of(**settings):
    split = splits.leave_one_out(synthetic.make(23, 90, min_history=4, median_history=7, max_history=15).interactions)
    small = {"dim": 4, "batch_size": 8, "negatives": 2, "lr": 0.2, "item_lr_scale": 0.5, "layers": (8,)}
    method = methods.build("gpfedrec", 23, 90, **{**small, **settings})
    return make_engine(method, clients.build(split, max_buckets=1))


def test_answers_and_the_common_table_follow_from_the_uploads():
    """With a threshold below every similarity, everybody's answer is the mean of all tables."""
    engine = engine_of(threshold=1e-6, init_std=0.3)
    state, _ = engine.round(KEY, engine.init(KEY), 0)
    answers = np.asarray(state.mail["item"])
    close(answers, np.broadcast_to(answers[:1], answers.shape))
    close(state.server.shared["item"], answers[0])


def test_absent_users_keep_their_answer():
    engine = engine_of(init_std=0.3)
    state, _ = engine.round(KEY, engine.init(KEY), 0)
    before = np.asarray(state.mail["item"])
    state, _ = engine.round(KEY, state, 1, engine.cohort(np.arange(10)))
    after = np.asarray(state.mail["item"])
    np.testing.assert_array_equal(after[10:], before[10:])
    assert (after[:10] != before[:10]).any(axis=(1, 2)).all()


@pytest.mark.parametrize(
    ("setting", "message"),
    [({"affinity": "cos"}, "affinity="), ({"server_lr": 2.0}, "server_lr=2"), ({"message_layers": 0}, "layers=0")],
)
def test_wrong_settings_are_named(setting, message):
    with pytest.raises(ValueError, match=message):
        gpfedrec.Config(**setting)


def test_anchors_compare_users_by_some_items():
    tables = RNG.normal(size=(7, 50, 3)).astype(np.float32)
    every = gpfedrec.similarity_by_anchors(KEY, jnp.asarray(tables), 50)
    close(every, graph.cosine(jnp.asarray(tables)))
    anchors = np.asarray(jax.random.choice(KEY, 50, (8,), replace=False))
    assert len(set(anchors)) == 8
    flat = tables[:, anchors].reshape(7, -1)
    length = np.linalg.norm(flat, axis=1)
    close(gpfedrec.similarity_by_anchors(KEY, jnp.asarray(tables), 8), flat @ flat.T / np.outer(length, length))
    with pytest.raises(ValueError, match=r"anchor_items=91: expected a number in \[1, 90\]"):
        methods.build("gpfedrec_anchors", 23, 90, anchor_items=91)
