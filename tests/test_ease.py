"""EASE through the engine against its closed form."""

from __future__ import annotations

import jax
import numpy as np

from fedjax_rec import methods, metrics, reference
from fedjax_rec.data import clients, splits, synthetic
from fedjax_rec.evaluate import make_evaluator
from fedjax_rec.rounds import make_engine

USERS, ITEMS, L2 = 40, 60, 20.0
KEY = jax.random.key(0)


def test_weights_and_ranks_are_the_closed_form():
    split = splits.leave_one_out(
        synthetic.make(USERS, ITEMS, min_history=4, median_history=8, max_history=20).interactions
    )
    engine = make_engine(methods.build("ease", USERS, ITEMS, l2=L2), clients.build(split))
    state, _ = engine.round(KEY, engine.init(KEY), 0)

    x = np.zeros((USERS, ITEMS))
    x[split.train.user, split.train.item] = 1
    inverse = np.linalg.inv(x.T @ x + L2 * np.eye(ITEMS))
    b = -inverse / np.diag(inverse)[None, :]
    np.fill_diagonal(b, 0)
    np.testing.assert_allclose(state.server.shared["weights"], b, atol=1e-5)

    ranks = make_evaluator(engine, split).ranks(KEY, state, 1)
    scores = x @ b
    for user, item in zip(split.valid.user, split.valid.item, strict=True):
        others = scores[user][(x[user] == 0) & (np.arange(ITEMS) != item)]
        low = 1 + (others > scores[user, item] + 1e-5).sum()
        high = 1 + (others > scores[user, item] - 1e-5).sum()
        assert low <= ranks.valid[user, 0] <= high


def test_it_beats_popularity_where_tastes_are_planted():
    split = splits.leave_one_out(synthetic.make(200, 100).interactions)
    engine = make_engine(methods.build("ease", split.num_users, split.num_items, l2=50.0), clients.build(split))
    state, _ = engine.round(KEY, engine.init(KEY), 0)
    evaluator = make_evaluator(engine, split)
    hit = lambda ranks: metrics.summarise(ranks.test, (10,))["HR@10"]
    popular = reference.same_for_all(evaluator, reference.popularity_of(evaluator.split))
    assert hit(evaluator.ranks(KEY, state, 1)) > hit(popular)
