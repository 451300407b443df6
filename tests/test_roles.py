"""The parts of local training: exact gradients, nothing moves that should not."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedjax_rec import methods, roles
from fedjax_rec.method import Batch, Listed, LocalData

ROWS = 7
REPEATED = Batch(jnp.array([3, 1, 3, 3, 5]), jnp.array([1.0, 0, 1, 0, 1]), jnp.array([1.0, 1, 1, 1, 0]))
UNTOUCHED = [0, 2, 4, 6]  # row 5 stands in a padded place only


def params():
    rng = np.random.default_rng(0)
    table = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    return {"item": table(ROWS, 3), "own_item": table(ROWS, 3), "user": {"vector": table(3), "bias": table()}}


def loss(rest, vectors, batch):
    logits = (vectors["item"] + vectors["own_item"]) @ rest["user"]["vector"] + rest["user"]["bias"]
    return roles.binary_cross_entropy(logits, batch)


def data_of(*batches: Batch, num_steps=None) -> LocalData:
    stacked = Batch(*(jnp.stack(x) for x in zip(*batches, strict=True)))
    return LocalData(
        rows=jnp.arange(ROWS),
        row_mask=jnp.ones(ROWS, bool),
        samples=Listed(stacked),
        history=jnp.arange(2),
        history_mask=jnp.ones(2, bool),
        num_samples=stacked.mask.sum(),
        num_steps=jnp.int32(len(batches) if num_steps is None else num_steps),
        round=jnp.int32(0),
    )


def assert_close(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), a, b)  # float32, a few terms


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def no_samples(batch: Batch) -> Batch:
    return batch._replace(mask=jnp.zeros_like(batch.mask))


RATES = {"item": 0.3, "own_item": 0.7, "user": 0.1}


def test_sgd_step_is_the_gradient_of_the_table_with_repeated_items():
    start = params()
    value, gradient = jax.value_and_grad(roles.on_tables(loss))(start, REPEATED)
    expected = {
        role: jax.tree.map(lambda p, g, r=rate: p - r * g, start[role], gradient[role]) for role, rate in RATES.items()
    }
    after, got = roles.sgd_step(loss, RATES)(start, REPEATED)
    assert_close(after, expected)
    assert_close(got, value)


def test_bpr_is_the_mean_over_pairs_of_a_positive_and_a_negative():
    logits = jnp.array([1.0, -2.0, 0.5, 3.0, 9.0])
    batch = Batch(jnp.arange(5), jnp.array([1.0, 0.0, 1.0, 0.0, 1.0]), jnp.array([1.0, 1.0, 1.0, 1.0, 0.0]))
    pairs = [(1.0, -2.0), (1.0, 3.0), (0.5, -2.0), (0.5, 3.0)]
    expected = np.mean([np.log1p(np.exp(n - p)) for p, n in pairs])
    np.testing.assert_allclose(roles.bayesian_personalised_ranking(logits, batch), expected, rtol=1e-6)
    alone = batch._replace(label=jnp.ones(5))
    assert roles.bayesian_personalised_ranking(logits, alone) == 0.0
    assert np.isfinite(jax.grad(roles.bayesian_personalised_ranking)(logits, alone)).all()


def test_binary_cross_entropy_is_the_mean_over_the_samples_that_are_there():
    logits = jnp.array([0.3, -2.0, 1.0, 50.0, 9.0])
    p = 1 / (1 + np.exp(-np.asarray(logits, np.float64)))[:4]
    y = np.asarray(REPEATED.label)[:4]
    # the fourth is a sure and wrong answer: -log(1 - p) = 50 is exact from logits only
    terms = np.array([-np.log(p[0]), -np.log(1 - p[1]), -np.log(p[2]), 50.0])
    assert y.tolist() == [1, 0, 1, 0]
    assert_close(roles.binary_cross_entropy(logits, REPEATED), terms.mean())
    assert roles.binary_cross_entropy(logits, no_samples(REPEATED)) == 0


@pytest.mark.parametrize("optimizer", roles.OPTIMIZERS)
@pytest.mark.parametrize("clip_norm", [None, 0.01])
@pytest.mark.parametrize("moving", [("user",), ("item",), ("own_item", "user"), ("item", "own_item", "user")])
def test_roles_without_a_rate_stay(optimizer, clip_norm, moving):
    start = params()
    train = roles.local_sgd(loss, {r: RATES[r] for r in moving}, optimizer=optimizer, clip_norm=clip_norm)
    after, _ = jax.jit(train)(start, data_of(REPEATED, REPEATED))
    for role in start:
        if role in moving:
            changed = [(x != y).any() for x, y in zip(*map(jax.tree.leaves, (start[role], after[role])), strict=True)]
            assert all(changed)
        else:
            assert_same(after[role], start[role])


@pytest.mark.parametrize("optimizer", roles.OPTIMIZERS)
@pytest.mark.parametrize("clip_norm", [None, 0.01])
def test_untouched_rows_stay_bit_for_bit(optimizer, clip_norm):
    """What makes the working set exact: no row without gradient moves, in any step."""
    start = params()
    other = Batch(jnp.array([1, 1, 3, 1, 0]), jnp.ones(5), jnp.array([1.0, 1, 1, 1, 0]))
    train = roles.local_sgd(loss, RATES, optimizer=optimizer, clip_norm=clip_norm)
    after, _ = jax.jit(train)(start, data_of(REPEATED, other, no_samples(other), REPEATED))
    for role in ("item", "own_item"):
        assert_same(after[role][jnp.array(UNTOUCHED)], start[role][jnp.array(UNTOUCHED)])
        assert_same(after[role][5], start[role][5])
        assert (after[role][jnp.array([1, 3])] != start[role][jnp.array([1, 3])]).all()


@pytest.mark.parametrize("optimizer", roles.OPTIMIZERS)
def test_steps_without_samples_change_nothing(optimizer):
    """Also not through momentum: a client that is padded with empty steps ends where it would without them."""
    train = jax.jit(roles.local_sgd(loss, RATES, optimizer=optimizer))
    plain = train(params(), data_of(REPEATED, REPEATED))
    padded = train(params(), data_of(REPEATED, no_samples(REPEATED), REPEATED, no_samples(REPEATED)))
    assert_close(padded, plain)


def test_an_empty_step_skips_whatever_the_optimiser_does():
    """Weight decay moves a parameter even without a gradient; the step count must not move either."""
    init, step = roles.optax_step(roles.on_tables(loss), optax.adamw(0.1, weight_decay=0.5))
    carry = (params(), init(params()))
    after, value = step(carry, no_samples(REPEATED))
    assert_same(after, carry)
    assert value == 0


def test_optax_sgd_is_sgd_step():
    one = roles.local_sgd(loss, RATES)
    transform = roles.by_role({role: optax.sgd(rate) for role, rate in RATES.items()})
    init, step = roles.optax_step(roles.on_tables(loss), transform)
    data = data_of(REPEATED, REPEATED)
    (after, _), value = roles.run_steps(step, (params(), init(params())), data)
    assert_close(one(params(), data), (after, value))


def test_only_num_steps_are_run():
    train = roles.local_sgd(loss, RATES)
    assert_same(train(params(), data_of(REPEATED, REPEATED, num_steps=1)), train(params(), data_of(REPEATED)))


def test_loss_is_the_mean_over_samples_not_over_steps():
    short = REPEATED._replace(mask=jnp.array([1.0, 0, 0, 0, 0]))
    frozen = roles.local_sgd(loss, {})
    _, got = frozen(params(), data_of(REPEATED, short))
    each = [float(roles.on_tables(loss)(params(), batch)) for batch in (REPEATED, short)]
    assert_close(got, jnp.float32((4 * each[0] + each[1]) / 5))


def norm_of_change(after, before, moving) -> float:
    change = roles.difference(after, before, tuple(moving))
    return float(optax.tree.norm(change))


def test_clip_norm_sums_repeated_items_first():
    start, limit = params(), 0.05
    gradient = jax.grad(roles.on_tables(loss))(start, REPEATED)
    norm = float(optax.tree.norm(gradient))
    assert norm > limit
    after, _ = roles.local_sgd(loss, dict.fromkeys(RATES, 1.0), clip_norm=limit)(start, data_of(REPEATED))
    assert_close(after, jax.tree.map(lambda p, g: p - g * limit / norm, start, gradient))


def test_clip_norm_counts_only_what_trains():
    """A role without a rate has no gradient to clip: its size must not slow the others down."""
    start, limit = params(), 0.05
    after, _ = roles.local_sgd(loss, {"user": 1.0}, clip_norm=limit)(start, data_of(REPEATED))
    assert norm_of_change(after, start, ["user"]) == pytest.approx(limit, rel=1e-4)  # float32


def test_restrict_and_put_rows_are_inverse_and_drop_padding():
    start = params()
    rows = jnp.array([5, 0, ROWS, ROWS])
    mine = roles.restrict(start, rows)
    assert_same(mine["user"], start["user"])
    assert_same(mine["item"][:2], start["item"][jnp.array([5, 0])])
    changed = roles.put_rows(start["item"], rows, mine["item"] + 1)
    assert_same(np.flatnonzero((changed != start["item"]).any(1)), np.array([0, 5]))


def test_l2_of_matrix_factorisation_shrinks_what_a_sample_reads():
    """One step with and without it: the user by 2 l2 p, a row by 2 l2 q times its share of the samples."""
    start = {"item": params()["item"], "user": params()["user"]}
    data, after = data_of(REPEATED), {}
    for l2 in (0.0, 0.25):
        method = methods.build("fedmf", 4, ROWS, dim=3, lr=0.1, item_lr_scale=0.5, l2=l2)
        after[l2], *_ = method.local_update(jax.random.key(0), {}, start, data)
    moved = jax.tree.map(jnp.subtract, after[0.25], after[0.0])
    share = np.array([0, 1, 0, 3, 0, 0, 0])[:, None] / 4
    assert_close(moved["user"], {"vector": -0.1 * 0.5 * start["user"]["vector"], "bias": jnp.zeros(())})
    assert_close(moved["item"], -(0.1 * 0.5 * 4) * 0.5 * share * start["item"])
