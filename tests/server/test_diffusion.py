"""The diffusion model: published numbers, and its loss and gradient against NumPy."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_rec.server.diffusion import Diffusion, Settings, linear_schedule, noised, posterior_mean

RELEASED = (10, 0.1, 1e-4, 0.02)
KEY = jax.random.key(3)


def test_the_schedule_is_the_released_one():
    """Eq. 6 with s = 0.1, 1e-4 .. 0.02, T = 10: numbers worked out from the released code."""
    s = linear_schedule(*RELEASED)
    np.testing.assert_allclose(s.noise**2, np.linspace(1e-5, 2e-3, 10), rtol=1e-5)
    np.testing.assert_allclose(s.signal**2 + s.noise**2, 1.0, rtol=1e-6)
    snr = [99999, 4325.9, 2210.3, 1484.1, 1117.0, 895.4, 747.1, 640.9, 561.1, 499.0]
    np.testing.assert_allclose(s.snr, snr, rtol=1e-4)
    clean = [1, 0.9567, 0.4890, 0.3285, 0.2473, 0.1983, 0.1655, 0.1420, 0.1244, 0.1107]
    noisy = [0, 0.0433, 0.5110, 0.6715, 0.7527, 0.8017, 0.8345, 0.8580, 0.8756, 0.8893]
    np.testing.assert_allclose(s.on_clean, clean, atol=6e-5)
    np.testing.assert_allclose(s.on_noisy, noisy, atol=6e-5)
    weights = [1, 95673, 2115.6, 726.2, 367.1, 221.6, 148.3, 106.2, 79.8, 62.1]
    np.testing.assert_allclose(s.weight, weights, rtol=1e-3)
    assert abs(s.weight.mean() - 9950) < 5


@pytest.mark.parametrize("settings", [RELEASED, (20, 1.0, 0.01, 0.999)])
def test_the_posterior_is_that_of_two_gaussians(settings):
    """q(x_{t-1} | x_t, x_0) by the product of q(x_t | x_{t-1}) and q(x_{t-1} | x_0), completed to a square."""
    s = linear_schedule(*settings)
    kept = s.signal.astype(float) ** 2
    for t in range(1, len(kept)):
        alpha = kept[t] / kept[t - 1]
        precision = alpha / (1 - alpha) + 1 / (1 - kept[t - 1])
        np.testing.assert_allclose(s.on_noisy[t], np.sqrt(alpha) / (1 - alpha) / precision, rtol=5e-3)
        np.testing.assert_allclose(s.on_clean[t], np.sqrt(kept[t - 1]) / (1 - kept[t - 1]) / precision, rtol=5e-3)
        np.testing.assert_allclose(s.sigma[t] ** 2, 1 / precision, rtol=5e-3)
    assert (s.on_clean[0], s.on_noisy[0], s.sigma[0]) == (1, 0, 0)


def test_beta_has_an_upper_bound():
    """A single step from no noise to nearly all of it, cut at 0.999."""
    assert abs(linear_schedule(2, 1.0, 1e-4, 0.99999).noise[-1] ** 2 - 0.999) < 1e-3


def test_noise_and_posterior_mean_are_the_formulas():
    s = linear_schedule(*RELEASED)
    rng = np.random.default_rng(0)
    clean, noise = (rng.standard_normal((4, 3)).astype(np.float32) for _ in range(2))
    step = np.array([0, 3, 9, 9])
    expected = s.signal[step, None] * clean + s.noise[step, None] * noise
    np.testing.assert_allclose(
        noised(s, jnp.asarray(clean), jnp.asarray(step), jnp.asarray(noise)), expected, rtol=1e-6
    )
    made = posterior_mean(s, jnp.int32(4), jnp.asarray(clean), jnp.asarray(noise))
    np.testing.assert_allclose(made, s.on_clean[4] * clean + s.on_noisy[4] * noise, rtol=1e-6)


# ---- one training step against NumPy -------------------------------------------------------------------------


def layer_norm(x, p):
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    return x * p["scale"] + p["bias"]


def dense(x, p):
    return x @ p["kernel"] + p.get("bias", 0.0)


def released_network(p, noisy, step, features, heads):
    """The released denoiser in float64: x_t is the query over (time, modality), nothing else."""
    frequency = 1e4 ** (-np.arange(8) / 8)
    angle = step[:, None] * frequency
    time = np.tanh(dense(np.concatenate([np.cos(angle), np.sin(angle)], 1), p["Dense_0"]))
    tokens = np.stack([time, np.tanh(dense(features, p["Dense_1"]))], 1)
    f = p["Fusion_0"]
    tokens = np.tanh(dense(tokens, f["Dense_0"]))
    q, v, k = (
        dense(layer_norm(noisy, p["LayerNorm_0"]), f["Dense_1"]),
        *(dense(tokens, f[f"Dense_{i}"]) for i in (2, 3)),
    )
    out = np.zeros_like(q)
    size = q.shape[1] // heads
    for h in range(heads):
        at = slice(h * size, (h + 1) * size)
        logits = np.einsum("nd,ntd->nt", q[:, at], k[:, :, at]) / np.sqrt(size)
        share = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        out[:, at] = np.einsum("nt,ntd->nd", share, v[:, :, at])
    hidden = layer_norm(dense(out, f["Dense_4"]) * (1 + p["gate"]), p["LayerNorm_1"])
    for i in (2, 3, 4):
        hidden = np.tanh(dense(hidden, p[f"Dense_{i}"]))
    return dense(hidden, p["Dense_5"])


@pytest.mark.parametrize(("weights", "lr"), [("snr", 1e-4), ("uniform", 1.0)])  # steps far above float32's last bit
def test_a_training_step_is_the_formulas(weights, lr):
    """Loss weights and gradient: SGD's step against central differences of a float64 loss written in NumPy."""
    decay, count, width = 1e-3, 6, 8
    settings = Settings(dropout=0.0, weights=weights, optimizer="sgd", lr=lr, weight_decay=decay)
    model = Diffusion(settings, width, 5)
    rng = np.random.default_rng(1)
    rows, features = (rng.standard_normal((count, n)).astype(np.float32) for n in (width, 5))
    state = model.init(KEY)
    after = model.train(KEY, state, jnp.asarray(rows), jnp.asarray(features))

    # the same draws: a key per epoch, then the order, then a key per batch
    k_order, k_steps = jax.random.split(jax.random.split(KEY, 1)[0])
    order = np.asarray(jax.random.permutation(k_order, count))
    k_step, k_noise, *_ = jax.random.split(jax.random.split(k_steps, 1)[0], 4)
    step = np.asarray(jax.random.randint(k_step, (count,), 0, 10))
    noise = np.asarray(jax.random.normal(k_noise, (count, width)), np.float64)
    one_minus = np.linspace(1e-5, 2e-3, 10)
    noisy = np.sqrt(1 - one_minus)[step, None] * rows[order] + np.sqrt(one_minus)[step, None] * noise
    snr = (1 - one_minus) / one_minus
    weight = np.append(1.0, snr[:-1] - snr[1:])[step] if weights == "snr" else np.ones(count)

    def loss(p):
        made = released_network(p["params"], noisy, step, features[order].astype(float), 4)
        return (weight * ((made - rows[order]) ** 2).mean(1)).mean()

    before = jax.tree.map(lambda x: np.array(x, np.float64), state["params"])
    leaves, moved, stepped = jax.tree.leaves(before), jax.tree.leaves(after["params"]), []
    for leaf, new in zip(leaves, moved, strict=True):
        for place in rng.integers(0, max(leaf.size, 1), 3):
            at = np.unravel_index(place, leaf.shape)
            value = leaf[at]
            leaf[at] = value + 1e-5
            above = loss(before)
            leaf[at] = value - 1e-5
            slope = (above - loss(before)) / 2e-5
            leaf[at] = value
            stepped.append((np.asarray(new, np.float64)[at] - value, -lr * (slope + decay * value)))
    got, expected = np.transpose(stepped)
    assert np.mean(np.abs(expected) > 1e-5) > 0.6
    # sums of float32 numbers, and a difference of two of size 1
    np.testing.assert_allclose(got, expected, rtol=2e-3, atol=5e-7)


# ---- sampling ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", [False, True])
@pytest.mark.parametrize("guided", [False, True])
def test_sampling_is_algorithm_2(noise, guided):
    settings = Settings(sampling_noise=noise, residual=True)
    if guided:
        settings = dataclasses.replace(settings, drop_condition=0.2, guidance_scale=2.0)
    model = Diffusion(settings, 4, 3)
    rng = np.random.default_rng(0)
    features = jnp.asarray(rng.standard_normal((5, 3)), jnp.float32)
    state = {**model.init(KEY), "mean": jnp.full(4, 2.0), "std": jnp.full(4, 3.0)}
    s = model.schedule
    k_start, k_noise = jax.random.split(KEY)
    x = jax.random.normal(k_start, (5, 4))
    net = lambda x, t, known: model.denoiser.apply(
        state["params"], x, jnp.full(5, t), features, jnp.full(5, known, jnp.float32)
    )
    for t in range(9, -1, -1):
        clean = net(x, t, 1)
        if guided:
            clean = 2 * clean - net(x, t, 0)
        x = s.on_clean[t] * clean + s.on_noisy[t] * x
        if noise and t > 0:
            x = x + s.sigma[t] * jax.random.normal(jax.random.fold_in(k_noise, t), x.shape)
    np.testing.assert_allclose(model.sample(KEY, state, features), 2.0 + 3.0 * x, rtol=1e-4, atol=1e-4)


PROPER = Settings(
    steps=20,
    scale=1.0,
    low=0.01,
    high=0.999,
    residual=True,
    dropout=0.0,
    lr=3e-3,
    ema=0.95,
    standardise=True,
    epochs=120,
)


def test_it_learns_the_spread_around_what_the_features_say():
    """Rows are a linear map of the features and noise of deviation 0.5: samples have that mean and that spread."""
    rng = np.random.default_rng(0)
    features = rng.standard_normal((2048, 2)).astype(np.float32)
    rows = 4.0 + features @ np.array([[1.0, 0.0], [0.0, -1.0]]) + 0.5 * rng.standard_normal((2048, 2))
    model = Diffusion(dataclasses.replace(PROPER, sampling_noise=True), 2, 2)
    state = model.train(KEY, model.init(KEY), jnp.asarray(rows, jnp.float32), jnp.asarray(features))
    wanted = np.repeat([[1.0, 0.5]], 4000, axis=0).astype(np.float32)
    made = np.asarray(model.sample(jax.random.key(1), state, jnp.asarray(wanted)))
    np.testing.assert_allclose(made.mean(0), [5.0, 3.5], atol=0.2)
    np.testing.assert_allclose(made.std(0), 0.5, atol=0.2)  # 20 steps with the posterior's variance are too narrow


def test_averaged_weights_follow_the_weights():
    model = Diffusion(dataclasses.replace(PROPER, epochs=1, ema=0.9), 3, 2)
    state = model.init(KEY)
    after = model.train(KEY, state, jnp.ones((4, 3)), jnp.ones((4, 2)))
    # the first average is nine tenths of the new weights
    jax.tree.map(
        lambda a, p, old: np.testing.assert_allclose(a, 0.1 * old + 0.9 * p, rtol=1e-5, atol=1e-6),
        after["average"],
        after["params"],
        state["params"],
    )


def test_guidance_needs_training_without_features():
    with pytest.raises(ValueError, match="set drop_condition above 0"):
        Settings(guidance_scale=2.0)


@pytest.mark.parametrize("fusion", ["attention", "mean", "concat"])
@pytest.mark.parametrize(("residual", "feat"), [(False, 3), (True, 3), (False, 0), (True, 0)])
def test_every_network_samples(fusion, residual, feat):
    model = Diffusion(Settings(fusion=fusion, residual=residual), 6, feat)
    state, features = model.init(KEY), jnp.ones((5, feat))
    trained = model.train(KEY, state, jnp.ones((5, 6)), features)
    made = np.asarray(model.sample(KEY, trained, features))
    assert made.shape == (5, 6) and np.isfinite(made).all()
    # x_t has a way in through the residual path, or as the query of an attention that has something to choose
    moved = np.asarray(model.sample(jax.random.key(4), trained, features))
    assert (np.abs(made - moved).max() > 1e-4) == (residual or (fusion == "attention" and feat > 0))
