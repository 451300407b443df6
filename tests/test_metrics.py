"""Metrics against their definitions, written as loops over ranked lists."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from fedjax_rec import metrics
from fedjax_rec.data import splits
from fedjax_rec.data.readers import load

KS = (1, 3, 10, 50)
EXACT = {"rtol": 1e-12, "atol": 0}  # the same float64 sums of at most fifty terms, in another order
NAN = np.nan


def from_list(ranked: list[int], targets: set[int], k: int) -> dict[str, float]:
    """The metrics of one user, from the recommendation list itself."""
    hits = [place for place, item in enumerate(ranked[:k]) if item in targets]
    gain = sum(1 / math.log2(place + 2) for place in hits)
    ideal = sum(1 / math.log2(place + 2) for place in range(min(k, len(targets))))
    first = next(place for place, item in enumerate(ranked) if item in targets)
    return {
        f"HR@{k}": float(len(hits) > 0),
        f"Recall@{k}": len(hits) / len(targets),
        f"Precision@{k}": len(hits) / k,
        f"NDCG@{k}": gain / ideal,
        "MRR": 1 / (first + 1),
    }


def random_lists(rng, users=40, items=30, most=5):
    """Ranked lists, their targets, and the ranks of these as [users, targets] in arbitrary order."""
    lists, targets, ranks = [], [], np.full((users, most), NAN)
    for user in range(users):
        ranked = rng.permutation(items).tolist()
        wanted = rng.choice(items, rng.integers(1, most + 1), replace=False)
        lists.append(ranked)
        targets.append(set(wanted.tolist()))
        places = rng.choice(most, len(wanted), replace=False)  # padding may stand anywhere
        ranks[user, places] = [ranked.index(item) + 1 for item in wanted]
    return lists, targets, ranks


@pytest.mark.parametrize("k", KS)
def test_every_metric_equals_its_definition_on_ranked_lists(k):
    lists, targets, ranks = random_lists(np.random.default_rng(k))
    values = metrics.per_client(ranks, (k,))
    expected = [from_list(ranked, wanted, k) for ranked, wanted in zip(lists, targets, strict=True)]
    assert values.keys() == expected[0].keys()
    for name, value in values.items():
        np.testing.assert_allclose(value, [e[name] for e in expected], **EXACT, err_msg=name)


def test_names_are_those_that_scripts_rely_on():
    names = [f"{name}@{k}" for k in (5, 20) for name in ("HR", "Recall", "Precision", "NDCG")]
    assert list(metrics.per_client(np.ones((2, 1)), (5, 20))) == [*names, "MRR"]


def test_a_list_is_no_longer_than_what_competes():
    """Five candidates: every metric at 20 is that at 5, and a full list has the precision targets / candidates."""
    ranks = np.array([[1.0, 3.0, 5.0], [4.0, NAN, NAN]])
    values = metrics.per_client(ranks, (5, 20), "released", candidates=5)
    for name in (*metrics.METRICS, "NDCG_released"):
        np.testing.assert_array_equal(values[f"{name}@20"], values[f"{name}@5"], err_msg=name)
    np.testing.assert_allclose(values["Precision@20"], [3 / 5, 1 / 5], **EXACT)


def test_released_ndcg_is_the_mean_over_all_orders_of_the_list():
    """IFedRec's and MDiffFR's evaluators put the hits where their ids fall among those of the list."""
    values = metrics.per_client(np.array([[1.0, 3.0, 9.0], [7.0, NAN, NAN]]), (4,), "released")
    discounts = 1 / np.log2(np.arange(2, 6))
    ideal = discounts[:3].sum()
    gains = [discounts[list(places)].sum() / ideal for places in itertools.permutations(range(4), 2)]
    np.testing.assert_allclose(values["NDCG_released@4"], [np.mean(gains), 0], **EXACT)
    without = metrics.per_client(np.array([[1.0, 3.0, 9.0], [7.0, NAN, NAN]]), (4,))
    assert values.keys() - without.keys() == {"NDCG_released@4"}
    np.testing.assert_array_equal(values["NDCG@4"], without["NDCG@4"])


def test_released_ndcg_of_a_perfect_ranking_on_real_data_falls_with_k(real_data):
    """Measured with the released evaluator on the same parts: 0.574, 0.418 and 0.329, in the ids of that data set,
    whose order is not quite independent of users."""
    folder = real_data("citeulike-a", "ifedrec_test.csv").parents[1]
    split = splits.make(load("citeulike-a", folder), "cold_items", data_dir=folder)
    targets, places = np.bincount(split.test.user)[:, None], np.arange(1.0, 201)
    perfect = np.where(places <= targets, places, NAN)
    said = metrics.summarise(perfect, (20, 50, 100), "released")
    for k, measured in {20: 0.574, 50: 0.418, 100: 0.329}.items():
        assert said[f"NDCG@{k}"] == pytest.approx(1)
        assert said[f"NDCG_released@{k}"] == pytest.approx(measured, abs=0.02)


def test_one_target_alone():
    values = metrics.per_client(np.array([[1.0], [3.0], [4.0]]), (3,))
    np.testing.assert_array_equal(values["HR@3"], [1, 1, 0])
    np.testing.assert_array_equal(values["Recall@3"], values["HR@3"])
    np.testing.assert_allclose(values["NDCG@3"], [1, 0.5, 0], **EXACT)
    np.testing.assert_allclose(values["MRR"], [1, 1 / 3, 1 / 4], **EXACT)


def test_a_tie_across_the_cut_counts_by_the_half_tie_rank():
    ranks = np.array([[10.0], [10.5], [11.0]])
    np.testing.assert_array_equal(metrics.per_client(ranks, (10,))["HR@10"], [1, 0, 0])
    np.testing.assert_allclose(metrics.per_client(ranks, (11,))["NDCG@11"], 1 / np.log2(ranks[:, 0] + 1), **EXACT)


def test_half_tie_rank_is_the_mean_place_over_all_tie_orders():
    scores = [3, 2, 2, 2, 2, 1]
    target = 2
    places = []
    for order in itertools.permutations(range(len(scores))):
        ranked = sorted(order, key=lambda item: -scores[item])  # stable: ties stay in the order given
        places.append(ranked.index(target) + 1)
    greater = sum(s > scores[target] for s in scores)
    ties = sum(s == scores[target] for s in scores) - 1
    assert np.mean(places) == 1 + greater + ties / 2


def test_more_targets_than_k_can_still_be_perfect():
    values = metrics.per_client(np.array([[1.0, 2.0, 3.0, 4.0]]), (2,))
    assert values["NDCG@2"] == values["Precision@2"] == values["HR@2"] == 1
    assert values["Recall@2"] == 0.5


def test_k_larger_than_the_targets_keeps_recall_and_ndcg_reachable():
    values = metrics.per_client(np.array([[2.0, 1.0, NAN]]), (50,))
    assert values["Recall@50"] == 1
    assert values["Precision@50"] == 2 / 50
    np.testing.assert_allclose(values["NDCG@50"], 1, **EXACT)


def test_tied_targets_never_exceed_one():
    """Also where more of them share a rank <= k than a list of k can hold."""
    for count in range(1, 120):  # all targets tied at the top share the rank (1 + count) / 2
        ranks = np.full((1, count), (1 + count) / 2)
        for name, value in metrics.per_client(ranks, KS).items():
            assert 0 <= value[0] <= 1, (count, name)


def test_padding_changes_nothing():
    _, _, ranks = random_lists(np.random.default_rng(0))
    padded = np.concatenate([np.full((len(ranks), 2), NAN), ranks], axis=1)
    plain = metrics.per_client(ranks, KS)
    for name, value in metrics.per_client(padded, KS).items():
        np.testing.assert_array_equal(value, plain[name])


def test_clients_without_targets_are_nan_and_do_not_count():
    ranks = np.array([[1.0, NAN], [NAN, NAN], [4.0, 2.0]])
    for value in metrics.per_client(ranks, KS).values():
        np.testing.assert_array_equal(np.isnan(value), [False, True, False])
    said, without = metrics.summarise(ranks, KS), metrics.summarise(ranks[[0, 2]], KS)
    assert said == without
    assert said["clients"] == 2


def test_summary_is_the_mean_over_clients_not_targets():
    ranks = np.array([[1.0, 1.5, 2.0], [40.0, NAN, NAN]])
    assert metrics.summarise(ranks, (10,))["HR@10"] == 0.5
    assert metrics.summarise(ranks, (10,))["Recall@10"] == 0.5


@pytest.mark.parametrize("ranks", [np.full((3, 2), NAN), np.zeros((0, 2)), np.zeros((3, 0))])
def test_nobody_with_a_target_is_nan_with_zero_clients(ranks):
    said = metrics.summarise(ranks, KS)
    assert said.pop("clients") == 0
    assert all(math.isnan(value) for value in said.values())
    assert math.isnan(metrics.worst_decile(ranks))


@pytest.mark.parametrize(("users", "worst"), [(1, 1), (10, 1), (11, 2), (20, 2), (95, 10)])
def test_worst_decile_is_the_mean_mrr_of_the_worst_tenth_rounded_up(users, worst):
    rng = np.random.default_rng(users)
    ranks = rng.integers(1, 1000, (users, 2)).astype(float)
    ranks = np.concatenate([ranks, np.full((3, 2), NAN)])[rng.permutation(users + 3)]
    mrr = sorted(max(1 / r for r in row) for row in ranks.tolist() if not math.isnan(row[0]))
    np.testing.assert_allclose(metrics.worst_decile(ranks), sum(mrr[:worst]) / worst, **EXACT)


def test_coverage_and_popularity_bias_against_the_lists_themselves():
    rng = np.random.default_rng(1)
    items, k = 12, 3
    train = rng.integers(0, items - 2, 200)  # two items nobody took
    popularity = np.bincount(train, minlength=items)
    lists = [rng.choice(items - 4, k, replace=False) for _ in range(9)]
    recommended = np.bincount(np.concatenate(lists), minlength=items)
    said = metrics.beyond_accuracy(recommended, popularity, k)
    assert said[f"Coverage@{k}"] == len(set(np.concatenate(lists).tolist())) / items
    mean_of_lists = np.mean([popularity[i] for one in lists for i in one])
    mean_of_train = np.mean([popularity[i] for i in train])
    np.testing.assert_allclose(said[f"PopularityBias@{k}"], mean_of_lists / mean_of_train, **EXACT)


def test_recommending_what_people_take_has_no_popularity_bias():
    popularity = np.array([5, 3, 0, 2])
    np.testing.assert_allclose(metrics.beyond_accuracy(popularity, popularity, 10)["PopularityBias@10"], 1, **EXACT)


def test_lists_of_nobody_cover_nothing():
    said = metrics.beyond_accuracy(np.zeros(4, int), np.zeros(4, int), 10)
    assert said == {"Coverage@10": 0.0, "PopularityBias@10": 0.0}


def test_the_paired_difference_is_over_clients():
    """Clients that differ a lot from each other but little between two methods: a narrow interval."""
    rng = np.random.default_rng(0)
    base = rng.normal(size=400)
    mean, low, high = metrics.paired_difference(base + 0.1 + 0.01 * rng.normal(size=400), base)
    assert low < 0.1 < high and high - low < 0.01  # 2 * 1.96 * 0.01 / sqrt(400) is about 0.002
    assert abs(mean - (low + high) / 2) < 1e-12
    assert np.isnan(metrics.paired_difference(np.full(3, np.nan), np.ones(3))).all()
    assert metrics.paired_difference(base, base) == (0.0, 0.0, 0.0)


def test_seeds_widen_the_interval_where_they_differ():
    rng = np.random.default_rng(1)
    base = rng.normal(size=400)
    seeds = np.stack([base, base + 0.2])  # by shifts alone: variance 0.02 over two seeds
    mean, low, high = metrics.paired_difference(seeds, base)
    np.testing.assert_allclose([mean, high - mean, mean - low], [0.1, 12.7062 * 0.1, 12.7062 * 0.1], rtol=1e-4)
    same = np.stack([base + 0.1 * rng.normal(size=400) for _ in range(5)])  # nothing but noise of single clients
    alone = metrics.paired_difference(same.mean(0), base)
    np.testing.assert_allclose(metrics.paired_difference(same, base), alone, atol=2e-3)
    # shifts that both have do not count where seeds are paired, and do where they are not
    shared = seeds + 0.01 * rng.normal(size=(2, 400))
    width = lambda a, b: np.diff(metrics.paired_difference(a, b)[1:])[0]
    assert width(shared, seeds) < 0.1 < width(shared, np.concatenate([seeds, seeds]))


@pytest.mark.parametrize(
    ("seeds", "clients", "of_seeds", "of_both"),
    [
        ((5, 5), 60, 0.0, 1.0),
        ((5, 5), 60, 0.5, 0.1),
        ((5, 5), 900, 0.005, 0.1),
        ((3, 3), 900, 0.003, 0.1),
        ((5, 3), 60, 0.1, 1.0),
        ((2, 2), 300, 0.0, 1.0),
    ],
)
def test_the_interval_holds_the_truth_as_often_as_it_says(seeds, clients, of_seeds, of_both):
    """Clients and seeds drawn anew: some 95 % of the intervals for the differences of two methods hold 0."""
    rng, hold, times = np.random.default_rng(2), 0, 600
    for _ in range(times):
        sides = [of_seeds * rng.normal(size=(n, 1)) + of_both * rng.normal(size=(n, clients)) for n in seeds]
        sides[0] = sides[0] + 0.5 * of_both * rng.normal(size=clients)  # who is better with whom
        _, low, high = metrics.paired_difference(*sides)
        hold += low <= 0 <= high
    assert 0.925 < hold / times < 0.99
