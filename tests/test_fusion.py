"""Multimodal methods: the papers' sizes, and one backward pass on the server against a loop over clients."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_rec import aggregate, methods
from fedjax_rec.backbones.fused import fused_backbone
from fedjax_rec.data import clients, splits, synthetic
from fedjax_rec.item_sources import Catalogue, views
from fedjax_rec.method import Aggregate, Batch, Listed, LocalData, batch_at
from fedjax_rec.methods import fusion, fusion_client
from fedjax_rec.privacy import mechanisms
from fedjax_rec.rounds import make_engine

USERS, ITEMS = 5, 30


def catalogue(items: int, width: int, warm=None) -> Catalogue:
    rng = np.random.default_rng(0)
    draw = lambda: rng.standard_normal((items, width)).astype(np.float32)
    return Catalogue({"image": draw(), "text": draw()}, warm)


def entries(tree) -> int:
    return sum(x.size for x in jax.tree.leaves(tree))


@pytest.mark.parametrize(
    ("backbone", "update", "expected"),
    [("fedavg", "gradients", 120_132), ("fedrap", "gradients", 155_972), ("fedavg", "parameters", 455_620)],
)
def test_client_parameters_are_those_of_the_papers_tables(backbone, update, expected):
    """FedVLR Table 3 (received views, head, router) and FedMR Table 5 (what a client trains), on KU."""
    method = methods.build("fedvlr", 204, 560, catalogue(560, 512), backbone=backbone, update=update)

    def sizes(key):
        shared = method.publish(key, method.init_server(key))
        return shared, method.init_client(key, shared)

    shared, mine = jax.eval_shape(sizes, jax.random.key(0))
    trained = {**shared, "guide": shared["guide"]["id"]} if update == "parameters" else shared
    assert entries(trained) + entries(mine) == expected


@pytest.mark.parametrize("operators", [("sum", "mlp", "gate"), ("attention",)])
def test_one_pull_back_is_the_sum_of_the_clients_gradients(operators):
    """Algorithm 1: the gradient of D and gamma, client by client, weighted and added up."""
    items = catalogue(ITEMS, 7)
    method = methods.build(
        "fedvlr", USERS, ITEMS, items, dim=4, id_dim=6, operators=operators, lr=0.5, item_lr_scale=0.4, l2=0.0
    )
    server = method.init_server(jax.random.key(1))
    trainable, features = server.private["trainable"], server.private["features"]
    module = views.fusion(operators, 4)
    fuse = lambda t: module.apply(t["operators"], {"id": t["id"], **features})
    rng = np.random.default_rng(3)
    cotangents = [jnp.asarray(rng.standard_normal((ITEMS, len(operators), 4)), jnp.float32) for _ in range(USERS)]
    weights = rng.random(USERS)
    weights /= weights.sum()
    alone = [jax.grad(lambda t, c=c: (fuse(t) * c).sum())(trainable) for c in cotangents]
    gradient = jax.tree.map(lambda *g: sum(w * x for w, x in zip(weights, g, strict=True)), *alone)

    total = sum(w * c for w, c in zip(weights, cotangents, strict=True))
    received = Aggregate({"views": total}, jnp.ones(()), jnp.float32(USERS))
    after, _ = method.server_update(jax.random.key(0), server, received)
    rates = {"id": 0.5 * 0.4 * USERS, "operators": 0.5}
    for role, rate in rates.items():
        expected = jax.tree.map(lambda p, g, r=rate: p - r * g, trainable[role], gradient[role])
        # sums of 30 x 3 x 4 float32 terms in another order
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5),
            after.private["trainable"][role],
            expected,
        )


def test_the_server_may_step_the_operators_by_adam():
    """Adam's first step has the rate's size in every entry, however small the gradient; D keeps plain steps."""
    items = catalogue(ITEMS, 7)
    settings = {"dim": 4, "id_dim": 6, "operators": ("mlp",), "lr": 0.5, "fusion_lr_scale": 0.02}
    method = methods.build("fedvlr", USERS, ITEMS, items, fusion_optimizer="adam", **settings)
    plain = methods.build("fedvlr", USERS, ITEMS, items, **settings)
    cotangent = 1e-3 * jax.random.normal(jax.random.key(2), (ITEMS, 1, 4))
    received = Aggregate({"views": cotangent}, jnp.ones(()), jnp.float32(USERS))
    before, after, slow = (
        server.private["trainable"]
        for server in (
            method.init_server(jax.random.key(1)),
            method.server_update(jax.random.key(0), method.init_server(jax.random.key(1)), received)[0],
            plain.server_update(jax.random.key(0), plain.init_server(jax.random.key(1)), received)[0],
        )
    )
    step = np.abs(after["operators"]["params"]["mlp"]["Dense_1"]["bias"])
    np.testing.assert_allclose(step, 0.01, rtol=1e-3)
    np.testing.assert_array_equal(after["id"], slow["id"])
    assert np.abs(slow["id"] - before["id"]).max() > 0
    with pytest.raises(ValueError, match="fusion_optimizer=adam with update=parameters"):
        methods.build("fedvlr", USERS, ITEMS, items, update="parameters", fusion_optimizer="adam")


def test_gates_multiply_the_features():
    """With all gate weights zero every gate is one half, so twice the features give twice the view."""
    gate = views.Gate(4)
    parts = [jnp.ones((3, 4)), 2 * jnp.ones((3, 4))]
    params = gate.init(jax.random.key(0), parts)
    inner = {k: jax.tree.map(jnp.zeros_like, v) if k != "Dense_2" else v for k, v in params["params"].items()}
    view = lambda scale: gate.apply({"params": inner}, [scale * x for x in parts])
    np.testing.assert_allclose(view(2.0), 2 * view(1.0), rtol=1e-5)


def test_the_router_sees_the_history_of_its_user():
    router = views.Router(3, 4)
    params = router.init(jax.random.key(0), jnp.zeros(12))
    rng = np.random.default_rng(0)
    made, one, other = (jnp.asarray(rng.standard_normal(s), jnp.float32) for s in ((5, 3, 4), (3, 4), (3, 4)))
    of = lambda history, mode: views.router_weights(
        router, params, made, history, jnp.ones(5), mode=mode, temperature=1.0
    )
    for mode in ("user", "item"):
        assert np.abs(of(one, mode) - of(other, mode)).max() > 1e-3
        np.testing.assert_allclose(of(one, mode).sum(-1), 1.0, rtol=1e-5)
    np.testing.assert_array_equal(of(one, "batch_mean"), of(other, "batch_mean"))
    assert of(one, "user").shape == (3,)
    assert of(one, "item").shape == (5, 3) and np.ptp(of(one, "item"), axis=0).max() > 0


@pytest.mark.parametrize(("rule", "expected"), [("zero", 0.0), ("mean", 2.0)])
def test_cold_items_get_no_trained_id(rule, expected):
    warm = jnp.asarray([True, False, True])
    filled = views.fill_cold(jnp.asarray([[1.0], [9.0], [3.0]]), warm, rule)
    np.testing.assert_allclose(filled[:, 0], [1.0, expected, 3.0])


def test_noise_has_the_variance_of_the_weighted_mean():
    """Every client's noise has standard deviation 0.5; the mean over four equal clients half of that."""
    method = methods.build(
        "fedvlr", 4, ITEMS, catalogue(ITEMS, 7), dim=4, id_dim=2000, backbone="fcf", noise_std=0.5, lr=1.0,
        item_lr_scale=0.25, centre=False,
    )  # fmt: skip
    server = method.init_server(jax.random.key(1))
    zero = jnp.zeros((ITEMS, 3, 4))
    received = Aggregate({"views": zero, "weight": jnp.ones(())}, jnp.float32(4), jnp.float32(4))
    after, _ = method.server_update(jax.random.key(2), server, received)
    moved = after.private["trainable"]["id"] - server.private["trainable"]["id"]
    assert abs(float(moved.std()) - 0.25) < 0.005  # 60,000 draws: the standard error is 0.0007


def test_noise_on_views_is_noise_of_the_jacobians_shape_on_the_table():
    """Of one Sum view a row of D gets the view's noise times its projection W [id_dim, dim]: covariance s^2 W W^T."""
    items = 20_000
    method = methods.build(
        "fedvlr", 1, items, catalogue(items, 2), dim=4, id_dim=2, operators="sum", backbone="fcf", noise_std=0.5,
        noise_on="views", lr=1.0, centre=False,
    )  # fmt: skip
    server = method.init_server(jax.random.key(1))
    received = Aggregate({"views": jnp.zeros((items, 1, 4)), "weight": jnp.ones(())}, jnp.float32(1), jnp.float32(1))
    after, _ = method.server_update(jax.random.key(2), server, received)
    moved = np.asarray(after.private["trainable"]["id"] - server.private["trainable"]["id"])
    projection = np.asarray(server.private["trainable"]["operators"]["params"]["project_id"]["kernel"])
    expected = 0.25 * projection @ projection.T
    assert np.abs(moved.T @ moved / items - expected).max() < 0.05 * np.abs(expected).max()


@pytest.mark.parametrize("ids", ["drop", "random"])
def test_a_table_that_nobody_trains_gets_no_noise(ids):
    before, after = stepped("fedvbpr", jnp.zeros_like, noise_std=0.5, ids=ids)
    np.testing.assert_array_equal(before.shared["guide"]["id"], after.shared["guide"]["id"])
    moved = jax.tree.map(jnp.subtract, after.shared["fusion"], before.shared["fusion"])
    assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(moved))


def test_an_operator_and_a_modality_are_one_entry_each(monkeypatch):
    """A program's own operator and a third modality train as the others do, and reach the router."""

    class Product(views.Sum):
        def __call__(self, parts):
            return parts[0] * parts[1] * parts[2] * parts[3]

    monkeypatch.setitem(views.OPERATORS, "product", Product)
    two = catalogue(ITEMS, 7)
    audio = np.random.default_rng(1).standard_normal((ITEMS, 5)).astype(np.float32)
    three = two._replace(features={**two.features, "audio": audio})
    method = methods.build("fedvlr", USERS, ITEMS, three, dim=4, id_dim=6, operators="sum,product", ids="random")
    server = method.init_server(jax.random.key(1))
    made = method.publish(jax.random.key(0), server)["views"]
    assert made.shape == (ITEMS, 2, 4)
    received = Aggregate({"views": jnp.ones_like(made)}, jnp.ones(()), jnp.float32(USERS))
    after, _ = method.server_update(jax.random.key(0), server, received)
    project = lambda server: server.private["trainable"]["operators"]["params"]["project_audio"]["kernel"]
    assert project(server).shape == (5, 4) and np.abs(project(after) - project(server)).max() > 0
    params = {"views": made, **method.init_client(jax.random.key(2), {})}
    said = method.explain({}, params, sample_data(np.random.default_rng(0), ITEMS, 10, 1))
    assert said["router"].shape == (2,)
    one = methods.build("fedvlr", USERS, ITEMS, three, dim=4, id_dim=6, operators="product")
    assert one.explain({}, {}, None) == {}  # a view alone has no weight to tell


def test_bytes_count_all_views_though_clients_work_on_rows():
    split = splits.leave_one_out(synthetic.make(20, 300, min_history=4, median_history=6, max_history=9).interactions)
    method = methods.build("fedvlr", 20, 300, catalogue(300, 7), dim=4, id_dim=6, backbone="fcf", local_epochs=1)
    sizes = make_engine(method, clients.build(split, max_buckets=1)).bytes_per_client()
    assert sizes["down"] == sizes["up"] == 300 * 3 * 4 * 4  # items, views, width, float32
    assert sizes["down_rows"] == sizes["up_rows"] < sizes["up"] / 2


def test_a_data_set_without_features_is_refused():
    with pytest.raises(ValueError, match="fuses item features and the data set has none: give some as --features="):
        methods.build("fedvlr", 4, ITEMS)


def stepped(name="fedvlr", upload=None, **settings):
    """(server before, after) a step from an upload: by default ones in every shared role."""
    small = {"dim": 4, "id_dim": 2 if name == "fedvbpr" else 6, "backbone": "fedncf", "layers": (4,), "lr": 0.5}
    method = methods.build(name, USERS, ITEMS, catalogue(ITEMS, 7), **{**small, **settings})
    server = method.init_server(jax.random.key(1))
    copied = settings.get("update") == "parameters" or name == "fedvbpr"
    sent = server.shared if copied else {**server.shared, "views": jnp.zeros((ITEMS, 3, 4))}
    sent = jax.tree.map(upload or jnp.ones_like, sent)
    if settings.get("noise_std"):
        sent["weight"] = jnp.ones(())
    received = Aggregate(sent, jnp.ones(()), jnp.float32(USERS))
    return server, method.server_update(jax.random.key(0), server, received)[0]


@pytest.mark.parametrize("name", ["fedvlr", "fedvbpr"])
def test_the_server_steps_what_is_averaged(name):
    """FedNCF's table and network, and the copies, by the server's rate and optimiser."""
    roles = ["item", "network", *(["fusion"] if name == "fedvbpr" else [])]
    for settings, size in (({}, 1.0), ({"server_lr": 3.0}, 3.0), ({"server_optimizer": "adam", "server_lr": 0.1}, 0.1)):
        before, after = stepped(name, **settings)
        for role in roles:
            moved = jax.tree.map(jnp.subtract, after.shared[role], before.shared[role])
            jax.tree.map(lambda x, s=size: np.testing.assert_allclose(x, s, rtol=2e-3), moved)
    if name == "fedvbpr":
        moved = jax.tree.map(jnp.subtract, after.shared["guide"], before.shared["guide"])
        assert {m: float(np.abs(x).max()) > 0 for m, x in moved.items()} == {"id": True, "image": False, "text": False}


@pytest.mark.parametrize("noise_on", ["gradients", "views"])
def test_everything_that_is_sent_gets_the_noise(noise_on):
    before, after = stepped(upload=jnp.zeros_like, noise_std=0.5, noise_on=noise_on)
    for role in ("item", "network"):
        moved = jax.tree.map(jnp.subtract, after.shared[role], before.shared[role])
        assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(moved)), role
    quiet = stepped(upload=jnp.zeros_like)
    jax.tree.map(np.testing.assert_array_equal, quiet[0].shared, quiet[1].shared)


def test_uploads_weigh_as_told():
    weighting = lambda name, **s: methods.build(name, USERS, ITEMS, catalogue(ITEMS, 7), **s).config.weighting
    assert weighting("fedvlr") == "by_size" and weighting("fedvlr", backbone="fcf") == "equal"
    assert weighting("fedvlr", weighting="equal") == weighting("fedmr", backbone="fcf") == "equal"
    assert weighting("fedmr") == weighting("fedmr", weighting="backbone") == "by_size"
    by = lambda **s: methods.build("fedvlr", USERS, ITEMS, catalogue(ITEMS, 7), **s).aggregator.weight
    assert (by(weighting="equal"), by()) == (aggregate.equal, aggregate.by_size)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("fedvlr", {"operators": "sum,sum"}, "operators=sum,sum: expected one or more, each once"),
        ("fedvlr", {"operators": "attention", "dim": 30}, "dim=30: expected a multiple of the 4 heads"),
        ("fedvbpr", {"dim": 33, "id_dim": 16}, "dim=33: expected an even width"),
        ("fedvbpr", {"layer_norm": True}, "layer_norm=True: fedvbpr has no projections"),
        ("fedvlr", {"layers": "0,4"}, r"layers=\(0, 4\): expected one width or more"),
        ("fedvlr", {"branches": "nuemf"}, "did you mean neumf"),
        ("fedvlr", {"independence": -1}, "independence=-1"),
        ("fedvlr", {"network_lr_scale": 0}, "network_lr_scale=0"),
        ("fedvbpr", {"l2": 0.1}, "l2=0.1 with update=parameters"),
        ("fedvlr", {"noise_on": "views"}, "noise_on=views without noise: give noise_std"),
    ],
)
def test_wrong_settings_are_named(name, settings, message):
    with pytest.raises(ValueError, match=message):
        methods.make_config(name, settings)


def test_two_kinds_of_noise_on_uploads_are_refused():
    method = methods.build("fedvlr", USERS, ITEMS, catalogue(ITEMS, 7), noise_std=0.1)
    with pytest.raises(ValueError, match=r"noise_std=0.1 with dp_mechanism=gaussian"):
        mechanisms.private(method, mechanisms.Mechanism("gaussian", clip=1.0, noise=1.0), USERS)


def test_an_ablation_of_features_that_are_not_there_is_refused():
    text = catalogue(ITEMS, 7)
    text = text._replace(features={"text": text.features["text"]})
    methods.build("fedvlr", USERS, ITEMS, text, text="drop")
    with pytest.raises(ValueError, match="visual=random: the data set has no such features, only text"):
        methods.build("fedvlr", USERS, ITEMS, text, visual="random")
    with pytest.raises(ValueError, match="ids=drop with text dropped too: nothing tells items apart"):
        methods.build("fedvlr", USERS, ITEMS, text, text="drop", ids="drop")
    named = Catalogue({"visual": text.features["text"]})  # as the setting is
    assert not fusion.ablated_features(methods.make_config("fedvlr", {"visual": "drop"}), named)["visual"].any()


def close(x, y):
    np.testing.assert_allclose(x, y, rtol=2e-4, atol=2e-6)


def sample_data(rng, rows: int, batch: int, steps: int) -> LocalData:
    """A client's samples, some rows several times, the last batch padded; its history is rows 0 to 4 of five places."""
    item = jnp.asarray(rng.integers(0, rows, (steps, batch)), jnp.int32)
    mask = jnp.ones((steps, batch)).at[-1, batch // 2 :].set(0.0)
    label = jnp.asarray(rng.random((steps, batch)) < 0.4, jnp.float32) * mask
    return LocalData(
        rows=jnp.arange(rows),
        row_mask=jnp.ones(rows, bool),
        samples=Listed(Batch(item, label, mask)),
        history=jnp.asarray([0, 1, 2, 3, 4, 0, 0]),
        history_mask=jnp.arange(7) < 5,
        num_samples=mask[0].sum(),
        num_steps=jnp.int32(steps),
        round=jnp.int32(3),
    )


def by_autodiff(config, backbone, params, data):
    """Algorithm 1 on one client, by differentiating its loss as written: (private roles, the views' gradient)."""
    rates = {"user": config.lr, "head": config.lr, "router": config.lr * config.router_lr_scale}
    rates |= {"own_item": config.lr * config.own_lr_scale}
    made, router = params["views"], views.Router(len(config.operators), config.dim)
    private = {role: value for role, value in params.items() if role != "views"}

    def loss(private, made, batch):
        history = made[jnp.asarray([0, 1, 2, 3, 4])].mean(0)
        weights = jnp.ones(1)
        if "router" in private:
            weights = jax.nn.softmax(router.apply(private["router"], history.reshape(-1)) / config.temperature)
        mixed = jnp.einsum("v,rvd->rd", weights, made)[batch.item]
        vectors = {"own_item": private["own_item"][batch.item]} if "own_item" in private else {}
        logits = backbone.predict(private, vectors, mixed)
        value = fusion_client.LOSSES[config.loss](logits, batch)
        return value + backbone.regulariser(vectors, mixed, batch.mask, data.round)

    total = jnp.zeros_like(made)
    for t in range(int(data.num_steps)):
        batch = batch_at(data, jnp.int32(t))
        of_private, of_views = jax.grad(loss, argnums=(0, 1))(private, made, batch)
        private = {
            role: jax.tree.map(lambda p, g, r=role: p - rates[r] * g, private[role], of_private[role])
            for role in private
        }
        if backbone.private_first:
            of_views = jax.grad(loss, argnums=1)(private, made, batch)
        total = total + of_views
    return private, total


OF_BACKBONE = {
    "fedavg": {"user_init_std": 0.5},
    "fcf": {"user_init_std": 0.5},
    "fedrap": {"own_lr_scale": 2.0, "own_init_std": 0.3},
    "pfedrec": {},
}


@pytest.mark.parametrize("operators", [("sum", "mlp", "gate"), ("mlp",)])
@pytest.mark.parametrize(
    ("backbone", "loss"), [("fedavg", "pointwise"), ("fcf", "bpr"), ("pfedrec", "pointwise"), ("fedrap", "pointwise")]
)
@pytest.mark.parametrize("rows", [12, 90])
def test_local_training_is_algorithm_1_by_automatic_differentiation(backbone, loss, operators, rows):
    """With few rows linear models walk through all of them, with many through each batch's."""
    settings = {"dim": 4, "id_dim": 6, "lr": 0.7, "router_lr_scale": 0.6, "temperature": 0.8, **OF_BACKBONE[backbone]}
    method = methods.build(
        "fedvlr", USERS, rows, catalogue(rows, 7), **settings, backbone=backbone, loss=loss, operators=operators
    )  # fmt: skip
    shared = method.publish(jax.random.key(0), method.init_server(jax.random.key(1)))
    rng = np.random.default_rng(5)
    shared = {**shared, "views": jnp.asarray(rng.standard_normal(shared["views"].shape), jnp.float32)}
    params = {**shared, **method.init_client(jax.random.key(2), shared)}
    data = sample_data(rng, rows, 10, 3)
    after, update, info = method.local_update(jax.random.key(3), shared, params, data)
    private, total = by_autodiff(method.config, fused_backbone(backbone, rows, method.config), params, data)
    jax.tree.map(close, {role: after[role] for role in private}, private)
    close(update["views"], total)
    assert 0.1 < float(info["loss"]) < 10


@pytest.mark.parametrize("backbone", ["pfedrec", "fedavg"])
def test_copies_of_what_is_shared_step_after_pfedrecs_head(backbone):
    """As PFedRec's table does; over FedAvg all step from one point."""
    settings = {"dim": 4, "id_dim": 2, "lr": 0.7, "item_lr_scale": 0.3, "fusion_lr_scale": 0.5}
    method = methods.build(
        "fedvbpr", USERS, 12, catalogue(12, 7), backbone=backbone, **settings, **OF_BACKBONE[backbone]
    )
    shared = method.publish(jax.random.key(0), method.init_server(jax.random.key(1)))
    params = {**shared, **method.init_client(jax.random.key(2), shared)}
    data = sample_data(np.random.default_rng(5), 12, 10, 1)
    batch = batch_at(data, jnp.int32(0))
    model, module = fused_backbone(backbone, 12, method.config), views.fusion(("vbpr",), 4)
    private = {role: params[role] for role in params if role not in shared}

    def loss(private, trained):
        made = module.apply(trained["fusion"], {**shared["guide"], "id": trained["id"]})[:, 0]
        return fusion_client.LOSSES["pointwise"](model.predict(private, {}, made[batch.item]), batch)

    trained = {"fusion": shared["fusion"], "id": shared["guide"]["id"]}
    after = jax.tree.map(lambda p, g: p - 0.7 * g, private, jax.grad(loss)(private, trained))
    gradient = jax.grad(loss, argnums=1)(after if backbone == "pfedrec" else private, trained)
    got, update, _ = method.local_update(jax.random.key(3), shared, params, data)
    jax.tree.map(close, {role: got[role] for role in after}, after)
    close(update["guide"]["id"], -0.7 * 0.3 * USERS * gradient["id"])
    jax.tree.map(lambda x, g: close(x, -0.7 * 0.5 * g), update["fusion"], gradient["fusion"])


@pytest.mark.parametrize("backbone", ["fcf", "pfedrec", "fedrap", "fedncf"])
@pytest.mark.parametrize("name", ["fedvbpr", "fedvlr"])
def test_copies_that_take_one_local_step_are_cotangents_pulled_back(name, backbone):
    """So +VBPR may be run by update=gradients, whose clients train no map of the features, where steps are one."""
    settings = {"dim": 4, "id_dim": 2, "lr": 0.7, "item_lr_scale": 0.3, "fusion_lr_scale": 0.5, "backbone": backbone}
    settings |= OF_BACKBONE.get(backbone, {"layers": (4,)})

    def stepped_by(update):
        method = methods.build(name, USERS, 12, catalogue(12, 7), update=update, **settings)
        server = method.init_server(jax.random.key(1))
        shared, rng = method.publish(jax.random.key(0), server), np.random.default_rng(5)
        uploads = []
        for _ in range(3):
            params = {**shared, **method.init_client(jax.random.key(2), shared)}
            data = sample_data(rng, 12, 10, 1)
            params, changed, _ = method.local_update(jax.random.key(3), shared, params, data)
            uploads.append(method.upload(jax.random.key(4), shared, params, changed, data)[1])
        mean = jax.tree.map(lambda *x: sum(x) / 3, *uploads)
        after, _ = method.server_update(jax.random.key(6), server, Aggregate(mean, jnp.ones(()), jnp.ones(())))
        if update == "parameters":
            return {"operators": after.shared["fusion"], "id": after.shared["guide"]["id"]}
        return after.private["trainable"]

    pulled = stepped_by("gradients")
    assert np.abs(pulled["id"]).max() > 0.01
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-5), stepped_by("parameters"), pulled)


def test_decay_of_ids_does_not_grow_with_the_clients():
    for users in (USERS, 40 * USERS):
        method = methods.build("fedvlr", users, ITEMS, catalogue(ITEMS, 7), dim=4, id_dim=6, lr=0.5, l2=0.1)
        server = method.init_server(jax.random.key(1))
        nothing = Aggregate({"views": jnp.zeros((ITEMS, 3, 4))}, jnp.ones(()), jnp.float32(users))
        after, _ = method.server_update(jax.random.key(0), server, nothing)
        shrunk = jax.tree.map(lambda p: (1 - 0.5 * 0.1) * p, server.private["trainable"])
        jax.tree.map(close, after.private["trainable"], shrunk)
