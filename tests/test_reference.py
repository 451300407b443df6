"""Rankers without training: against slow loops on tiny data, and against known numbers on real data."""

from __future__ import annotations

import collections
import dataclasses
import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from fedjax_rec import methods, metrics, reference, results, run
from fedjax_rec.client_step import client_key, record_at
from fedjax_rec.data import clients, readers, splits, synthetic
from fedjax_rec.data.features import Features
from fedjax_rec.data.sampling import draw_local_data, epoch_steps
from fedjax_rec.evaluate import make_evaluator
from fedjax_rec.rounds import make_engine

USERS, ITEMS = 24, 60
KEY = jax.random.key(11)


@functools.cache
def split() -> splits.Split:
    data = synthetic.make(USERS, ITEMS, min_history=4, median_history=7, max_history=16, late_users=0.3)
    return splits.leave_one_out(data.interactions)


@functools.cache
def evaluator(method="fedmf", pool="outside_train", **settings):
    population = clients.build(split(), negative_pool=pool, max_buckets=1)
    built = methods.build(method, USERS, ITEMS, dim=4, batch_size=8, negatives=2, **settings)
    return make_evaluator(make_engine(built, population), split())


def slow_ranks(score) -> tuple[np.ndarray, np.ndarray]:
    """Half-tie ranks of validation and test items under score(user, item), with the honest masks."""
    chosen = split()
    found = []
    for part, masked in ((chosen.valid, (chosen.train,)), (chosen.test, (chosen.train, chosen.valid))):
        ranks = np.zeros((USERS, 1))
        for user in range(USERS):
            gone = {i for pairs in masked for i in pairs.item[pairs.user == user].tolist()}
            (target,) = part.item[part.user == user].tolist()
            own = score(user, target)
            others = [score(user, item) for item in range(ITEMS) if item not in gone and item != target]
            ranks[user] = 1 + sum(s > own for s in others) + sum(s == own for s in others) / 2
        found.append(ranks)
    return tuple(found)


def assert_ranks(found: reference.Ranks, score):
    """Equal: counts are whole numbers, and ranks sums of halves."""
    valid, test = slow_ranks(score)
    np.testing.assert_array_equal(found.valid, valid)
    np.testing.assert_array_equal(found.test, test)


def all_rankers(evaluator, rounds=3, took_part=None) -> reference.Rankers:
    """As a run makes them: their one compiled function holds every ranker."""
    return reference.Rankers(evaluator, content(), draws=reference.Draws(KEY, rounds, took_part))


# ---- popularity and content ----------------------------------------------------------------------------------


def test_popularity_counts_training_interactions_only():
    often = collections.Counter(split().train.item.tolist())
    np.testing.assert_array_equal(reference.popularity_of(split()), [often[i] for i in range(ITEMS)])
    assert_ranks(all_rankers(evaluator()).popularity()["popularity"], lambda user, item: often[item])


def test_unseen_first_then_by_popularity():
    often = collections.Counter(split().train.item.tolist())
    assert any(often[item] == 0 for item in split().test.item.tolist())
    ranked = all_rankers(evaluator()).popularity()["unseen_first"]
    assert_ranks(ranked, lambda user, item: 10**6 if often[item] == 0 else often[item])


def content() -> dict[str, Features]:
    rng = np.random.default_rng(0)
    image, text = rng.normal(size=(ITEMS, 6)), 5 * rng.normal(size=(ITEMS, 3)) + 4  # text with a common direction
    known = np.ones(ITEMS, bool)
    return {n: Features(v.astype(np.float32), known, n) for n, v in {"image": image, "text": text}.items()}


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


@pytest.mark.parametrize("centred", [False, True])
def test_content_rankers_are_the_cosine_with_the_mean_of_the_history(centred):
    parts, trained = (
        [unit(feature.values.astype(float)) for feature in content().values()],
        np.unique(split().train.item),
    )
    if centred:
        parts = [unit(part - part[trained].mean(0)) for part in parts]
    rows = np.concatenate(parts, axis=1) / np.sqrt(2)
    histories = [split().train.item[split().train.user == user] for user in range(USERS)]

    def score(user, item):
        # rounded, so that float32 and float64 agree on what is greater; no two scores here are so close
        return round(float(rows[item] @ unit(rows[histories[user]].mean(0))), 6)

    name = "content_centred" if centred else "content_profile"
    assert_ranks(all_rankers(evaluator()).content()[name], score)


def test_without_features_there_are_no_content_rankers():
    assert reference.Rankers(evaluator(), {}).content() == {}


# ---- random --------------------------------------------------------------------------------------------------


def test_random_earns_chance():
    draws = all_rankers(evaluator()).random(seed=1)
    assert len(draws) == reference.RANDOM_REPEATS
    hits = np.mean([metrics.summarise(ranks.test, (10,))["HR@10"] for ranks in draws])
    chance = np.mean([10 / (ITEMS - 1 - (split().train.user == user).sum()) for user in range(USERS)])
    # 20 x 24 draws of a chance of 0.2: standard deviation 0.018, four of these
    assert abs(hits - chance) < 0.073


def test_random_ranks_differ_between_draws_and_users_and_repeat_with_the_seed():
    first, again, other = (all_rankers(evaluator()).random(seed=seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first[0].test, again[0].test)
    assert (first[0].test != first[1].test).any()
    assert (first[0].test != other[0].test).any()
    assert len(np.unique(first[0].test)) > USERS / 3


# ---- least sampled -------------------------------------------------------------------------------------------


def slow_counts(evaluator, rounds, took_part=None) -> np.ndarray:
    """[users, items]: how often each item was this user's negative, from the draws of each round."""
    engine = evaluator.engine
    (bucket,), (size,), sampling = engine.buckets, engine.sizes, engine.method.sampling
    pool_size = engine.clients.pool_size

    @jax.jit
    def draw(position, round_):
        record = jax.tree.map(lambda x: x[0], record_at(bucket, position[None], USERS, ITEMS, pool_size))
        key = client_key(KEY, round_, record.user)
        steps = epoch_steps(sampling, size, record.length)
        return draw_local_data(key, record, sampling, size, ITEMS, engine.pool, steps, round_)

    counts = np.zeros((USERS, ITEMS), int)
    for position, user in enumerate(np.asarray(bucket.user)):
        for round_ in range(rounds):
            if took_part is not None and not took_part[user, round_]:
                continue
            data = oracle.data_on_host(draw(jnp.int32(position), jnp.int32(round_)))
            for item, label, mask in zip(data.item.ravel(), data.label.ravel(), data.mask.ravel(), strict=True):
                if mask and not label:
                    counts[user, data.rows[item]] += 1
    return counts


CASES = {
    "plain": {},
    "outside all": {"pool": "outside_all"},
    "the same in every epoch": {"local_epochs": 2},
    "fresh in every epoch": {"redraw": "epoch", "local_epochs": 2},
    "trained items": {"pool": "trained_items", "draw": "independent", "redraw": "epoch", "local_epochs": 2},
}


@pytest.mark.parametrize("case", CASES)
def test_least_sampled_counts_the_draws_of_the_rounds(case):
    chosen = evaluator(**CASES[case])
    counts = slow_counts(chosen, 3)
    # every client draws its negatives in full in each round
    length = np.bincount(split().train.user, minlength=USERS)
    np.testing.assert_array_equal(counts.sum(1), 3 * 2 * length * chosen.engine.method.sampling.local_epochs)
    assert_ranks(all_rankers(chosen).least_sampled(), lambda user, item: -counts[user, item])


def test_least_sampled_counts_only_rounds_in_which_the_client_took_part():
    took_part = np.random.default_rng(0).random((USERS, 4)) < 0.5
    counts = slow_counts(evaluator(), 4, took_part)
    assert_ranks(all_rankers(evaluator(), 4, took_part).least_sampled(), lambda user, item: -counts[user, item])


def test_before_any_round_least_sampled_is_a_constant():
    ranks = all_rankers(evaluator(), rounds=0).least_sampled()
    assert_ranks(ranks, lambda user, item: 0)


def test_a_method_without_negatives_has_no_least_sampled():
    plain = evaluator()
    sampling = dataclasses.replace(plain.engine.method.sampling, negatives=0)
    engine = dataclasses.replace(plain.engine, method=plain.engine.method._replace(sampling=sampling))
    assert all_rankers(dataclasses.replace(plain, engine=engine)).least_sampled() is None
    for name in ("ease", "feddae"):  # the softmax and the closed form take all items
        assert methods.build(name, 30, 40).sampling.negatives == 0


def test_under_post_local_the_draws_of_the_judged_update_count_too():
    """The run's own book-keeping, with cohorts: in the update that is judged, everybody takes part."""
    config = run.RunConfig(
        method="pfedrec",
        settings={"dim": 4, "batch_size": 8, "negatives": 2},
        seed=0,
        rounds=3,
        clients_per_round=0.5,
        max_buckets=1,
        devices=1,
    )
    interactions = synthetic.make(USERS, ITEMS, min_history=4, median_history=7, max_history=16).interactions
    ready = dataclasses.replace(run.prepare(config, (interactions, split(), {})), key=KEY)
    took_part = np.ones((USERS, 4), bool)
    for round_ in range(3):
        took_part[:, round_] = np.isin(np.arange(USERS), ready.cohort_users(round_))
    np.testing.assert_array_equal(results.participation(ready, 3, 4), took_part)
    counts = slow_counts(ready.evaluator, 4, took_part)
    _, test = slow_ranks(lambda user, item: -counts[user, item])
    said = dict(results.reference_results(ready, 3))["least_sampled"]["test"]
    expected = metrics.summarise(test, config.ks)
    for name, value in expected.items():
        # float32 means of the same ranks
        np.testing.assert_allclose(said[name], value, rtol=1e-6, err_msg=name)


def test_very_long_replays_are_judged_on_fewer_clients():
    assert reference.affordable_share(evaluator(), 10) == 1
    draws = len(split().train.item) * 2 * 10**9
    np.testing.assert_allclose(reference.affordable_share(evaluator(), 10**9), reference.MAX_REPLAYED / draws)


def test_of_a_long_replay_a_sample_of_clients_is_judged_and_by_the_others_everybody(monkeypatch):
    config = run.RunConfig(settings={"dim": 4, "negatives": 2}, max_buckets=1, devices=1)
    interactions = synthetic.make(USERS, ITEMS, min_history=4, median_history=7, max_history=16).interactions
    ready = run.prepare(config, (interactions, split(), {}))
    monkeypatch.setattr(reference, "MAX_REPLAYED", len(split().train.item) * 2 * 3 // 2)
    said = dict(results.reference_results(ready, 3))
    assert {name: found["test"]["clients"] for name, found in said.items()} == {
        "popularity": USERS, "unseen_first": USERS, "random": USERS, "least_sampled": USERS // 2
    }  # fmt: skip


def test_all_rankers_of_a_run_compile_once_also_where_fewer_are_replayed(monkeypatch, caplog):
    config = run.RunConfig(settings={"dim": 4, "negatives": 2}, rounds=3, clients_per_round=0.5, max_buckets=1)
    interactions = synthetic.make(USERS, ITEMS, min_history=4, median_history=7, max_history=16).interactions
    ready = run.prepare(config, (interactions, split(), content()))
    monkeypatch.setattr(reference, "MAX_REPLAYED", len(split().train.item) * 2 * 3 // 2)
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        said = dict(results.reference_results(ready, 3))
    assert len(said) == 6 and said["least_sampled"]["test"]["clients"] == USERS // 2
    assert sum("Compiling" in r.getMessage() and "_rank_pass" in r.getMessage() for r in caplog.records) == 1


# ---- real data -----------------------------------------------------------------------------------------------


def real_evaluator(folder, name):
    interactions = readers.load(name, folder.parent, filters=readers.DATASETS[name].filters)
    chosen = splits.leave_one_out(interactions)
    method = methods.build("fedmf", chosen.num_users, chosen.num_items, dim=1)
    return make_evaluator(make_engine(method, clients.build(chosen, max_buckets=1)), chosen)


def test_ku_rankers(real_data):
    chosen = real_evaluator(real_data("ku"), "ku")
    said = {n: metrics.summarise(r.test, (50,)) for n, r in reference.Rankers(chosen).popularity().items()}
    # the numbers are given to three digits
    np.testing.assert_allclose(said["popularity"]["HR@50"], 0.206, atol=5e-4)
    np.testing.assert_allclose(said["popularity"]["NDCG@50"], 0.057, atol=5e-4)
    np.testing.assert_allclose(said["unseen_first"]["HR@50"], 0.544, atol=5e-4)
    np.testing.assert_allclose(said["unseen_first"]["NDCG@50"], 0.157, atol=1e-3)  # "about"
    assert said["popularity"]["clients"] == 204
    draws = [metrics.summarise(r.test, (50,))["HR@50"] for r in reference.Rankers(chosen).random()]
    # 50 of about 542 candidates; 20 x 204 draws of it have a standard deviation of 0.0045: three of these
    np.testing.assert_allclose(np.mean(draws), 0.0905, atol=0.0135)


@pytest.mark.parametrize(
    ("name", "hit_ratio", "tolerance"),
    [
        ("ml-100k", 0.084, 5e-4),  # given to three digits
        ("filmtrust", 0.276, 2e-3),  # time is the rank of the item; the order of its ties differs between sources
        ("amazon-video", 0.024, 5e-4),
    ],
)
def test_popularity_on_real_data(real_data, name, hit_ratio, tolerance):
    chosen = real_evaluator(real_data(name), name)
    found = metrics.summarise(reference.Rankers(chosen).popularity()["popularity"].test, (10,))
    np.testing.assert_allclose(found["HR@10"], hit_ratio, atol=tolerance)
