"""Methods that make rows for cold items: where the rows come from, IFedRec's pull, what is refused."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from fedjax_rec import methods, run
from fedjax_rec.client_step import client_key, record_at, streams
from fedjax_rec.data import clients, splits, synthetic
from fedjax_rec.data.features import Features, align
from fedjax_rec.evaluate import catalogue_data
from fedjax_rec.item_sources import Catalogue, catalogue_of, features_of
from fedjax_rec.item_sources.cold import conditions, nearest_warm, neighbour_means, ridge_map, warm_and_cold
from fedjax_rec.method import Aggregate
from fedjax_rec.methods import mdifffr
from fedjax_rec.reference import stacked_features
from fedjax_rec.rounds import make_engine

USERS, ITEMS, KEY = 12, 60, jax.random.key(2)
SMALL = {"dim": 4, "batch_size": 16, "negatives": 2}
CASES = {
    "mdifffr": {"condition_dim": 5, "lr": 0.1},
    "light_mdifffr": {"condition_dim": 5, "backbone": "fedncf", "preset": "proper", "lr": 0.1},
    "ipfedrec": {"condition_dim": 5, "reg": 0.1},
    "ifedncf": {"condition_dim": 5, "reg": 0.04, "user_lr_scale": 1.0, "user_init_std": 0.1},
    "cs_fcf": {"cold": "map"},
    "cs_fedncf": {"neighbours": 3, "lr": 0.1},
}


def split():
    return splits.cold_items(synthetic.make(USERS, ITEMS, min_history=4, median_history=9, max_history=20).interactions)


def features():
    return np.random.default_rng(5).standard_normal((ITEMS, 7)).astype(np.float32)


def built(name, values, **settings):
    catalogue = Catalogue({"text": values}, split().candidates["train"])
    return methods.build(name, USERS, ITEMS, catalogue, **{**SMALL, **CASES[name], **settings})


def scores(method, state, user=0):
    """The user's logits under the server's present state."""
    population = clients.build(split(), max_buckets=1)
    bucket = jax.tree.map(jnp.asarray, population.buckets[0])
    record = record_at(bucket, jnp.array([user]), USERS, ITEMS, population.pool_size)
    data = catalogue_data(jax.tree.map(lambda x: x[0], record), ITEMS, jnp.int32(0))
    shared = method.publish(KEY, state.server)
    own = jax.tree.map(lambda x: x[user], state.clients)
    return np.asarray(method.score(shared, method.download(shared, (), own, data), data))


@pytest.mark.parametrize("case", CASES)
def test_cold_rows_come_from_features(case):
    """After two rounds: another feature row for one cold item changes that item's score and no warm one."""
    method = built(case, features())
    engine = make_engine(method, clients.build(split(), max_buckets=1))
    state = engine.init(KEY)
    for round_ in range(2):
        state, _ = engine.round(KEY, state, round_)
    cold = np.flatnonzero(~split().candidates["train"])
    values = features()
    values[cold[0]] *= -1
    before, after = scores(method, state), scores(built(case, values), state)
    changed = np.flatnonzero(before != after)
    assert changed.tolist() == [cold[0]]


@pytest.mark.parametrize("case", CASES)
def test_cold_rows_learn(case):
    """What is made depends on what the clients trained (the same key, states of two lengths of training)."""
    method = built(case, features())
    engine = make_engine(method, clients.build(split(), max_buckets=1))
    state = engine.init(KEY)
    cold = np.flatnonzero(~split().candidates["train"])
    before = np.asarray(method.publish(KEY, state.server)["item"])[cold]
    state, _ = engine.round(KEY, state, 0)
    after = np.asarray(method.publish(KEY, state.server)["item"])[cold]
    assert np.abs(before - after).max(1).min() > 0


@pytest.mark.parametrize("case", [*CASES, "fedvlr"])
def test_who_has_the_cold_items_changes_nothing_in_training(case):
    """Every bit of the model is as it is where other users have the cold items."""
    one = split()

    def dealt(pairs):
        user = (pairs.user + 1) % USERS
        order = np.lexsort((pairs.item, user))
        return splits.Pairs(user[order], pairs.item[order])

    other = dataclasses.replace(one, valid=dealt(one.valid), test=dealt(one.test))
    settings = {**SMALL, **CASES.get(case, {})}
    method = methods.build(case, USERS, ITEMS, Catalogue({"text": features()}, one.candidates["train"]), **settings)
    trained = []
    for held in (one, other):
        engine = make_engine(method, clients.build(held, max_buckets=1))
        state = engine.init(KEY)
        for round_ in range(2):
            state, _ = engine.round(KEY, state, round_)
        trained.append(jax.tree.leaves(jax.tree.map(np.asarray, (state.server, state.clients, state.mail))))
    for mine, theirs in zip(*trained, strict=True):
        np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize("backbone", ["fcf", "fedavg", "fedrap"])
def test_warm_items_are_trained_as_by_the_backbone(backbone):
    settings = {**SMALL, "lr": 3.0, "item_lr_scale": 0.5, "init_std": 0.1}
    plain = methods.build(backbone, USERS, ITEMS, **settings)
    over = built("mdifffr", features(), **settings, backbone=backbone)
    population, warm = clients.build(split(), max_buckets=1), np.flatnonzero(split().candidates["train"])
    engines = [make_engine(method, population) for method in (plain, over)]
    alone, beside = (engine.init(KEY) for engine in engines)
    server = dataclasses.replace(beside.server, shared=jax.tree.map(jnp.copy, alone.server.shared))
    beside = dataclasses.replace(beside, server=server)
    for round_ in range(2):
        alone, _ = engines[0].round(KEY, alone, round_)
        beside, _ = engines[1].round(KEY, beside, round_)
    rows = [np.asarray(state.server.shared["item"])[warm] for state in (alone, beside)]
    np.testing.assert_allclose(rows[0], rows[1], rtol=1e-5, atol=1e-7)
    assert np.abs(rows[0] - np.asarray(engines[0].init(KEY).server.shared["item"])[warm]).max() > 1e-3
    for mine, theirs in zip(jax.tree.leaves(alone.clients), jax.tree.leaves(beside.clients), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-7)
    cold = np.flatnonzero(~split().candidates["train"])
    assert np.ptp(scores(over, beside)[cold]) > 0


@pytest.mark.parametrize("case", CASES)
def test_clients_hold_nothing_of_the_catalogues_size(case):
    """Dense pull and generation included: never clients x items x width."""

    def held(items):
        warm = np.arange(items) < items // 2
        catalogue = Catalogue({"text": np.random.default_rng(5).standard_normal((items, 7)).astype(np.float32)}, warm)
        method = methods.build(case, USERS, items, catalogue, **{**SMALL, **CASES[case]})
        shared = jax.eval_shape(lambda key: method.publish(key, method.init_server(key)), KEY)
        client = jax.eval_shape(method.init_client, KEY, shared)
        return sum(x.size for x in jax.tree.leaves(client))

    assert held(60) == held(600) > 0


@pytest.mark.parametrize("guidance", ["none", "zero", "random"])
@pytest.mark.parametrize("neighbours", [0, 3])
def test_ablated_guidance_knows_nothing_of_the_item(guidance, neighbours):
    cold = np.flatnonzero(~split().candidates["train"])
    values = features()
    values[cold] *= -1
    made = [built("mdifffr", v, guidance=guidance, neighbours=neighbours) for v in (features(), values)]
    rows = [method.publish(KEY, method.init_server(KEY))["item"] for method in made]
    np.testing.assert_array_equal(*rows)


def test_rows_without_guidance_are_equal_unless_noise_has_a_way_in():
    cold = np.flatnonzero(~split().candidates["train"])
    for residual in (False, True):
        method = built("mdifffr", features(), preset="proper", guidance="none", residual=residual)
        rows = np.asarray(method.publish(KEY, method.init_server(KEY))["item"])[cold]
        assert (rows.std(0).max() > 0.01) == residual


def test_light_trains_every_second_round():
    method = built("light_mdifffr", features())
    engine = make_engine(method, clients.build(split(), max_buckets=1))
    state, steps = engine.init(KEY), []
    for round_ in range(4):
        state, _ = engine.round(KEY, state, round_)
        steps.append(int(state.server.private["maker"]["steps"]))
    assert steps == [1, 1, 2, 2]


def test_presets_set_defaults_that_settings_replace():
    chosen = methods.make_config("mdifffr", {"preset": "released", "loss_weights": "uniform"})
    assert (chosen.diffusion_optimizer, chosen.diffusion_lr, chosen.loss_weights) == ("sgd", 1e-4, "uniform")
    assert methods.make_config("light_mdifffr", {"preset": "proper"}).train_every == 2
    again = methods.make_config("mdifffr", dataclasses.asdict(mdifffr.PRESETS["proper"]))
    assert again == mdifffr.PRESETS["proper"]
    with pytest.raises(ValueError, match="preset='propper': expected one of paper, released, proper"):
        methods.make_config("mdifffr", {"preset": "propper"})


@pytest.mark.parametrize(
    ("setting", "value", "expected"),
    [
        ("diffusion_lr", 0.0, "diffusion_lr=0.0: expected a number > 0"),
        ("diffusion_batch", 0, "diffusion_batch=0: expected a number > 0"),
        ("diffusion_optimizer", "sdg", "diffusion_optimizer='sdg': expected one of sgd, adam, adamw"),
        ("loss_weights", "snrr", "loss_weights='snrr': expected one of uniform, snr"),
        ("server_epochs", 0, "server_epochs=0"),
        ("diffusion_steps", 0, "diffusion_steps=0"),
        ("diffusion_decay", -1.0, "diffusion_decay=-1.0"),
        ("noise_high", 20.0, r"noise_scale \* noise_high=2.0: expected a number in"),
        ("guidance_scale", 2.0, "guidance_scale=2.0 with drop_condition=0"),
    ],
)
def test_bad_settings_of_the_diffusion_are_called_as_they_were_given(setting, value, expected):
    with pytest.raises(ValueError, match="^" + expected):
        methods.make_config("mdifffr", {setting: value})


# ---- IFedRec -------------------------------------------------------------------------------------------------


def test_a_pull_that_overshoots_is_refused_with_a_value_that_does_not():
    with pytest.raises(ValueError, match=r"stability limit is 2\*reg\*lr\*eta/dim <= 1, and here it is 2.5 .*most 4"):
        methods.make_config("ipfedrec", {"reg": 10.0})
    assert methods.make_config("ipfedrec", {"reg": 4.0}).reg == 4.0
    with pytest.raises(ValueError, match="stability limit"):  # the rate that does not come from eta
        built("ipfedrec", features(), eta=0.0, reg=1e6)


@pytest.mark.parametrize("case", ["ipfedrec", "ifedncf"])
def test_the_pull_in_closed_form_is_gradient_descent_on_the_whole_table(case):
    """One round of one client, two batches, against dense gradient steps on BCE + reg mean (E - g)^2."""
    one = splits.cold_items(synthetic.make(1, ITEMS, min_history=20, median_history=20, max_history=20).interactions)
    warm = np.flatnonzero(one.candidates["train"])
    settings = {**SMALL, **CASES[case], "batch_size": 24, "lr": 0.2, "eta": 0.5, "reg": 2.0}
    method = methods.build(case, 1, ITEMS, Catalogue({"text": features()}, one.candidates["train"]), **settings)
    config = method.config
    engine = make_engine(method, clients.build(one, max_buckets=1))
    state = engine.init(KEY)
    start = method.publish(KEY, state.server)
    guide, private = start["guide"], jax.tree.map(lambda x: x[0], state.clients)

    slow = oracle.Oracle(method, one, pool=warm)
    batches = oracle.all_batches(slow.data(streams(client_key(KEY, jnp.int32(0), jnp.int32(0)))[0], 0, 0))
    rate = config.lr * len(warm) * config.eta

    def logits(mine, table, item):
        return method.score(None, {**mine, "item": table}, None)[item]

    def bce(mine, table, item, label, mask):
        value = jnp.logaddexp(0.0, logits(mine, table, item)) - label * logits(mine, table, item)
        return (value * mask).sum() / mask.sum()

    def whole(table, mine, *batch):
        return bce(mine, table, *batch) + config.reg * ((table - guide)[warm] ** 2).sum() / (len(warm) * config.dim)

    table, mine = start["item"], private
    rates = {"head": config.lr, "user": config.lr * config.user_lr_scale, "network": config.lr}
    ran = 0
    for item, label, mask in zip(*batches, strict=True):
        if mask.sum() == 0:
            continue
        ran += 1
        grads = jax.grad(bce)(mine, table, item, label, mask)
        moved = {r: jax.tree.map(lambda p, g, r=r: p - rates[r] * g, mine[r], grads[r]) for r in mine}
        judged = moved if case == "ipfedrec" else mine
        table = table - rate * jax.grad(whole)(table, judged, item, label, mask)
        mine = moved
    assert ran > 1
    state, _ = engine.round(KEY, state, 0)
    # float32, two steps at a rate of some units
    np.testing.assert_allclose(state.server.shared["item"][warm], table[warm], rtol=1e-4, atol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a[0], b, rtol=1e-4, atol=1e-5),
        state.clients,
        {r: mine[r] for r in mine},
    )


def test_the_attribute_network_steps_towards_the_new_table():
    method = built("ipfedrec", features(), attribute_steps=200, attribute_lr=0.05, attribute_hidden=32)
    engine = make_engine(method, clients.build(split(), max_buckets=1))
    state = engine.init(KEY)
    warm = np.flatnonzero(split().candidates["train"])
    state, _ = engine.round(KEY, state, 0)
    table = np.clip(np.asarray(state.server.shared["item"])[warm], -1, 1)
    guide = np.asarray(method.publish(KEY, state.server)["guide"])[warm]
    assert ((guide - table) ** 2).mean() < 0.5 * (table**2).mean()


# ---- content -------------------------------------------------------------------------------------------------


def test_conditions_are_principal_components_of_warm_items():
    warm = np.arange(ITEMS) < 40
    values = features() * np.array([5, 4, 3, 2, 1, 0.5, 0.1], np.float32)
    of = lambda v, **how: conditions(Catalogue({"text": v}, warm), "x", 3, **how)
    made = of(values)
    np.testing.assert_allclose(made[warm].mean(0), 0, atol=1e-5)
    covariance = np.cov(made[warm].T)
    assert np.abs(covariance - np.diag(np.diag(covariance))).max() < 1e-4
    assert (np.diff(np.diag(covariance)) < 0).all() and abs(made[warm].std() - 1) < 1e-5
    np.testing.assert_allclose(of(values, whiten=True)[warm].std(0), 1, atol=0.02)
    other = values.copy()
    other[~warm] = 7.0  # cold features decide nothing but their own rows
    np.testing.assert_allclose(of(other)[warm], made[warm], atol=1e-5)


def test_whitened_conditions_of_cold_items_are_like_those_of_warm_ones():
    """More features than warm items: no entry of a cold item is what few warm items happened not to vary in."""
    rng = np.random.default_rng(0)
    latent = rng.standard_normal((400, 8))
    values = latent @ rng.standard_normal((8, 512)) + 0.3 * rng.standard_normal((400, 512))
    warm = np.arange(400) < 240
    made = conditions(Catalogue({"text": values.astype(np.float32)}, warm), "x", 300, whiten=True)
    assert made.shape == (400, 30)
    assert (np.abs(made[~warm]) == 5).mean() < 1e-3 and made[~warm].std(0).max() < 1.5
    flat = latent @ rng.standard_normal((8, 512))  # of rank 8 in rows of any length
    catalogue = Catalogue({"text": (flat / 1e3 + 1).astype(np.float32)}, warm)
    made = conditions(catalogue, "x", 300, whiten=True)
    assert made.shape[1] <= 16 and made[~warm].std(0).max() < 1.5


def test_nearest_warm_items_by_cosine():
    content = np.array([[1, 0], [2, 0.1], [0, 1], [-1, 0], [3, 0]], np.float32)
    places, weights = nearest_warm(content, np.array([0, 1, 2, 3]), np.array([4]), 2)
    assert places.tolist() == [[0, 1]]
    np.testing.assert_allclose(weights.sum(1), 1)
    assert weights[0, 0] > weights[0, 1]
    # an item is no neighbour of its own; 0 and 4 point the same way
    places, _ = nearest_warm(content, np.array([0, 1, 4]), np.array([0, 4]), 1)
    assert places.tolist() == [[2], [0]]


def some_missing(rng) -> dict[str, Features]:
    """Text of all items, images of two thirds of them, joined as data sets are."""
    ids = np.arange(ITEMS)
    draw = lambda width: (rng.standard_normal((ITEMS, width)) + 3).astype(np.float32)
    has = ids % 3 > 0
    return {
        "text": align(draw(5), ids, ids, source="text"),
        "image": align(draw(4), ids, ids, source="image", present=has),
    }


@pytest.mark.parametrize("read", ["cold", "graph", "centred", "profile"])
def test_items_without_features_of_a_modality_are_not_alike_for_that(read):
    """Two items without images are as near as their texts are; the mean that stands for an image is no direction."""
    made, warm = some_missing(np.random.default_rng(0)), np.arange(ITEMS) < 40
    catalogue = catalogue_of(made, warm)
    missing = np.flatnonzero(~made["image"].present)
    if read == "cold":
        content = conditions(catalogue, "x", 0)
        np.testing.assert_allclose(content[missing][:, :4], 0, atol=1e-6)  # image before text
        assert (np.abs(content[missing][:, 4:]) > 1e-3).any(1).all()
        places, _ = nearest_warm(content, np.flatnonzero(warm), missing, 5)
        assert np.isin(places, missing).mean() < 0.8
    elif read == "graph":
        image = features_of(catalogue, "x", centre=True)["image"]
        assert not image[missing].any() and image[made["image"].present].any(1).all()
        np.testing.assert_allclose(image[warm & made["image"].present].mean(0), 0, atol=1e-6)
    else:
        content = stacked_features(made, warm if read == "centred" else None)
        of_image = np.asarray(content[:, 5:])  # in the order given: text before image
        assert not of_image[missing].any()
        np.testing.assert_allclose(np.linalg.norm(of_image[made["image"].present], axis=1), 1, atol=1e-6)


def test_the_mean_of_a_modality_that_no_warm_item_has_is_that_of_all():
    values, present = np.ones((4, 2), np.float32) * np.arange(4)[:, None], np.array([False, False, True, True])
    catalogue = Catalogue({"text": values}, ~present, {"text": present})
    np.testing.assert_array_equal(features_of(catalogue, "x", centre=True)["text"][:, 0], [0, 0, -0.5, 0.5])
    assert np.isfinite(conditions(catalogue, "x", 0)).all()


def test_neighbour_means_of_several_sizes_stand_side_by_side():
    content, rows = features(), np.random.default_rng(1).standard_normal((40, 3)).astype(np.float32)
    warm, cold = np.arange(40), np.arange(40, ITEMS)
    made = neighbour_means(content, warm, cold, 2, 7, 100)(jnp.asarray(rows))  # 100: all 40
    for k, means in zip((2, 7, 40), np.split(np.asarray(made), 3, axis=1), strict=True):
        places, weights = nearest_warm(content, warm, cold, k)
        np.testing.assert_allclose(means, (weights[..., None] * rows[places]).sum(1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("given", ["2,5", (2, 5), [2, 5]])
def test_neighbours_are_one_number_or_several(given):
    assert methods.make_config("mdifffr", {"neighbours": given}).means == (2, 5)
    assert methods.make_config("mdifffr", {"neighbours": 4}).means == (4,)
    assert methods.make_config("mdifffr", {}).means == methods.make_config("mdifffr", {"neighbours": "0"}).means == ()
    with pytest.raises(ValueError, match="neighbours=-3: expected"):
        methods.make_config("mdifffr", {"neighbours": "2,-3"})


def test_the_denoiser_hears_what_the_nearest_rows_are():
    """Items of two kinds with opposite rows. Features of less variance than a meaningless one, which alone is told as a
    feature, choose the neighbours: cold rows are of their kind."""
    rng = np.random.default_rng(0)
    group = np.arange(ITEMS) % 8
    kind = group % 2
    content = np.concatenate([np.eye(8)[group], 0.6 * rng.choice([-1, 1], (ITEMS, 1))], 1).astype(np.float32)
    centre = np.array([[1.0, -1.0, 2.0, 0.5], [-1.0, 1.0, -2.0, -0.5]], np.float32)
    rows = jnp.asarray(centre[kind] + 0.1 * rng.standard_normal((ITEMS, 4)), jnp.float32)
    catalogue = Catalogue({"text": content}, np.arange(ITEMS) < 40)
    method = methods.build(
        "mdifffr", USERS, ITEMS, catalogue, **SMALL, preset="proper", condition_dim=1, neighbours=3,
        server_epochs=400, diffusion_lr=3e-3, dropout=0.0, guidance_scale=1.0,
    )  # fmt: skip
    server = method.init_server(KEY)
    server = dataclasses.replace(server, shared={**server.shared, "item": rows})
    received = Aggregate(jax.tree.map(jnp.zeros_like, {"item": rows}), jnp.ones(()), jnp.float32(USERS))
    server, _ = method.server_update(KEY, server, received)
    made = np.asarray(method.publish(KEY, server)["item"])[40:]
    np.testing.assert_allclose(made, centre[kind[40:]], atol=0.6)


def test_ridge_map_is_least_squares_without_a_penalty():
    x, rows = features(), np.random.default_rng(1).standard_normal((40, 3))
    fitted = ridge_map(x, np.arange(40), 0.0) @ rows
    np.testing.assert_allclose(fitted, np.linalg.lstsq(x[:40], rows, rcond=None)[0], atol=1e-5)


def test_mapped_rows_have_the_mean_of_the_warm_ones_whatever_the_penalty():
    content = features()
    rows = jnp.asarray(5 + np.random.default_rng(1).standard_normal((ITEMS, 4)), jnp.float32)
    for ridge, most in ((1e6, 1e-3), (0.0, 10.0)):
        catalogue = Catalogue({"text": content}, np.arange(ITEMS) < 40)
        method = methods.build("cs_fcf", USERS, ITEMS, catalogue, **SMALL, cold="map", ridge=ridge)
        server = method.init_server(KEY)
        server = dataclasses.replace(server, shared={**server.shared, "item": rows})
        made = np.asarray(method.publish(KEY, server)["item"])[40:] - np.asarray(rows[:40]).mean(0)
        assert np.abs(made).max() < most and (ridge or np.abs(made).max() > 0.1)


@pytest.mark.parametrize("warm", [None, np.ones(ITEMS, bool)])
def test_without_cold_items_a_maker_of_cold_rows_is_refused(warm):
    catalogue = Catalogue({"text": features()}, warm)
    backbones = {"mdifffr": "pfedrec", "light_mdifffr": "fedncf", "cs_fcf": "fedmf", "cs_fedncf": "fedncf"}
    for name, settings in CASES.items():
        if name in backbones:
            expected = (
                rf"{name} makes vectors of cold items, .* --split=cold_items, or choose --method={backbones[name]}"
            )
            with pytest.raises(ValueError, match=expected):
                methods.build(name, USERS, ITEMS, catalogue, **{**SMALL, **settings})
        else:  # IFedRec pulls its clients towards content, whatever is cold
            methods.build(name, USERS, ITEMS, catalogue, **{**SMALL, **settings})
    of_warm, cold = warm_and_cold(catalogue)
    assert len(of_warm) == ITEMS and not len(cold)


def test_features_are_required():
    for name in CASES:
        with pytest.raises(ValueError, match="makes rows from item features and the data set has none"):
            methods.build(name, USERS, ITEMS)


def test_a_sum_of_metrics_selects_the_round():
    ks, names = (20, 50, 100), "Recall@20+Recall@50+Recall@100"
    config = run.RunConfig(
        method="cs_fcf", split="cold_items", rounds=4, eval_every=1, ks=ks, select_metric=names, eval_clients=40,
        settings={"dim": 4}, devices=1,
    )  # fmt: skip
    summary = run.train(config, references=False)
    assert set(summary["valid"]) >= {f"{m}@{k}" for m in ("Recall", "Precision", "NDCG") for k in ks}
    assert summary["test_seen"]["clients"] == 0 < summary["test_unseen"]["clients"]
    with pytest.raises(ValueError, match="select_metric='Recall@7'"):
        dataclasses.replace(config, select_metric="Recall@20+Recall@7")
