"""Server-trained models that read item features: against loops over edges, items and samples; and in the engine."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_rec import methods, rounds
from fedjax_rec.central import bm3, content, mgcn, pairwise, pgl, two_tower, vbpr
from fedjax_rec.data import clients, splits, synthetic
from fedjax_rec.item_sources import Catalogue

NAMES = ("vbpr", "two_tower", "bm3", "mgcn", "pgl")
MODULES = {"vbpr": vbpr, "two_tower": two_tower, "bm3": bm3, "mgcn": mgcn, "pgl": pgl}
GRAPHS = ("bm3", "mgcn", "pgl")
USERS, ITEMS, DIM = 7, 11, 3
KEY = jax.random.key(0)
SMALL = {"dim": 4, "batch_size": 64, "init_std": 0.3}


def close(a, b, tolerance=1e-5):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance), a, b)


# ---- a tiny example, and slow loops over it ----------------------------------------------------------------


def taken() -> np.ndarray:
    """Who took what [users, items]: the last user nothing, the last item nobody."""
    matrix = np.random.default_rng(1).random((USERS, ITEMS)) < 0.4
    matrix[-1] = matrix[:, -1] = False
    matrix[np.arange(USERS - 1), np.arange(USERS - 1)] = True
    return matrix.astype(np.float64)


def tiny(*modalities: str, warm=None) -> Catalogue:
    """Features of several widths; those of item 4 are the warm items' mean, zeros when centred."""
    rng = np.random.default_rng(2)
    features = {m: rng.normal(size=(ITEMS, 5 + n)).astype(np.float32) for n, m in enumerate(modalities)}
    for values in features.values():
        others = np.ones(ITEMS, bool) if warm is None else warm.copy()
        others[4] = False
        values[4] = values[others].mean(0)
    return Catalogue(features, warm)


def built(name: str, *modalities: str, warm=None, **settings):
    """(config, model, parameters that are all away from where they start)."""
    config = methods.make_config(name, {"dim": DIM, "init_std": 0.5, **settings})
    model = MODULES[name].model(config, USERS, ITEMS, name, tiny(*(modalities or ("image", "text")), warm=warm))
    params = model.init(KEY)
    leaves, shape = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    moved = [x + 0.3 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    return config, model, jax.tree.unflatten(shape, moved)


def graph() -> jax.Array:
    return pairwise.normalised(jnp.asarray(taken(), jnp.float32))


def triples() -> pairwise.Triples:
    """Five real ones, with a user twice, and one that is padding."""
    arrays = [0, 3, 3, 5, 1, 2], [0, 3, 4, 5, 1, 2], [7, 10, 8, 4, 9, 1]
    return pairwise.Triples(*(jnp.asarray(x) for x in arrays), jnp.asarray([1.0, 1, 1, 1, 1, 0]))


REAL = list(zip([0, 3, 3, 5, 1], [0, 3, 4, 5, 1], [7, 10, 8, 4, 9], strict=True))


def on_host(tree):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


def edge_weights(matrix) -> dict:
    return {(u, i): 1 / np.sqrt(matrix[u].sum() * matrix[:, i].sum()) for u, i in zip(*np.nonzero(matrix), strict=True)}


def along_edges(weights, users, items, layers):
    """LightGCN, an edge at a time."""
    all_users, all_items = [users], [items]
    for _ in range(layers):
        new_users, new_items = np.zeros_like(users), np.zeros_like(items)
        for (u, i), weight in weights.items():
            new_users[u] += weight * all_items[-1][i]
            new_items[i] += weight * all_users[-1][u]
        all_users.append(new_users)
        all_items.append(new_items)
    return sum(all_users) / (layers + 1), sum(all_items) / (layers + 1)


def cosine(a, b):
    scale = np.linalg.norm(a) * np.linalg.norm(b)
    return a @ b / scale if scale > 1e-6 else 0.0


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def nearest_by_loops(values, k, warm, weighted):
    """The graph of items as a matrix."""
    items = len(values)
    matrix = np.zeros((items, items))
    for i in range(items):
        others = sorted((-cosine(values[i], values[j]), j) for j in range(items) if j != i and warm[j])
        matrix[i, i] = 1.0
        for negative, j in others[: k - 1]:
            if negative < -1e-6:
                matrix[i, j] = -negative if weighted else 1.0
    degree = matrix.sum(1)
    return np.array([[matrix[i, j] / np.sqrt(degree[i] * degree[j]) for j in range(items)] for i in range(items)])


def contrast_by_loops(one, other, temperature):
    total = 0.0
    for b in range(len(one)):
        logits = [cosine(one[b], other[c]) / temperature for c in range(len(one))]
        total -= logits[b] - np.log(np.sum(np.exp(logits)))
    return total / len(one)


def bpr_by_loops(users, items, l2):
    total = 0.0
    for u, i, j in REAL:
        total -= np.log(sigmoid(users[u] @ items[i] - users[u] @ items[j]))
        total += l2 * (users[u] @ users[u] + items[i] @ items[i] + items[j] @ items[j])
    return total / len(REAL)


def centred(catalogue: Catalogue):
    warm = np.ones(ITEMS, bool) if catalogue.warm is None else catalogue.warm
    return {m: x.astype(np.float64) - x[warm].mean(0) for m, x in catalogue.features.items()}


def linear(layer, x):
    return x @ layer["kernel"] + layer["bias"]


def slow_vbpr(config, params, features):
    items = np.array(
        [
            np.r_[params["item"][i], np.r_[*(features[m][i] for m in sorted(features))] @ params["map"]]
            for i in range(ITEMS)
        ]
    )
    return params["user"], items, bpr_by_loops(params["user"], items, config.l2)


def slow_bm3(config, params, features, target=None):
    """`target`: the parameters behind the targets."""

    def hidden(params):
        users, items = along_edges(edge_weights(taken()), params["user"], params["item"], config.layers)
        told = {m: linear(params["map"][m], features[m]) for m in features}
        return users, items + params["item"], told

    said, held = hidden(params), hidden(target or params)
    q = functools.partial(linear, params["predictor"])
    total = 0.0
    for u, i, _ in REAL:
        total += 2 - cosine(q(said[0][u]), held[1][i]) - cosine(q(said[1][i]), held[0][u])
        total += config.l2 * ((said[0][u] ** 2).sum() + (said[1][i] ** 2).sum())
        for m in features:
            total += config.content_weight * (1 - cosine(q(said[2][m][i]), held[1][i]))
            total += config.content_weight * (1 - cosine(q(said[2][m][i]), held[2][m][i]))
    return q(said[0]), q(said[1]), total / len(REAL)


def slow_mgcn(config, params, features):
    edges = edge_weights(taken())
    of_content = along_edges(edges, params["user"], params["item"], config.layers)
    of_content = np.r_[of_content[0], of_content[1]]
    views = {}
    for m, layers in params["modality"].items():
        purified = np.array(
            [
                e * sigmoid(linear(layers["purifier"], linear(layers["map"], f)))
                for e, f in zip(params["item"], features[m], strict=True)
            ]
        )
        purified = nearest_by_loops(features[m], config.neighbours, np.ones(ITEMS, bool), True) @ purified
        users = np.zeros((USERS, DIM))
        for (u, i), weight in edges.items():
            users[u] += weight * purified[i]
        views[m] = np.r_[users, purified]
    side = np.zeros_like(of_content)
    for node in range(USERS + ITEMS):
        logit = {m: (np.tanh(linear(params["query"], v[node])) @ params["query_weight"])[0] for m, v in views.items()}
        scale = sum(np.exp(x) for x in logit.values())
        common = sum(np.exp(logit[m]) / scale * v[node] for m, v in views.items())
        own = sum(
            sigmoid(linear(params["modality"][m]["preference"], of_content[node])) * (v[node] - common)
            for m, v in views.items()
        )
        side[node] = (common + own) / (len(views) + 1)
    users, items = np.split(of_content + side, [USERS])
    loss = bpr_by_loops(users, items, config.l2)
    for rows in ([u for u, _, _ in REAL], [USERS + i for _, i, _ in REAL]):
        loss += config.contrast_weight * contrast_by_loops(side[rows], of_content[rows], config.temperature)
    return users, items, loss


def slow_pgl(config, params, features):
    own = np.zeros((ITEMS, 0))
    for m in sorted(features):
        part = linear(params["map"][m], features[m])
        own = np.c_[own, part / np.linalg.norm(part, axis=1, keepdims=True)]
    both = set(features) == {"image", "text"}
    weight = {"image": config.image_weight, "text": 1 - config.image_weight} if both else {}
    near = sum(
        weight.get(m, 1 / len(features)) * nearest_by_loops(x, config.neighbours, np.ones(ITEMS, bool), False)
        for m, x in features.items()
    )
    users, items = along_edges(edge_weights(taken()), params["user"], own, config.layers)
    for _ in range(config.item_layers):
        own = near @ own
    items = items + own
    loss = bpr_by_loops(users, items, 0.0)
    for x in (users[[u for u, _, _ in REAL]], items[[i for _, i, _ in REAL]]):
        loss += config.contrast_weight / 2 * contrast_by_loops(x, x, config.temperature)
    return users, items, loss


def slow_two_tower(config, params, features):
    rows = np.array([np.r_[*(features[m][i] for m in sorted(features))] for i in range(ITEMS)])
    items = linear(params["second"], np.maximum(linear(params["first"], rows), 0))
    items, users = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (items, params["user"]))
    loss = config.l2 * sum((params[layer]["kernel"] ** 2).sum() for layer in ("first", "second"))
    for u, i, _ in REAL:
        others = [k for v, k, _ in REAL if v != u and k != i]
        logits = np.array([users[u] @ items[k] / config.temperature for k in (i, *others)])
        loss -= (logits[0] - np.log(np.exp(logits).sum())) / len(REAL)
    return users, items, loss


SLOW = {"two_tower": slow_two_tower, "vbpr": slow_vbpr, "bm3": slow_bm3, "mgcn": slow_mgcn, "pgl": slow_pgl}
SETTINGS = {
    "vbpr": {"l2": 0.01},
    "two_tower": {"l2": 0.01, "hidden": 6, "dropout": 0.0},
    "bm3": {"layers": 2, "dropout": 0.0, "content_weight": 1.5, "l2": 0.01},
    "mgcn": {"neighbours": 4, "contrast_weight": 0.3, "l2": 0.01},
    "pgl": {"neighbours": 4, "item_layers": 2, "contrast_weight": 0.5, "dropout": 0.0},
}


@pytest.mark.parametrize("modalities", [("image", "text"), ("text",), ("audio", "image", "text")])
@pytest.mark.parametrize("name", NAMES)
def test_vectors_and_loss_are_those_of_loops(name, modalities):
    config, model, params = built(name, *modalities, **SETTINGS[name])
    found = model.vectors(params, model.frozen, graph())
    users, items, loss = SLOW[name](config, on_host(params), centred(tiny(*modalities)))
    close(found, (users, items), 1e-4)
    np.testing.assert_allclose(model.loss(params, model.frozen, graph(), triples(), KEY), loss, rtol=1e-4)


# ---- parts ------------------------------------------------------------------------------------------------


def test_propagation_is_a_loop_over_edges():
    rng = np.random.default_rng(0)
    users, items = rng.normal(size=(USERS, DIM)), rng.normal(size=(ITEMS, DIM))
    for layers in (1, 3):
        found = pairwise.propagate(graph(), jnp.asarray(users, jnp.float32), jnp.asarray(items, jnp.float32), layers)
        close(found, along_edges(edge_weights(taken()), users, items, layers))


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("warm", [None, np.arange(ITEMS) % 3 > 0])
def test_the_graph_of_items_is_a_loop_over_pairs(warm, weighted):
    values = centred(tiny("text", warm=warm))["text"]
    found = content.knn_graph(jnp.asarray(values, jnp.float32), 4, warm, weighted=weighted)
    matrix = np.zeros((ITEMS, ITEMS))
    np.add.at(matrix, (np.arange(ITEMS)[:, None], np.asarray(found.item)), np.asarray(found.weight))
    expected = nearest_by_loops(values, 4, np.ones(ITEMS, bool) if warm is None else warm, weighted)
    close(matrix, expected)
    assert (expected > 0).sum(1).max() == 4 and (expected[4] > 0).sum() == 1  # item 4 has no features
    table = np.random.default_rng(0).normal(size=(ITEMS, DIM))
    close(content.read(found, jnp.asarray(table, jnp.float32)), expected @ table)
    few = content.knn_graph(jnp.asarray(values, jnp.float32), 50, warm, weighted=weighted)
    assert few.item.shape == (ITEMS, ITEMS if warm is None else warm.sum())


def test_contrast_is_a_loop_over_the_batch_without_its_padding():
    rng = np.random.default_rng(0)
    one, other = rng.normal(size=(2, 6, DIM))
    one[1] = 0
    mask = np.array([1.0, 1, 0, 1, 1, 0])
    real = mask > 0
    as_jax = lambda x: jnp.asarray(x, jnp.float32)
    found = content.info_nce(as_jax(one), as_jax(other), as_jax(mask), 0.2)
    np.testing.assert_allclose(found, contrast_by_loops(one[real], other[real], 0.2), rtol=1e-5)
    assert content.info_nce(as_jax(one), as_jax(other), jnp.zeros(6), 0.2) == 0


def test_dropped_entries_are_made_up_for():
    x = content.dropped(KEY, jnp.full((4000,), 3.0), 0.25)
    np.testing.assert_allclose(sorted(set(x.tolist())), [0.0, 4.0])
    np.testing.assert_allclose((x == 0).mean(), 0.25, atol=0.03)


def test_targets_of_bm3_have_no_gradient():
    config, model, params = built("bm3", **SETTINGS["bm3"])
    features, at = centred(tiny("image", "text")), on_host(params)
    gradient = jax.grad(model.loss)(params, model.frozen, graph(), triples(), KEY)
    for path in (("user", (3, 1)), ("item", (4, 0)), ("map", "text", "kernel", (2, 2)), ("predictor", "bias", (1,))):
        *names, place = path

        def slope(targets_too, names=names, place=place):
            losses = []
            for step in (1e-4, -1e-4):
                moved = jax.tree.map(np.copy, at)
                functools.reduce(lambda tree, key: tree[key], names, moved)[place] += step
                losses.append(slow_bm3(config, moved, features, moved if targets_too else at)[2])
            return (losses[0] - losses[1]) / 2e-4

        found = functools.reduce(lambda tree, key: tree[key], names, gradient)[place]
        np.testing.assert_allclose(found, slope(False), rtol=1e-3, atol=1e-5)
        if "predictor" not in names:
            assert abs(found - slope(True)) > 1e-3


def test_only_targets_and_contrasts_are_dropped_from():
    for name in ("bm3", "pgl"):
        _, model, params = built(name, **{**SETTINGS[name], "dropout": 0.5})
        one, other = (model.loss(params, model.frozen, graph(), triples(), jax.random.key(k)) for k in range(2))
        assert abs(one - other) > 1e-4
    _, model, params = built("pgl")  # without a contrast
    one, other = (model.loss(params, model.frozen, graph(), triples(), jax.random.key(k)) for k in range(2))
    assert one == other


# ---- PGL's sub-graphs --------------------------------------------------------------------------------------


def local(keep, **settings):
    return methods.make_config("pgl", {"keep": keep, **settings})


@pytest.mark.parametrize("keep", [0.3, 0.5, 1.0])
def test_a_local_sub_graph_has_a_share_of_the_edges(keep):
    matrix = taken()
    found = np.asarray(pgl.sub_graph(KEY, graph(), local(keep)))
    kept = found > 0
    assert kept.sum() == int(keep * matrix.sum()) > 0
    assert (matrix[kept] == 1).all()
    expected = np.zeros_like(matrix)
    for (u, i), weight in edge_weights(kept.astype(np.float64)).items():
        expected[u, i] = weight
    close(found, expected)
    if keep < 1:
        again = np.asarray(pgl.sub_graph(jax.random.key(1), graph(), local(keep))) > 0
        assert (again != kept).any()


def test_edges_are_drawn_by_weight_without_replacement():
    weights = np.array([[0.9, 0.1, 0.3], [0.0, 0.6, 0.2]])
    draws = jax.vmap(lambda k: pgl.some_edges(k, jnp.asarray(weights, jnp.float32), 0.4))(jax.random.split(KEY, 4000))
    assert (np.asarray(draws).sum((1, 2)) == 2).all()
    rng, flat = np.random.default_rng(0), weights.ravel()
    expected = np.zeros(6)
    for _ in range(4000):
        expected[rng.choice(6, 2, replace=False, p=flat / flat.sum())] += 1 / 4000
    np.testing.assert_allclose(np.asarray(draws).mean(0).ravel(), expected, atol=0.035)
    assert expected.max() - expected[expected > 0].min() > 0.4


def test_a_global_sub_graph_is_a_truncated_decomposition():
    found = pgl.sub_graph(KEY, graph(), methods.make_config("pgl", {"mode": "global", "rank": 3}))
    whole = np.asarray(graph(), np.float64)
    values, vectors = np.linalg.eigh(whole @ whole.T)
    top = vectors[:, np.argsort(-values)[:3]]
    expected = top @ top.T @ whole
    close(found, np.where(abs(expected) >= 1e-3, expected, 0.0), 1e-4)
    assert 0 < (np.asarray(found) == 0).sum() < found.size


def test_the_released_global_sub_graph_is_that_of_the_square_matrix():
    """The released code decomposes [[0, A], [A', 0]], to twice as many values."""
    found = pgl.sub_graph(KEY, graph(), methods.make_config("pgl", {"mode": "global_released", "rank": 4}))
    whole = np.asarray(graph(), np.float64)
    square = np.block([[np.zeros((USERS, USERS)), whole], [whole.T, np.zeros((ITEMS, ITEMS))]])
    left, value, right = np.linalg.svd(square)
    expected = (left[:, :2] @ np.diag(value[:2] * value[6:8]) @ right[:2])[:USERS, USERS:]
    close(found, np.where(abs(expected) >= 1e-3, expected, 0.0), 1e-4)


# ---- what must not break -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_nan_for_those_without_interactions(name):
    """The last user and item have none, item 4 no features."""
    everywhere = triples()._replace(user=jnp.full(6, USERS - 1), positive=jnp.asarray([ITEMS - 1, 4, 4, 0, 1, 2]))
    _, model, params = built(name, **({"train_features": True} if name in GRAPHS else {}))
    everything = jax.jit(
        lambda p, g, b: (jax.value_and_grad(model.loss)(p, model.frozen, g, b, KEY), model.vectors(p, model.frozen, g))
    )
    for made_with in (graph(), jnp.zeros((USERS, ITEMS))):
        for batch in (everywhere, everywhere._replace(mask=jnp.zeros(6))):
            for at in (params, jax.tree.map(jnp.zeros_like, params)):
                for x in jax.tree.leaves(everything(at, made_with, batch)):
                    assert np.isfinite(x).all()


@pytest.mark.parametrize("name", NAMES)
def test_items_that_training_may_not_touch(name):
    """Their ID part says nothing and is not trained, and their features change their own vectors alone."""
    warm = np.arange(ITEMS) % 5 > 0
    matrix = taken() * warm
    made_with = pairwise.normalised(jnp.asarray(matrix, jnp.float32))
    batch = triples()._replace(positive=jnp.asarray([1, 3, 4, 6, 1, 2]), negative=jnp.asarray([7, 4, 8, 9, 9, 1]))
    settings = {"neighbours": 3} if name in ("mgcn", "pgl") else {}
    config, model, params = built(name, warm=warm, **settings)
    vectors = lambda params, model=model: on_host(model.vectors(params, model.frozen, made_with))
    users, items = vectors(params)
    if "item" in params:
        other = {**params, "item": params["item"] + jnp.where(warm, 0.0, 1.0)[:, None]}
        close(vectors(other), (users, items), 0)
        slope = np.asarray(jax.grad(model.loss)(params, model.frozen, made_with, batch, KEY)["item"])
        assert (slope[~warm] == 0).all() and (slope[warm] != 0).any()
    catalogue = tiny("image", "text", warm=warm)
    features = {m: np.where(warm[:, None], x, -x) for m, x in catalogue.features.items()}
    turned = MODULES[name].model(config, USERS, ITEMS, name, Catalogue(features, warm))
    new_users, new_items = vectors(params, turned)
    close((new_users, new_items[warm]), (users, items[warm]), 0)
    if name == "bm3":
        assert np.ptp(items[~warm], axis=0).max() < 1e-6
    else:
        assert (abs(items[~warm] - new_items[~warm]).max(1) > 1e-3).all()


@pytest.mark.parametrize("name", GRAPHS)
def test_features_are_trained_where_that_is_asked_for(name):
    _, frozen, params = built(name)
    assert not params["features"]
    _, trained, _ = built(name, train_features=True)
    features = trained.init(KEY)["features"]
    close(features, {m: x.astype(np.float32) for m, x in centred(tiny("image", "text")).items()})
    same = lambda model, p: model.loss(p, model.frozen, graph(), triples(), KEY)
    close(same(trained, {**params, "features": features}), same(frozen, params))
    slope = jax.grad(lambda p: same(trained, p))({**params, "features": features})["features"]
    assert all((np.abs(x) > 0).any() for x in slope.values())


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("bm3", {"negatives": 2}, "negatives=2: has no effect on bm3"),
        ("bm3", {"draw": "independent"}, "draw=independent: has no effect on bm3"),
        ("bm3", {"dropout": 1.0}, "dropout=1.0"),
        ("bm3", {"layers": 0}, "layers=0"),
        ("mgcn", {"contrast_weight": 0.0, "temperature": 0.5}, "temperature=0.5: has no effect on contrast_weight=0"),
        ("mgcn", {"neighbours": 0}, "neighbours=0"),
        ("pgl", {"l2": 0.1}, "l2=0.1: has no effect on pgl"),
        ("pgl", {"mode": "locl"}, "did you mean local"),
        ("pgl", {"rank": 8}, "rank=8: has no effect on mode=local"),
        ("pgl", {"mode": "global", "keep": 0.5}, "keep=0.5: has no effect on mode=global"),
        ("pgl", {"keep": 1.5}, "keep=1.5"),
        ("pgl", {"dropout": 0.5}, "dropout=0.5: has no effect on contrast_weight=0"),
    ],
)
def test_wrong_settings_are_named(name, settings, message):
    with pytest.raises(ValueError, match=message):
        methods.make_config(name, settings)


def test_features_are_needed_and_an_image_weight_two_modalities():
    for name in NAMES:
        with pytest.raises(ValueError, match=f"{name} reads item features and the data set has none"):
            methods.build(name, USERS, ITEMS)
    with pytest.raises(ValueError, match=r"image_weight=0.5: has no effect on pgl where the features are text"):
        methods.build("pgl", USERS, ITEMS, tiny("text"), image_weight=0.5)


# ---- in the engine -----------------------------------------------------------------------------------------


@functools.cache
def data(users=40, items=60):
    return synthetic.make(users, items, min_history=4, median_history=8, max_history=20)


def catalogue_of(made) -> Catalogue:
    return Catalogue({modality: x.values for modality, x in made.features.items()})


def method(name, **settings):
    return methods.build(name, 40, 60, catalogue_of(data()), **{**SMALL, **settings})


@functools.cache
def engine_of(name, buckets=2, devices=1):
    # sgd: adaptive steps blow rounding up where a gradient is nearly zero
    split = splits.leave_one_out(data().interactions)
    return rounds.make_engine(
        method(name, optimizer="sgd", lr=0.5), clients.build(split, max_buckets=buckets, num_devices=devices)
    )


@functools.cache
def seen(name="vbpr") -> tuple[pairwise.Seen, np.ndarray]:
    """What the server receives in a round, and the training items as a matrix."""
    engine = engine_of(name)
    shared = rounds.publish(engine, KEY, (state := engine.init(KEY)).server, 0)
    arguments = (engine, KEY, shared, state.clients, state.mail, jnp.int32(0), engine.everybody)
    samples, count = jax.device_get(rounds.local_round(engine)(*arguments)[1].value)
    split = splits.leave_one_out(data().interactions)
    matrix = np.zeros((40, 60))
    matrix[split.train.user, split.train.item] = 1
    length = np.array([(samples[u, : count[u]] < 0).sum() for u in range(40)], np.int32)
    return pairwise.Seen(*(jnp.asarray(x) for x in (samples, count, length))), matrix


def test_an_epoch_meets_every_training_pair_once_with_a_negative_of_the_user():
    received, matrix = seen()
    for user in range(40):
        mine = np.asarray(received.samples[user, : received.count[user]])
        assert (mine[: received.length[user]] < 0).all() and (mine[received.length[user] :] >= 0).all()
        assert (mine < 0).sum() == matrix[user].sum()
    close(pairwise.interactions(received, 60), matrix, 0)

    def count(carry, batch, key):
        positives, negatives = carry
        positives = positives.at[batch.user, batch.positive].add(batch.mask)
        return positives, negatives.at[batch.user, batch.negative].add(batch.mask)

    zeros = jnp.zeros((40, 60))
    positives, negatives = jax.jit(lambda: pairwise.over_triples(KEY, received, 32, count, (zeros, zeros)))()
    close(positives, matrix, 0)
    close(negatives.sum(1), matrix.sum(1), 0)
    assert (np.asarray(negatives)[matrix > 0] == 0).all()
    for user in range(40):
        mine = np.asarray(received.samples[user, : received.count[user]])
        assert set(np.flatnonzero(negatives[user])) <= set(mine[mine >= 0].tolist())


@pytest.mark.parametrize("name", NAMES)
def test_users_are_served_the_vectors_of_the_whole_graph(name):
    engine = engine_of(name)
    state, info = engine.round(KEY, engine.init(KEY), 0)
    assert 0.1 < info["loss"] < 2.0 and info["clients"] == 40
    private = state.server.private
    first = engine.init(KEY).server.private["state"]["params"]
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), private["state"]["params"], first)
    assert all(jax.tree.leaves({k: v for k, v in moved.items() if k != "features"}))
    config = method(name, optimizer="sgd", lr=0.5).config
    model = MODULES[name].model(config, 40, 60, name, catalogue_of(data()))
    whole = pairwise.normalised(jnp.asarray(seen()[1], jnp.float32))
    users, items = model.vectors(private["state"]["params"], model.frozen, whole)
    close((state.mail["user"][:40], state.server.shared["item"]), (users, items))
    scores = engine.method.score(state.server.shared, {"item": items, "user": state.mail["user"][3]}, None)
    close(scores, np.asarray(items) @ np.asarray(users)[3])
    assert private["round"] == 1


@pytest.mark.parametrize("name", NAMES)
def test_absent_users_are_not_trained_on(name):
    engine = engine_of(name)
    before = engine.init(KEY).server.private["state"]["params"]["user"]
    state, _ = engine.round(KEY, engine.init(KEY), 0, engine.cohort(np.arange(10)))
    moved = (np.asarray(state.server.private["state"]["params"]["user"]) != np.asarray(before)).any(1)
    np.testing.assert_array_equal(moved, np.arange(40) < 10)
    still, _ = engine.round(KEY, engine.init(KEY), 0, engine.cohort(np.array([], int)))
    close(still.server, engine.init(KEY).server, 0)


@pytest.mark.skipif(len(jax.devices()) < 4, reason="needs 4 devices")
@pytest.mark.parametrize("name", GRAPHS)
def test_buckets_and_devices_change_nothing(name):
    results = []
    for layout in ({}, {"buckets": 1, "devices": 4}):
        engine = engine_of(name, **layout)
        state, infos = engine.init(KEY), []
        for t in range(2):
            state, info = engine.round(KEY, state, t)
            infos.append(float(info["loss"]))
        results.append((jax.device_get(state.server), infos))
    close(*results, 1e-4)


@pytest.mark.parametrize(("name", "epochs"), [("vbpr", 12), ("two_tower", 30), ("bm3", 50), ("mgcn", 12), ("pgl", 12)])
def test_it_beats_popularity_where_tastes_are_planted(name, epochs):
    made = synthetic.make(200, 100)
    split = splits.leave_one_out(made.interactions)
    built = methods.build(
        name, 200, 100, catalogue_of(made), lr=0.03 if name == "vbpr" else 0.01, dim=16, batch_size=256
    )
    engine = rounds.make_engine(built, clients.build(split, max_buckets=1))
    state = engine.init(KEY)
    for t in range(epochs):
        state, _ = engine.round(KEY, state, t)
    scores = np.asarray(state.mail["user"][:200]) @ np.asarray(state.server.shared["item"]).T
    popular = np.tile(np.bincount(split.train.item, minlength=100).astype(float), (200, 1))

    def hits(scores):
        scores = scores.copy()
        for pairs in (split.train, split.valid):
            scores[pairs.user, pairs.item] = -np.inf
        target = scores[split.test.user, split.test.item]
        return ((scores[split.test.user] >= target[:, None]).sum(1) <= 10).mean()

    assert hits(scores) > 1.3 * hits(popular)
