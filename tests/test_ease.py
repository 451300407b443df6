"""EASE through the engine against its closed form."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np

from fedjax_rec import methods, run
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


def test_it_is_one_round_and_beats_popularity_where_tastes_are_planted():
    summary = run.train(run.RunConfig(method="ease", dataset="synthetic", rounds=1, settings={"l2": 100.0}))
    popular = summary["reference_rankers"]["popularity"]["valid"]["HR@10"]
    assert summary["valid"]["HR@10"] > popular
    assert dataclasses.is_dataclass(methods.METHODS["ease"].config) and methods.METHODS["ease"].central
