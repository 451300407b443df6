"""PLGC: the coefficient, the frozen table, the contrast, and what is left when both are switched off."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from test_laws import KEY, SMALL, TOWER, assert_same, on_host, split

from fedjax_rec import methods, spectrum
from fedjax_rec.data import clients
from fedjax_rec.method import Batch, Listed, LocalData
from fedjax_rec.methods import plgc
from fedjax_rec.rounds import make_engine

USERS, ITEMS = 41, 200
BACKBONES = plgc.BACKBONES
OFF = {"mixing": "constant", "coefficient": 1.0, "contrast_weight": 0.0}
RATES = {"server_lr": 1.0, "client_init": "random", "evaluate_at": "post_aggregate"}


def build(name, backbone, **settings):
    own = TOWER if backbone == "fedncf" else {}
    if name == "plgc":
        own = {**own, "backbone": backbone}
    return methods.build(name, USERS, ITEMS, **{**SMALL, **RATES, **own, **settings})


def engine(method):
    return make_engine(method, clients.build(split(), max_buckets=1, num_devices=1))


def play(method, rounds=3):
    """State and infos after some rounds of everybody."""
    machine = engine(method)
    state, infos = machine.init(KEY), []
    for number in range(rounds):
        state, info = machine.round(KEY, state, number)
        infos.append(info)
    return on_host(machine, state), infos


def start(method):
    machine = engine(method)
    return on_host(machine, machine.init(KEY))


# ---- the coefficient ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "backbone, settings",
    [
        ("fedmf", {"normalise": True}),
        ("pfedrec", {}),
        ("pfedrec", {"top_eigenvalues": 2}),
        ("fedncf", {"kernel": "network", "centre": False}),
    ],
)
def test_a_half_at_the_start(backbone, settings):
    method = build("plgc", backbone, **settings)
    assert_same(start(method).clients["own_item"][7], start(method).server.shared["item"])
    state, (info,) = play(method, 1)
    held = state.clients["mixing"]
    trained = held["rounds"] == 1
    assert trained.sum() == USERS - 1  # one user has no training item
    np.testing.assert_array_equal(held["sum"][trained], np.float32(0.5))
    assert info["mixing"] == 0.5


@pytest.mark.parametrize("backbone", ["pfedrec", "fedncf"])
def test_it_moves_with_the_tables_and_keeps_to_its_bounds(backbone):
    state, infos = play(build("plgc", backbone, lambda_min=0.3, lambda_max=0.6, lr=0.5), 4)
    held = state.clients["mixing"]
    mean = held["sum"] / np.maximum(held["rounds"], 1)
    assert mean[:-1].std() > 1e-4
    assert all(0.3 <= info["mixing"] <= 0.6 for info in infos)


def test_the_clip_is_the_kernels_alone():
    for value in (0.0, 0.01, 1.0):
        config = plgc.Config(mixing="constant", coefficient=value)
        assert plgc.coefficient({}, config) == value
    config = plgc.Config()
    held = lambda value: {"mixing": {"sum": jnp.float32(value * 2), "rounds": jnp.float32(2)}}
    assert plgc.coefficient(held(0.01), config) == np.float32(0.05)
    assert plgc.coefficient(held(0.99), config) == np.float32(0.95)
    assert plgc.coefficient(held(0.3), config) == np.float32(0.3)


def test_a_replaced_table_stays_at_a_half():
    _, infos = play(build("plgc", "pfedrec", table="replaced"))
    assert [float(info["mixing"]) for info in infos] == [0.5] * 3


def test_the_trace_of_a_linear_scorer_is_that_of_its_rows():
    config = plgc.Config(backbone="fedmf", dim=4)
    client = plgc._client(config)
    params = client.model.init(KEY)
    table = jax.random.normal(jax.random.key(1), (9, 4))
    features = plgc.tangent_features(client, params, table, config)
    mask = jnp.array([1.0] * 6 + [0.0] * 3)
    rows = np.asarray(table)[:6]
    kernel = (rows - rows.mean(0)) @ (rows - rows.mean(0)).T
    np.testing.assert_allclose(plgc.spread(features, mask), np.trace(kernel) / 6, rtol=1e-5)
    largest = np.linalg.eigvalsh(kernel)[-2:].sum() / 6
    np.testing.assert_allclose(plgc.spread(features, mask, top=2), largest, rtol=1e-5)
    plain = np.trace(rows @ rows.T) / 6
    np.testing.assert_allclose(plgc.spread(features, mask, centre=False), plain, rtol=1e-5)


def test_the_output_layers_kernel_is_that_of_the_hidden_features():
    config = plgc.Config(backbone="fedncf", dim=4, layers=(8, 3), branches="mlp", user_init_std=1.0)
    client = plgc._client(config)
    params = client.model.init(KEY)
    table = jax.random.normal(jax.random.key(1), (9, 4))
    features = plgc.tangent_features(client, params, table, config)
    x = np.concatenate([np.tile(params["user"][None], (9, 1)), table], axis=1)
    for layer in params["network"]["tower"]["params"].values():
        x = np.maximum(x @ layer["kernel"] + layer["bias"], 0)
    np.testing.assert_allclose(features, x, rtol=1e-5, atol=1e-6)
    whole = plgc.tangent_features(client, params, table, plgc.Config(**{**vars(config), "kernel": "network"}))
    weights = sum(x.size for x in jax.tree.leaves(params))
    assert whole.shape == (9, weights)


def test_the_kernel_of_the_probability_weighs_rows():
    config = plgc.Config(backbone="fedmf", dim=4, probability=True, user_init_std=1.0)
    client = plgc._client(config)
    params, table = client.model.init(KEY), jax.random.normal(jax.random.key(1), (9, 4))
    p = np.asarray(jax.nn.sigmoid(client.model.predict(params, table)))
    expected = (p * (1 - p))[:, None] * np.asarray(table)
    np.testing.assert_allclose(plgc.tangent_features(client, params, table, config), expected, rtol=1e-5, atol=1e-6)


# ---- the frozen table --------------------------------------------------------------------------------------


def test_the_global_table_gets_no_gradient():
    local, frozen = jax.random.normal(KEY, (2, 12, 4))
    grad_local, grad_frozen = jax.grad(lambda a, b: (plgc.mix(0.3, a, b) ** 2).sum(), argnums=(0, 1))(
        jnp.asarray(local), jnp.asarray(frozen)
    )
    assert not np.any(grad_frozen)
    np.testing.assert_allclose(grad_local, 0.3 * 2 * plgc.mix(0.3, jnp.asarray(local), jnp.asarray(frozen)), rtol=1e-6)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_training_leaves_the_global_table(optimizer):
    method = build("plgc", "fedmf", optimizer=optimizer, contrast_weight=0.1)

    def local_update(key, shared, params, data):
        after, update, info = method.local_update(key, shared, params, data)
        moved = lambda role: jnp.abs(after[role] - params[role]).max()
        return after, update, {**info, "moved_global": moved("item"), "moved_local": moved("own_item")}

    machine = engine(method._replace(local_update=local_update))
    _, info = machine.round(KEY, machine.init(KEY), 0)
    assert info["moved_global"] == 0
    assert info["moved_local"] > 0


@pytest.mark.parametrize("backbone", ["pfedrec"])
def test_the_server_holds_the_mean_of_the_clients_tables(backbone):
    state, _ = play(build("plgc", backbone))
    mean = state.clients["own_item"].mean(0, dtype=np.float64)
    np.testing.assert_allclose(state.server.shared["item"], mean, rtol=1e-4, atol=2e-6)


# ---- switched off ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backbone", BACKBONES)
def test_replaced_without_mixing_is_the_backbone(backbone):
    base, base_infos = play(build(backbone, backbone))
    ours, infos = play(build("plgc", backbone, table="replaced", **OFF))
    assert_same(ours.server.shared, base.server.shared)
    assert_same(ours.clients, base.clients)
    assert_same([i["loss"] for i in infos], [i["loss"] for i in base_infos])


@pytest.mark.parametrize("backbone", BACKBONES)
def test_persistent_without_mixing_is_local_training(backbone):
    """Of the item table: FedNCF's network is averaged all the same."""
    base = build(backbone, backbone)

    def upload(key, shared, params, update, data):
        own, sent = base.upload(key, shared, params, update, data)
        return {**own, "own_item": params["item"]}, sent

    local_only = base._replace(
        init_client=lambda key, shared: {**base.init_client(key, shared), "own_item": shared["item"]},
        download=lambda shared, mail, own, data: {
            **base.download(shared, mail, {r: v for r, v in own.items() if r != "own_item"}, data),
            "item": own["own_item"],
        },
        upload=upload,
    )
    alone, alone_infos = play(local_only)
    ours, infos = play(build("plgc", backbone, **OFF))
    # two programs: the compiler may order a sum in each as it likes
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)
    jax.tree.map(close, ours.clients, alone.clients)
    close([i["loss"] for i in infos], [i["loss"] for i in alone_infos])


# ---- the contrast ------------------------------------------------------------------------------------------


def test_contrast_is_its_formula_on_the_samples_that_are_there():
    a, b = np.asarray(jax.random.normal(KEY, (2, 12, 4)), np.float64)
    mask = np.array([1.0] * 9 + [0.0] * 3)
    standard = lambda x: (x - x.mean(0)) / x.std(0)
    c = standard(a[:9]).T @ standard(b[:9]) / 9
    expected = (((1 - np.diag(c)) ** 2).sum() + 0.3 * ((c**2).sum() - (np.diag(c) ** 2).sum())) / 4
    value = plgc.contrast(jnp.float32(a), jnp.float32(b), jnp.float32(mask), 0.3)
    np.testing.assert_allclose(value, expected, rtol=1e-5)


def test_contrast_has_the_gradient_of_finite_differences():
    a, b = jax.random.normal(KEY, (2, 12, 4))
    mask = jnp.array([1.0] * 9 + [0.0] * 3)
    check_grads(
        lambda x: plgc.contrast(jnp.asarray(x), b, mask, 0.3),
        (a,),
        order=1,
        modes=("rev",),
        eps=1e-2,
        atol=1e-2,
        rtol=1e-2,
    )
    gradient = jax.grad(plgc.contrast)(a, b, mask, 0.3)
    assert not np.any(gradient[9:])


def test_contrast_skips_small_batches_and_survives_constant_columns():
    a, b = jax.random.normal(KEY, (2, 12, 4))
    few = jnp.array([1.0] * 7 + [0.0] * 5)
    assert plgc.contrast(a, b, few, 0.3) == 0
    assert not np.any(jax.grad(plgc.contrast)(a, b, few, 0.3))
    for mask in (few * 0, jnp.ones(12)):
        assert np.isfinite(jax.grad(plgc.contrast)(a * 0, b * 0, mask, 0.3)).all()


def test_contrast_raises_the_effective_rank():
    """Gradient descent on the contrast of a nearly flat table with itself."""
    line = jax.random.normal(KEY, (40, 1)) * jnp.ones((1, 6))
    table = line + 0.1 * jax.random.normal(jax.random.key(1), (40, 6))
    before = spectrum.effective_rank(spectrum.singular_spectrum(table)), spectrum.redundancy(table)
    step = jax.jit(jax.grad(lambda x: plgc.contrast(x, x, jnp.ones(40), 1.0)))
    for _ in range(200):
        table = table - 2.0 * step(table)
    after = spectrum.effective_rank(spectrum.singular_spectrum(table)), spectrum.redundancy(table)
    assert after[0] > before[0] + 1 and after[1] < 0.5 * before[1]


# ---- diagnostics and settings ------------------------------------------------------------------------------


def test_effective_rank_of_known_tables():
    assert np.isclose(spectrum.effective_rank(spectrum.singular_spectrum(jnp.eye(5))), 5)
    assert np.isclose(spectrum.effective_rank(spectrum.singular_spectrum(jnp.ones((7, 5)))), 1, atol=1e-3)
    assert spectrum.effective_rank(jnp.zeros(3)) == 0
    assert spectrum.singular_spectrum(jnp.ones((2, 5))).shape == (5,)
    table = jax.random.normal(KEY, (50, 3))
    correlation = np.abs(np.corrcoef(np.asarray(table).T))
    np.testing.assert_allclose(spectrum.redundancy(table), (correlation.sum() - 3) / 6, rtol=1e-4)


def test_explain_reports_coefficient_and_spectra():
    method = build("plgc", "pfedrec")
    state, _ = play(method, 2)
    own = jax.tree.map(lambda x: jnp.asarray(x[0]), state.clients)
    shared = jax.tree.map(jnp.asarray, state.server.shared)
    said = method.explain(shared, method.download(shared, (), own, None), None)
    assert 0 < said["mixing"] < 1
    for kind in ("global", "local", "mixed"):
        assert said[f"spectrum_{kind}"].shape == (4,)
        assert 1 <= said[f"effective_rank_{kind}"] <= 4
        assert 0 <= said[f"redundancy_{kind}"] <= 1


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"backbone": "fedrap"}, "expected one of fedmf, fedncf, pfedrec"),
        ({"table": "persist"}, "did you mean persistent"),
        ({"coefficient": 1.5}, "coefficient=1.5"),
        ({"lambda_min": 0.97}, "lambda_min=0.97"),
        ({"backbone": "pfedrec", "optimizer": "adam"}, "expected one of sgd"),
        ({"backbone": "fedncf", "kernel": "network", "top_eigenvalues": 3}, "set kernel=last_layer"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        plgc.Config(**settings)


def test_touched_marks_the_samples_and_nothing_else():
    batches = Batch(jnp.array([[0, 3], [3, 5]]), jnp.ones((2, 2)), jnp.array([[1.0, 1.0], [1.0, 0.0]]))
    data = LocalData(
        rows=jnp.arange(6),
        row_mask=jnp.ones(6, bool),
        samples=Listed(batches),
        history=jnp.array([0]),
        history_mask=jnp.ones(1, bool),
        num_samples=jnp.ones(()),
        num_steps=jnp.int32(2),
        round=jnp.int32(0),
    )
    np.testing.assert_array_equal(plgc.touched(data), [1, 0, 0, 1, 0, 0])
