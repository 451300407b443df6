"""FedDAE: the posterior, beta's schedules, and what a client keeps of its first layers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_laws import KEY, OWN, SMALL, on_host, split

from fedjax_rec import methods
from fedjax_rec.data import clients
from fedjax_rec.method import Batch, Listed, LocalData
from fedjax_rec.methods import feddae
from fedjax_rec.rounds import make_engine

USERS, ITEMS = 41, 200
SETTINGS = {"dim": 3, "layers": (5, 4), "gate_width": 4, "init_std": 0.3, "history_rows": 6}


def client(config: feddae.Config, items, width=4, num_items=9):
    """(params, data) of a client with the given history, padded to `width`."""
    method = feddae.feddae(config, 2, num_items)
    shared = method.init_server(KEY).shared
    history = np.zeros(width, np.int32)
    history[: len(items)] = items
    data = LocalData(
        rows=jnp.arange(num_items),
        row_mask=jnp.ones(num_items, bool),
        samples=Listed(Batch(jnp.zeros((1, 1), jnp.int32), jnp.zeros((1, 1)), jnp.zeros((1, 1)))),
        history=jnp.asarray(history),
        history_mask=jnp.arange(width) < len(items),
        num_samples=jnp.float32(2 * len(items)),
        num_steps=jnp.int32(1),
        round=jnp.int32(3),
    )
    return method, shared, {**shared, **method.init_client(jax.random.key(1), shared)}, data


def test_posterior_and_scores_are_the_dense_formulas():
    """With x over the catalogue and first layers [items, width], in NumPy."""
    config = feddae.Config(**SETTINGS)
    method, shared, params, data = client(config, [2, 5, 7])
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    x = np.zeros(9)
    x[[2, 5, 7]] = 1 / np.sqrt(3)
    full = lambda rows: np.stack([np.zeros(rows.shape[1])] * 9)
    own_first, gate_first = full(p["own_encoder"]["rows"]), full(p["gate"]["rows"])
    own_first[[2, 5, 7]], gate_first[[2, 5, 7]] = p["own_encoder"]["rows"][:3], p["gate"]["rows"][:3]

    def encode(encoder, first):
        h = np.tanh(x @ first + encoder["bias"])
        one, two = encoder["rest"]
        out = np.tanh(h @ one["kernel"] + one["bias"]) @ two["kernel"] + two["bias"]
        return out[:3], np.exp(out[3:])

    (mean_l, var_l), (mean_g, var_g) = encode(p["own_encoder"], own_first), encode(p["encoder"], p["item"]["input"])
    logits = np.maximum(x @ gate_first + p["gate"]["bias"], 0) @ p["gate"]["out"][0]["kernel"]
    a, b = np.exp(logits) / np.exp(logits).sum()
    mean, variance, gate = feddae.posterior(params, data, config)
    np.testing.assert_allclose(gate, [a, b], rtol=1e-5)
    np.testing.assert_allclose(mean, a * mean_l + b * mean_g, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(variance, a**2 * var_l + b**2 * var_g, rtol=1e-4)
    h = np.asarray(mean, np.float64)
    for layer in p["decoder"]:
        h = np.tanh(h @ layer["kernel"] + layer["bias"])
    scores = method.score(shared, params, data)
    np.testing.assert_allclose(scores, p["item"]["output"] @ h + p["item"]["output_bias"], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(method.explain(shared, params, data)["gate"], gate)


def test_the_objective_is_the_multinomial_likelihood_and_the_divergence(monkeypatch):
    config = feddae.Config(**SETTINGS, dropout=0.0, beta=0.7)
    _, _, params, data = client(config, [2, 5, 7])
    mean, variance, _ = (np.asarray(x, np.float64) for x in feddae.posterior(params, data, config))
    noise = jax.random.normal(jax.random.split(KEY)[1], (3,))
    scores = np.asarray(feddae.decode(params, jnp.float32(mean + np.sqrt(variance) * noise)), np.float64)
    likelihood = (scores - np.log(np.exp(scores).sum()))[[2, 5, 7]].sum()
    divergence = 0.5 * (variance + mean**2 - 1 - np.log(variance)).sum()
    expected = 0.7 * np.tanh(0.3) * divergence - likelihood
    np.testing.assert_allclose(feddae.objective(params, data, config, KEY), expected, rtol=1e-4)


def test_schedules_of_beta():
    at = lambda schedule: [
        float(feddae.beta_at(feddae.Config(beta=2.0, beta_schedule=schedule), jnp.int32(t))) for t in (0, 1, 10)
    ]
    np.testing.assert_allclose(at("paper"), [0, 2 * np.tanh(0.1), 2 * np.tanh(1.0)], rtol=1e-6)
    assert at("released") == [2, 0, 0]
    assert at("constant") == [2, 2, 2]


def test_only_rows_of_the_history_move():
    config = feddae.Config(**SETTINGS, dropout=0.5, local_epochs=30)
    method, shared, params, data = client(config, [2, 5, 7])
    after, update, info = method.local_update(KEY, shared, params, data)
    for kept in ("own_encoder", "gate"):
        moved = np.any(np.asarray(after[kept]["rows"] != params[kept]["rows"]), axis=1)
        assert moved.tolist() == [True] * 3 + [False] * 3
    assert np.flatnonzero(np.any(np.asarray(update["item"]["input"]), axis=1)).tolist() == [2, 5, 7]
    assert np.all(np.any(np.asarray(update["item"]["output"]), axis=1))  # the softmax is over the catalogue
    assert set(update) == {"item", "encoder", "decoder"}
    assert np.isfinite(info["loss"])


@pytest.mark.parametrize("encoders, still", [("shared", ("own_encoder", "gate")), ("private", ("encoder", "gate"))])
def test_an_encoder_left_out_does_not_move(encoders, still):
    config = feddae.Config(**SETTINGS, encoders=encoders)
    method, shared, params, data = client(config, [2, 5, 7])
    after, *_ = method.local_update(KEY, shared, params, data)
    for role in still:
        jax.tree.map(np.testing.assert_array_equal, after[role], params[role])
    expected = [0, 1] if encoders == "shared" else [1, 0]
    np.testing.assert_array_equal(method.explain(shared, params, data)["gate"], expected)


def test_padding_of_the_history_changes_nothing():
    """The same client in a wider bucket, under dropout."""
    config = feddae.Config(**SETTINGS)
    results = []
    for width in (3, 6):
        method, shared, params, data = client(config, [2, 5, 7], width=width)
        results.append(method.local_update(KEY, shared, params, data)[1])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), *results)


def test_a_history_that_does_not_fit_is_refused_with_the_number_to_set():
    method = methods.build("feddae", USERS, ITEMS, **{**SMALL, **OWN["feddae"], "history_rows": 4})
    population = clients.build(split(), max_buckets=2, num_devices=1)
    shorter, longest = (bucket.history.shape[1] for bucket in population.buckets)
    assert 4 < shorter < longest
    with pytest.raises(ValueError, match=rf"set history_rows={longest}\b"):
        make_engine(method, population)


def test_it_learns_what_users_took():
    method = methods.build("feddae", USERS, ITEMS, **{**SMALL, **OWN["feddae"], "lr": 0.02})
    machine = make_engine(method, clients.build(split(), max_buckets=1, num_devices=1))
    state, losses = machine.init(KEY), []
    for number in range(40):
        state, info = machine.round(KEY, state, number)
        losses.append(float(info["loss"]))
    assert losses[-1] < 0.9 * losses[0]
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(on_host(machine, state)))


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"beta_schedule": "papers"}, "did you mean paper"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"client_init": "shared"}, "expected one of random"),
        ({"history_rows": 0}, "history_rows=0"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        feddae.Config(**settings)
