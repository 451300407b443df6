"""The embedded data set: determinism, invariants and the planted order of the reference rankers."""

from __future__ import annotations

import numpy as np
import pytest

from fedjax_rec.data import synthetic
from fedjax_rec.data.interactions import DataError, Interactions


@pytest.fixture(scope="module")
def data() -> synthetic.Synthetic:
    return synthetic.make()


def _leave_one_out(data: Interactions) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Train matrix [users, items] of 0 and 1, and each user's validation, test and unseen flag, [users]."""
    order = np.lexsort((np.arange(len(data)), data.time, data.user))
    end = np.cumsum(np.bincount(data.user, minlength=data.num_users))
    test, valid = data.item[order[end - 1]], data.item[order[end - 2]]
    train = np.zeros((data.num_users, data.num_items))
    train[data.user, data.item] = 1
    users = np.arange(data.num_users)
    train[users, test] = train[users, valid] = 0
    return train, valid, test, train.sum(axis=0)[test] == 0


def _hits(scores: np.ndarray, known: np.ndarray, target: np.ndarray, k: int = 10) -> np.ndarray:
    """Whether the target is in the top k of all items minus the known ones; ties count half."""
    scores = np.where(known > 0, -np.inf, scores)
    own = scores[np.arange(len(target)), target][:, None]
    rank = 1 + (scores > own).sum(axis=1) + ((scores == own).sum(axis=1) - 1) / 2
    return rank <= k


def _ease(train: np.ndarray, penalty: float = 100.0) -> np.ndarray:
    inverse = np.linalg.inv(train.T @ train + penalty * np.eye(train.shape[1]))
    weights = -inverse / np.diag(inverse)
    np.fill_diagonal(weights, 0)
    return train @ weights


def _profile(train: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Cosine between each item and the mean of the user's items."""
    values = values - values.mean(axis=0)
    values = values / np.linalg.norm(values, axis=1, keepdims=True)
    profile = train @ values
    return profile / np.linalg.norm(profile, axis=1, keepdims=True) @ values.T


def _rankers(data: synthetic.Synthetic) -> dict[str, np.ndarray]:
    """HR@10 hits [users] of the reference rankers under leave-one-out, and which targets are unseen."""
    train, valid, test, unseen = _leave_one_out(data.interactions)
    known = train.copy()
    known[np.arange(len(valid)), valid] = 1
    image, text = (_profile(train, data.features[name].values) for name in ("image", "text"))
    scores = {
        "random": np.random.default_rng(1).normal(size=train.shape),
        "popularity": np.broadcast_to(train.sum(axis=0), train.shape),
        "ease": _ease(train),
        "image": image,
        "text": text,
        "content": image + text,
        "oracle": data.affinity,
    }
    return {"unseen": unseen} | {name: _hits(score, known, test) for name, score in scores.items()}


# --- make --------------------------------------------------------------------------------------------------


def _arrays(data: synthetic.Synthetic) -> dict[str, np.ndarray]:
    feedback = {name: getattr(data.interactions, name) for name in ("user", "item", "time", "user_ids", "item_ids")}
    values = {name: features.values for name, features in data.features.items()}
    return feedback | values | {"affinity": data.affinity, "visual_share": data.visual_share}


def test_same_seed_same_data(data):
    again, other = _arrays(synthetic.make()), _arrays(synthetic.make(seed=1))
    for name, array in _arrays(data).items():
        np.testing.assert_array_equal(array, again[name], err_msg=name)
    assert not np.array_equal(data.interactions.item[:100], other["item"][:100])


def test_types_and_shapes(data):
    feedback = data.interactions
    assert (feedback.num_users, feedback.num_items, feedback.split_label) == (600, 400, None)
    assert feedback.user.dtype == feedback.item.dtype == np.int32
    assert feedback.time.dtype == np.int64
    assert feedback.counts["pairs"] == len(feedback) == len(feedback.item) == len(feedback.time)
    assert len(np.unique(feedback.user.astype(np.int64) * 400 + feedback.item)) == len(feedback)
    assert feedback.user.min() == feedback.item.min() == 0
    assert (feedback.user.max(), feedback.item.max()) == (599, 399)
    assert {name: f.values.shape for name, f in data.features.items()} == {
        "image": (400, 32),
        "text": (400, 24),
    }
    for features in data.features.values():
        assert features.values.dtype == np.float32
        assert features.present.all()
        assert np.isfinite(features.values).all()
        assert 0.8 < np.linalg.norm(features.values, axis=1).mean() < 1.2
    assert data.affinity.shape == (600, 400)
    assert data.affinity.dtype == data.visual_share.dtype == np.float32


def test_rows_of_a_user_are_in_time_order(data):
    feedback = data.interactions
    assert (np.diff(feedback.user) >= 0).all()
    same_user = np.diff(feedback.user) == 0
    assert (np.diff(feedback.time)[same_user] >= 0).all()


def test_histories_are_long_tailed(data):
    lengths = np.bincount(data.interactions.user)
    assert lengths.min() == 8
    assert lengths.max() <= 150
    assert 18 <= np.median(lengths) <= 22
    assert np.quantile(lengths, 0.99) > 4 * np.median(lengths)


def test_popularity_is_skewed_and_not_readable_from_the_ids(data):
    counts = np.bincount(data.interactions.item, minlength=400)
    ranked = np.sort(counts)[::-1]
    assert ranked[:40].sum() > 0.25 * ranked.sum()
    assert ranked[0] > 5 * np.median(ranked)
    assert abs(np.corrcoef(np.arange(400), counts)[0, 1]) < 0.15


def test_popularity_drifts(data):
    """Items have seasons: their counts in the first and second half of the time differ beyond chance."""
    feedback = data.interactions
    second = feedback.time > np.median(feedback.time)
    total = np.bincount(feedback.item, minlength=400)
    share = np.bincount(feedback.item[second], minlength=400) / np.maximum(total, 1)
    often = total >= 20
    by_chance = 0.5 / np.sqrt(total[often])
    assert (np.abs(share[often] - 0.5) > 2 * by_chance).mean() > 0.2


def test_some_users_are_visual_and_some_textual(data):
    assert (data.visual_share < 0.2).mean() > 0.2
    assert (data.visual_share > 0.8).mean() > 0.2
    hits = _rankers(data)
    visual = data.visual_share > 0.5
    assert hits["image"][visual].mean() > 1.5 * hits["image"][~visual].mean()
    assert hits["text"][~visual].mean() > 1.5 * hits["text"][visual].mean()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_planted_order_of_the_reference_rankers(seed):
    hits = _rankers(synthetic.make(seed=seed))
    rate = {name: hit.mean() for name, hit in hits.items()}
    assert rate["random"] < 0.06
    assert rate["popularity"] > 2.5 * rate["random"]
    assert rate["ease"] > 2 * rate["popularity"]
    assert rate["content"] > 4 * rate["random"]
    assert rate["ease"] > 1.2 * rate["content"]
    others = [value for name, value in rate.items() if name not in ("oracle", "unseen")]
    assert rate["oracle"] > 1.2 * max(others)
    assert rate["oracle"] < 0.9


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_few_percent_of_the_test_targets_are_unseen_in_training(seed):
    hits = _rankers(synthetic.make(seed=seed))
    assert 0.03 < hits["unseen"].mean() < 0.1
    assert not hits["ease"][hits["unseen"]].any()


def test_features_help_on_unseen_targets():
    """Over a few seeds, because one data set has only some 36 unseen targets."""
    runs = [_rankers(synthetic.make(seed=seed)) for seed in range(5)]
    unseen = np.concatenate([hits["unseen"] for hits in runs])
    content = np.concatenate([hits["content"] for hits in runs])
    assert content[unseen].mean() > 3 * 10 / 400


def test_small_catalogue():
    data = synthetic.make(num_users=5, num_items=20)
    assert data.interactions.num_items == 20
    assert np.bincount(data.interactions.user).max() <= 10


@pytest.mark.parametrize("sizes", [{"num_items": 15}, {"num_users": 0}, {"min_history": 0}, {"late_items": 0.9}])
def test_sizes_without_room(sizes):
    (name, value), *_ = sizes.items()
    with pytest.raises(DataError, match=rf"synthetic: .*{name}={value}.*expected at least 1 user"):
        synthetic.make(**sizes)


# --- population --------------------------------------------------------------------------------------------


def test_population_shape_and_law():
    data = synthetic.population(4000, 1000, 20)
    assert (data.num_users, data.num_items, len(data)) == (4000, 1000, 80_000)
    assert data.user.dtype == data.item.dtype == np.int32
    assert data.time.dtype == np.int64
    assert (np.bincount(data.user) == 20).all()
    items = np.sort(data.item.reshape(4000, 20), axis=1)
    assert (np.diff(items, axis=1) > 0).all()
    assert items.min() >= 0
    assert items.max() < 1000

    counts = np.bincount(data.item, minlength=1000)
    ranked = np.sort(counts)[::-1]
    slope = np.polyfit(np.log(np.arange(30, 600)), np.log(ranked[30:600]), 1)[0]
    assert -0.75 < slope < -0.45
    assert abs(np.corrcoef(np.arange(1000), counts)[0, 1]) < 0.1


def test_population_times_do_not_follow_popularity():
    data = synthetic.population(4000, 1000, 20)
    counts = np.bincount(data.item, minlength=1000)[data.item].reshape(4000, 20)
    last = data.time.reshape(4000, 20).argmax(axis=1)
    assert counts[np.arange(4000), last].mean() == pytest.approx(counts.mean(), rel=0.05)


def test_population_is_a_function_of_the_seed():
    first, again, other = (synthetic.population(50, 100, 5, seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first.item, again.item)
    np.testing.assert_array_equal(first.time, again.time)
    assert not np.array_equal(first.item, other.item)


@pytest.mark.parametrize(("num_items", "interactions_per_user"), [(1, 1), (7, 7), (8, 7)])
def test_population_corners(num_items, interactions_per_user):
    data = synthetic.population(30, num_items, interactions_per_user, skew=0.0)
    items = np.sort(data.item.reshape(30, -1), axis=1)
    assert (np.diff(items, axis=1) > 0).all()
    assert items.max() < num_items


@pytest.mark.parametrize(
    ("arguments", "options"), [((0, 5, 2), {}), ((3, 5, 6), {}), ((3, 5, 0), {}), ((3, 5, 2), {"skew": 1.0})]
)
def test_population_errors(arguments, options):
    with pytest.raises(DataError, match=r"population: num_users=\d+ .*expected num_users >= 1"):
        synthetic.population(*arguments, **options)
