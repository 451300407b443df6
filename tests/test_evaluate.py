"""The evaluation pass against a slow evaluator: whole score matrices, Python loops, no masks by arithmetic."""

from __future__ import annotations

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from fedjax_rec import evaluate, methods, metrics
from fedjax_rec.client_step import client_key, record_at
from fedjax_rec.data import clients, splits, synthetic
from fedjax_rec.data.sampling import draw_local_data, epoch_steps
from fedjax_rec.evaluate import make_evaluator, rank_of
from fedjax_rec.protocols import HONEST, Protocol
from fedjax_rec.rounds import make_engine

USERS, ITEMS = 30, 70
KEY = jax.random.key(3)
SMALL = {"dim": 5, "batch_size": 16, "negatives": 2, "init_std": 0.5, "item_lr_scale": 0.3}
UNMASKED = Protocol("unmasked", mask_valid_at_test=False)
UNDECIDED = 1e-5  # scores are float32 sums of five products of size 1, compared with float64


# ---- the slow evaluator --------------------------------------------------------------------------------------


def items_of(pairs: splits.Pairs, user: int) -> list[int]:
    return pairs.item[pairs.user == user].tolist()


def competitors(split: splits.Split, user: int, part: str, mask_valid: bool, among=None) -> set[int]:
    """The items that a target of this part competes with (and itself)."""
    candidates = set(range(split.num_items)) if among is None else set(among)
    if split.candidates is not None:
        candidates &= set(np.flatnonzero(split.candidates[part]).tolist())
    candidates -= set(items_of(split.train, user))
    if part == "test" and mask_valid and split.candidates is None:
        candidates -= set(items_of(split.valid, user))
    return candidates


def slow_ranks(scores, split, *, mask_valid=True, users=None, among=None, slack=0.0) -> dict[str, np.ndarray]:
    """{part: [2, users, targets]}: the lowest and the highest rank when scores are known to within `slack`."""
    ranks = {}
    for part in ("valid", "test"):
        pairs = getattr(split, part)
        most = max(len(items_of(pairs, user)) for user in range(split.num_users))
        ranks[part] = np.full((2, split.num_users, max(most, 1)), np.nan)
        for user in range(split.num_users) if users is None else users:
            chosen = None if among is None else among[user]
            others = competitors(split, user, part, mask_valid, chosen)
            for place, target in enumerate(items_of(pairs, user)):
                low = high = 1.0
                for other in others - {target}:
                    gap = float(scores[user, other]) - float(scores[user, target])
                    if abs(gap) <= slack:
                        low, high = (low + 0.5, high + 0.5) if slack == 0 else (low, high + 1)
                    elif gap > 0:
                        low, high = low + 1, high + 1
                ranks[part][:, user, place] = low, high
    return ranks


def assert_ranks(found, scores, split, **how):
    """Equal: ranks are sums of halves, exact in float32."""
    for part, (expected, _) in slow_ranks(scores, split, **how).items():
        np.testing.assert_array_equal(getattr(found, part), expected, err_msg=part)


def table_scorer(engine, table, sharded, slot, record, size, steps):
    """Scores given as a table [users, items]: any scores can be put into the pass."""
    return table.at[record.user].get(mode="clip")


# ---- what is evaluated ---------------------------------------------------------------------------------------


@functools.cache
def interactions():
    return synthetic.make(USERS, ITEMS, min_history=4, median_history=8, max_history=20).interactions


@functools.cache
def leave_one_out() -> splits.Split:
    return splits.leave_one_out(interactions())


@functools.cache
def cold() -> splits.Split:
    return splits.cold_items(interactions(), seed=1, ratios=(4, 3, 3))


@functools.cache
def ragged() -> splits.Split:
    """Several targets per user, some users with none, one without training items."""
    rng = np.random.default_rng(0)
    data = interactions()
    label = rng.choice(3, len(data), p=[0.5, 0.2, 0.3]).astype(np.int8)
    label[data.user == 4] = 0
    label[data.user == 5] = 2
    return splits.given(dataclasses.replace(data, split_label=label))


SPLITS = {"leave_one_out": leave_one_out, "cold_items": cold, "ragged": ragged}


def engine_of(split, name="fedmf", *, devices=1, buckets=1, block=0, **settings):
    population = clients.build(split, num_devices=devices, max_buckets=buckets)
    method = methods.build(name, split.num_users, split.num_items, **{**SMALL, **settings})
    return make_engine(method, population, block_size=block)


@functools.cache
def evaluator_of(split, *, protocol=HONEST, sampled=False, **layout):
    return make_evaluator(engine_of(split, **layout), split, protocol=protocol, sampled=sampled)


def random_scores(split, distinct=6, seed=0):
    """Many ties: integers below `distinct`."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, distinct, (split.num_users, split.num_items)).astype(np.float32)


def ranks_by(evaluator, scores, cohort=None):
    return evaluator.ranks_of(table_scorer, jnp.asarray(scores), (), cohort)


# ---- rank_of -------------------------------------------------------------------------------------------------


def test_rank_is_the_mean_place_over_all_orders_of_the_ties():
    scores = [0.5, 2.0, 0.5, -1.0, 0.5]
    orders = [sorted(o, key=lambda i: -scores[i]) for o in itertools.permutations(range(5))]
    mean_place = [np.mean([o.index(item) + 1 for o in orders]) for item in range(5)]
    np.testing.assert_array_equal(rank_of(jnp.array(scores), jnp.arange(5)), mean_place)


def test_rank_counts_only_competing_items():
    scores = jnp.array([5.0, 4.0, 3.0, 3.0, -jnp.inf])
    np.testing.assert_array_equal(rank_of(scores, jnp.array([2, 3])), [3.5, 3.5])
    np.testing.assert_array_equal(rank_of(scores, jnp.array([2]), scores[jnp.array([1, 2, 4])]), [2])


def test_targets_beyond_the_count_are_not_looked_at():
    ranks = rank_of(jnp.array([3.0, 2.0, 1.0]), jnp.array([2, 1, 0]), count=jnp.int32(2))
    np.testing.assert_array_equal(ranks, [3, 2, np.nan])


def test_padding_targets_have_no_rank():
    np.testing.assert_array_equal(rank_of(jnp.array([1.0, 2.0]), jnp.array([2, 0])), [np.nan, 2])


def test_masked_items_do_not_tie():
    np.testing.assert_array_equal(rank_of(jnp.full(4, -jnp.inf), jnp.array([1])), [1])


# ---- masks and candidates ------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", [HONEST, UNMASKED], ids=lambda p: p.name)
@pytest.mark.parametrize("split", SPLITS)
def test_ranks_equal_the_slow_evaluator(split, protocol):
    split = SPLITS[split]()
    scores = random_scores(split)
    found = ranks_by(evaluator_of(split, protocol=protocol, buckets=3), scores)
    assert_ranks(found, scores, split, mask_valid=protocol.mask_valid_at_test)
    assert found.nonfinite == 0


def test_the_masks_matter():
    """The items that the masks remove would have come first."""
    split = leave_one_out()
    for pairs, protocol, expected in (
        (split.train, HONEST, (1, 1)),
        (split.valid, HONEST, (1, 1)),
        (split.valid, UNMASKED, (1, 2)),
    ):
        scores = np.zeros((USERS, ITEMS), np.float32)
        scores[split.test.user, split.test.item] = scores[split.valid.user, split.valid.item] = 1
        scores[pairs.user, pairs.item] = 2
        found = ranks_by(evaluator_of(split, protocol=protocol), scores)
        # in the first case the validation item is ranked against the test item of equal score
        assert (found.valid == (1.5 if pairs is split.train else expected[0])).all()
        assert (found.test == expected[1]).all()


def test_cold_candidates_are_the_items_of_their_part():
    split = cold()
    scores = np.zeros((USERS, ITEMS), np.float32)
    scores[:, ~split.candidates["test"]] = 1  # all other items come first, and do not compete
    found = ranks_by(evaluator_of(split), scores)
    present = ~np.isnan(found.test)
    assert present.sum() == len(split.test.item)
    assert (found.test[present] == (1 + split.candidates["test"].sum()) / 2).all()
    assert split.competing("test") == split.candidates["test"].sum() and leave_one_out().competing("test") is None


# ---- odd scorers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", SPLITS)
def test_a_constant_scorer_earns_the_mean_rank_of_chance(split):
    split = SPLITS[split]()
    found = ranks_by(evaluator_of(split), np.zeros((split.num_users, split.num_items), np.float32))
    for user in range(split.num_users):
        for part, ranks in (("valid", found.valid), ("test", found.test)):
            count = len(competitors(split, user, part, mask_valid=True))
            wanted = len(items_of(getattr(split, part), user))
            np.testing.assert_array_equal(ranks[user, :wanted], (count + 1) / 2)
    assert metrics.summarise(found.test, (10,))["HR@10"] == 0 or split is cold()


def test_scores_that_are_not_numbers_are_counted_and_come_last():
    split = leave_one_out()
    scores = random_scores(split)
    sick = scores.copy()
    rng = np.random.default_rng(1)
    sick[rng.random(scores.shape) < 0.3] = np.nan
    sick[split.test.user[::2], split.test.item[::2]] = np.nan
    found = ranks_by(evaluator_of(split), sick)
    assert found.nonfinite == np.isnan(sick).sum()
    assert_ranks(found, np.nan_to_num(sick, nan=-1e9), split)


@pytest.mark.parametrize("bad", [np.nan, -np.inf])
def test_a_model_without_any_usable_score_is_no_better_than_a_constant(bad):
    split = leave_one_out()
    constant = np.zeros((USERS, ITEMS), np.float32)
    evaluator = evaluator_of(split)
    found = ranks_by(evaluator, constant + bad)
    np.testing.assert_array_equal(found.test, ranks_by(evaluator, constant).test)
    assert found.nonfinite == USERS * ITEMS


def test_infinite_scores_are_counted():
    scores = np.zeros((USERS, ITEMS), np.float32)
    scores[3, 7] = np.inf
    assert ranks_by(evaluator_of(leave_one_out()), scores).nonfinite == 1


# ---- who is evaluated, and how the work is laid out ------------------------------------------------------------


def test_others_than_the_cohort_have_no_rank_and_no_list():
    split = leave_one_out()
    evaluator = evaluator_of(split, buckets=3)
    scores, users = random_scores(split), [1, 8, 9, 29]
    found = ranks_by(evaluator, scores, evaluator.engine.cohort(np.array(users)))
    assert_ranks(found, scores, split, users=users)
    assert found.recommended.sum() == len(users) * evaluate.TOP


def test_scores_outside_the_cohort_are_not_counted_as_bad():
    split = leave_one_out()
    evaluator = evaluator_of(split)
    scores = random_scores(split)
    scores[0] = np.nan
    assert ranks_by(evaluator, scores, evaluator.engine.cohort(np.array([1, 2]))).nonfinite == 0


def test_recommended_counts_the_top_lists_at_test():
    split = leave_one_out()
    rng = np.random.default_rng(2)
    scores = rng.permuted(np.tile(np.arange(ITEMS, dtype=np.float32), (USERS, 1)), axis=1)  # no ties
    expected = np.zeros(ITEMS, int)
    for user in range(USERS):
        allowed = competitors(split, user, "test", mask_valid=True)
        for item in sorted(allowed, key=lambda i: -scores[user, i])[: evaluate.TOP]:
            expected[item] += 1
    np.testing.assert_array_equal(ranks_by(evaluator_of(split), scores).recommended, expected)


def test_lists_hold_no_more_items_than_there_are_candidates():
    split = cold()
    few = np.zeros(ITEMS, bool)
    few[split.test.item[:3]] = True
    split = dataclasses.replace(split, candidates={**split.candidates, "test": few})
    found = ranks_by(evaluator_of(split), random_scores(split))
    assert (found.recommended[few] == USERS).all()
    assert (found.recommended[~few] == 0).all()


@pytest.mark.parametrize("layout", [{"devices": 4}, {"devices": 3, "buckets": 3}, {"buckets": 3, "block": 2}], ids=str)
@pytest.mark.parametrize("split", ["leave_one_out", "ragged"])
def test_devices_buckets_and_blocks_change_no_rank(split, layout):
    split = SPLITS[split]()
    scores = random_scores(split)
    plain, other = (ranks_by(evaluator_of(split, **how), scores) for how in ({}, layout))
    for a, b in zip(plain, other, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("clients_at_once", [1, 7])
def test_the_size_of_evaluation_blocks_changes_no_rank(clients_at_once, monkeypatch):
    split = ragged()
    scores = random_scores(split)
    plain = ranks_by(evaluator_of(split), scores)
    monkeypatch.setattr(evaluate, "_eval_block", lambda engine, scorer, width: min(clients_at_once, width))
    other = ranks_by(make_evaluator(engine_of(split, buckets=2, block=4), split), scores)
    for a, b in zip(plain, other, strict=True):
        np.testing.assert_array_equal(a, b)


# ---- 99 sampled items ----------------------------------------------------------------------------------------


def candidates_found(evaluator, part: str) -> list[set[int]]:
    """Each user's candidates for the first target, read off ranks: an item competes if raising its score to the
    top lowers the target's rank, or makes it 1 where it is the target."""
    split = evaluator.split
    zero = np.zeros((split.num_users, split.num_items), np.float32)
    ranks = lambda scores: getattr(ranks_by(evaluator, scores), part)[:, 0]
    level = ranks(zero)
    found = [set() for _ in range(split.num_users)]
    for item in range(split.num_items):
        raised = zero.copy()
        raised[:, item] = 1
        for user in np.flatnonzero(ranks(raised) != level):
            found[user].add(item)
    return found


@functools.cache
def wide() -> splits.Split:
    data = synthetic.make(USERS, 150, min_history=4, median_history=8, max_history=20)
    return splits.leave_one_out(data.interactions)


def test_sampled_candidates_are_99_distinct_unseen_items_and_the_target():
    split = wide()
    evaluator = evaluator_of(split, sampled=True)
    for part in ("valid", "test"):
        pairs = getattr(split, part)
        for user, found in enumerate(candidates_found(evaluator, part)):
            everything = {i for p in (split.train, split.valid, split.test) for i in items_of(p, user)}
            assert found & everything == set(items_of(pairs, user))
            assert len(found) == 100


def test_sampled_candidates_differ_between_users_and_are_spread_evenly():
    found = candidates_found(evaluator_of(wide(), sampled=True), "test")
    assert len({frozenset(f) for f in found}) == USERS
    often = np.bincount([i for f in found for i in f], minlength=150)
    # about 30 x 99 / 140 = 21 each, standard deviation 2.5: six of these either way
    assert often.min() > 6 and often.max() < 37


def test_validation_and_test_have_samples_of_their_own():
    split = wide()
    valid, test = (candidates_found(evaluator_of(split, sampled=True), part) for part in ("valid", "test"))
    assert all(len(a & b) < 95 for a, b in zip(valid, test, strict=True))


def test_known_items_are_padded_bucket_by_bucket():
    evaluator = evaluator_of(wide(), sampled=True, buckets=3)
    split = evaluator.split
    total = sum(np.bincount(part.user, minlength=USERS) for part in (split.train, split.valid, split.test))
    for bucket, known in zip(evaluator.engine.buckets, evaluator.known, strict=True):
        users = np.asarray(bucket.user)
        assert known.shape[1] == total[users[users < USERS]].max()
        np.testing.assert_array_equal((known < split.num_items).sum(1)[users < USERS], total[users[users < USERS]])


def test_sampled_candidates_are_the_same_in_every_call_layout_and_protocol():
    split, scores = wide(), random_scores(wide(), distinct=1000)
    plain = evaluator_of(split, sampled=True)
    first = ranks_by(plain, scores)
    others = [
        ranks_by(plain, scores),
        ranks_by(evaluator_of(split, sampled=True, devices=4, buckets=3), scores),
        ranks_by(evaluator_of(split, sampled=True, protocol=UNMASKED), scores),
    ]
    for other in others:
        np.testing.assert_array_equal(other.valid, first.valid)
        np.testing.assert_array_equal(other.test, first.test)


def test_sampled_ranks_are_the_slow_evaluators_among_these_candidates():
    split, scores = wide(), random_scores(wide(), distinct=20)
    evaluator = evaluator_of(split, sampled=True)
    found = ranks_by(evaluator, scores)
    among = candidates_found(evaluator, "test")
    np.testing.assert_array_equal(found.test, slow_ranks(scores, split, among=among)["test"][0])


def test_a_small_catalogue_offers_fewer_than_99():
    split = leave_one_out()
    for user, found in enumerate(candidates_found(evaluator_of(split, sampled=True), "test")):
        assert found == competitors(split, user, "test", mask_valid=True)


def test_sampled_items_of_a_cold_split_are_cold():
    split = cold()
    for user, found in enumerate(candidates_found(evaluator_of(split, sampled=True), "test")):
        if items_of(split.test, user):
            assert found == set(np.flatnonzero(split.candidates["test"]).tolist())


# ---- methods -------------------------------------------------------------------------------------------------


ROUNDS = 2


@functools.cache
def trained(name, split="leave_one_out"):
    """An engine and its state after ROUNDS rounds."""
    engine = engine_of(SPLITS[split](), name)
    state = engine.init(KEY)
    for number in range(ROUNDS):
        state, _ = engine.round(KEY, state, number)
    return engine, state


def on_host(state):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), (state.server.shared, state.clients))


def scores_of_fedmf(engine, state):
    shared, own = on_host(state)
    return np.array(
        [
            [own["user"]["vector"][u] @ shared["item"][i] + own["user"]["bias"][u] for i in range(ITEMS)]
            for u in range(USERS)
        ]
    )


def scores_of_fedrap(engine, state):
    shared, own = on_host(state)
    weight, bias = own["head"]["weight"], own["head"]["bias"]
    return np.array(
        [
            [weight[u] @ (own["own_item"][u, i] + shared["item"][i]) + bias[u] for i in range(ITEMS)]
            for u in range(USERS)
        ]
    )


def scores_of_pfedrec(engine, state):
    """Every user tunes its head and the downloaded table on the draws of the coming round, and is served by both."""
    shared, own = on_host(state)
    config, (bucket,), (size,) = engine.method.config, engine.buckets, engine.sizes
    rate, item_rate, sampling = config.lr, config.item_lr(USERS), engine.method.sampling
    scores = np.zeros((USERS, ITEMS))

    @jax.jit
    def draw(position):
        record = jax.tree.map(lambda x: x[0], record_at(bucket, position[None], USERS, ITEMS, engine.clients.pool_size))
        key = client_key(KEY, jnp.int32(ROUNDS), record.user)
        steps = epoch_steps(sampling, size, record.length)
        return draw_local_data(key, record, sampling, size, ITEMS, engine.pool, steps, jnp.int32(ROUNDS))

    for position, user in enumerate(np.asarray(bucket.user)):
        data = oracle.data_on_host(draw(jnp.int32(position)))
        items, labels = data.rows[data.item], data.label
        table, weight, bias = shared["item"].copy(), own["head"]["weight"][user], own["head"]["bias"][user]
        for item, label, mask in zip(items, labels, data.mask > 0, strict=True):
            if not mask.any():
                continue
            item, label = item[mask], label[mask]
            error = (1 / (1 + np.exp(-(table[item] @ weight + bias))) - label) / len(item)
            weight, bias = weight - rate * error @ table[item], bias - rate * error.sum()
            error = (1 / (1 + np.exp(-(table[item] @ weight + bias))) - label) / len(item)
            for i, e in zip(item, error, strict=True):
                table[i] -= item_rate * e * weight
        scores[user] = [weight @ table[i] + bias for i in range(ITEMS)]
    return scores


METHODS = {
    "fedmf": scores_of_fedmf,
    "fedrap": scores_of_fedrap,
    "pfedrec": scores_of_pfedrec,
}


CASES = [*((name, "leave_one_out") for name in METHODS), ("pfedrec", "cold_items")]


@pytest.mark.parametrize(("name", "split"), CASES)
def test_methods_are_ranked_by_their_own_scores(name, split):
    engine, state = trained(name, split)
    expected = slow_ranks(METHODS[name](engine, state), SPLITS[split](), slack=UNDECIDED)
    found = make_evaluator(engine, SPLITS[split]()).ranks(KEY, state, ROUNDS)
    for part, (low, high) in expected.items():
        ranks, there = getattr(found, part), ~np.isnan(low)
        np.testing.assert_array_equal(there, ~np.isnan(ranks))
        assert ((low <= ranks) & (ranks <= high))[there].all(), part
        assert (low == high)[there].mean() > 0.9  # rounding leaves hardly any rank undecided
        assert len(np.unique(ranks[there])) > USERS / 4  # and there is something to tell apart


def test_evaluation_leaves_the_state_as_it_is_and_can_be_repeated():
    engine, state = trained("pfedrec")
    before = on_host(state)
    evaluator = make_evaluator(engine, leave_one_out())
    first, again = (evaluator.ranks(KEY, state, ROUNDS) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, before, on_host(state))
    np.testing.assert_array_equal(first.test, again.test)


def test_post_local_scores_what_local_tuning_made():
    """The same state, before and after tuning."""
    engine, state = trained("pfedrec")
    plain = dataclasses.replace(engine, method=engine.method._replace(evaluate_at="post_aggregate"))
    ranks = [make_evaluator(e, leave_one_out()).ranks(KEY, state, ROUNDS).test for e in (engine, plain)]
    assert (ranks[0] != ranks[1]).any()
