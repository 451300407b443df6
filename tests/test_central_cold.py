"""Server-trained models for cold items: Heater, GAR and ALDI over their frozen teacher, and DiffRec."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_rec import methods, metrics, reference, rounds
from fedjax_rec.central import diffrec, heater, pretrained
from fedjax_rec.checkpoint import Checkpoints
from fedjax_rec.data import clients, splits, synthetic
from fedjax_rec.evaluate import make_evaluator
from fedjax_rec.item_sources import Catalogue
from fedjax_rec.item_sources.cold import conditions
from fedjax_rec.method import Aggregate, Batch, Listed, LocalData
from fedjax_rec.server.diffusion import linear_schedule

USERS, ITEMS, EMPTY = 40, 60, 5  # user EMPTY has no training item
KEY = jax.random.key(3)
TAUGHT = ("heater", "gar", "aldi")
DIFFREC = {"layers": (8,), "batch_size": 16}
SMALL = {"dim": 4, "batch_size": 16, "pretrain": 1, "init_std": 0.5, "condition_dim": 4}


def close(a, b, tolerance=1e-5):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance), a, b)


@functools.cache
def split():
    made = splits.cold_items(synthetic.make(USERS, ITEMS, min_history=6, median_history=9, max_history=20).interactions)
    rest = made.train.user != EMPTY
    return dataclasses.replace(made, train=splits.Pairs(made.train.user[rest], made.train.item[rest]))


def warm_items():
    return split().candidates["train"]


def features():
    return np.random.default_rng(5).standard_normal((ITEMS, 7)).astype(np.float32)


def built(name, **settings):
    settings = {**(DIFFREC if name == "cs_diffrec" else SMALL), **settings}
    return methods.build(name, USERS, ITEMS, Catalogue({"text": features()}, warm_items()), **settings)


def engine_of(name, *, buckets=2, devices=1, **settings):
    return rounds.make_engine(built(name, **settings), clients.build(split(), max_buckets=buckets, num_devices=devices))


class Run(NamedTuple):
    servers: list  # before the first round and after each: two of the teacher's, two more, of ten users, of nobody
    losses: list
    mail: Any
    ranks: Any


@functools.cache
def trained(name):
    engine = engine_of(name, buckets=1, **({"pretrain": 2} if name in TAUGHT else {}))
    state, losses = engine.init(KEY), []
    servers = [jax.device_get(state.server)]
    for round_, users in enumerate([USERS, USERS, USERS, USERS, 10, 0]):
        state, info = engine.round(KEY, state, round_, engine.cohort(np.arange(users)))
        assert info["clients"] == users
        servers.append(jax.device_get(state.server))
        losses.append(float(info["loss"]))
    return Run(servers, losses, jax.device_get(state.mail), make_evaluator(engine, split()).ranks(KEY, state, 6))


# ---- one step, against NumPy -------------------------------------------------------------------------------

BOUGHT = {0: [0, 1], 1: [2], 2: [3, 1, 0], 3: [4]}  # places among the warm items
LEFT = {0: [5, 5], 1: [6], 3: [0]}  # user 2 has no negatives


def received():
    """Uploads of a round in which few take part, each with one kind of negative."""
    warm = np.flatnonzero(warm_items())
    samples, count = np.zeros((USERS, 6), np.int32), np.zeros(USERS, np.int32)
    for user, places in BOUGHT.items():
        mine = [*(-1 - warm[places]), *warm[LEFT.get(user, [])]]
        samples[user, : len(mine)], count[user] = mine, len(mine)
    return Aggregate((jnp.asarray(samples), jnp.asarray(count)), jnp.float32(4.0), jnp.float32(4.0))


def triples():
    """(users, positives, negatives) of `received` that a model of triples trains on."""
    warm = np.flatnonzero(warm_items())
    return np.array([(u, warm[i], warm[LEFT[u][0]]) for u in LEFT for i in BOUGHT[u]]).T


def with_random_networks(method, spread=0.5):
    """A server before the networks' first round, with weights, biases and statistics that are not tiny."""
    server = method.init_server(KEY)
    rng = np.random.default_rng(1)

    def drawn(x):
        values = spread * rng.standard_normal(x.shape)
        return jnp.asarray(values, jnp.float32)

    def redraw(trained):
        statistics = jax.tree.map(lambda x: jnp.abs(drawn(x)) + 0.5, trained.statistics)
        return trained._replace(params=jax.tree.map(drawn, trained.params), statistics=statistics)

    is_network = lambda x: isinstance(x, pretrained.Trained)
    own = jax.tree.map(lambda x: redraw(x) if is_network(x) else x, server.private["state"]["own"], is_leaf=is_network)
    state = {**server.private["state"], "own": own}
    return server.replace(private={**server.private, "state": state, "round": jnp.int32(method.config.pretrain)})


def exact(tree):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), jax.device_get(tree))


def norm(x, layer, statistics=None):
    """Batch normalisation by the rows of x, or by running statistics."""
    mean, var = (x.mean(0), x.var(0)) if statistics is None else (statistics["mean"], statistics["var"])
    return (x - mean) / np.sqrt(var + 1e-3) * layer.get("scale", 1.0) + layer["bias"]


def tower(x, p, statistics=None, first=False):
    at = lambda name: None if statistics is None else statistics[name]
    if first:
        x = norm(x, p["BatchNorm_0"], at("BatchNorm_0"))
    name = "BatchNorm_1" if first else "BatchNorm_0"
    hidden = norm(x @ p["Dense_0"]["kernel"] + p["Dense_0"]["bias"], p[name], at(name))
    return np.tanh(hidden) @ p["Dense_1"]["kernel"] + p["Dense_1"]["bias"]


def weights_of(params, *names):
    """Sum of squares of the linear layers' weights."""
    total = 0.0
    for name, value in params.items():
        if isinstance(value, dict):
            total += 0.0 if "BatchNorm" in name else weights_of(value, *names)
        elif name in names:
            total += (value**2).sum()
    return total


def softplus(x):
    return np.logaddexp(0.0, x)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def follows(before, after, loss, rate):
    """Every weight moved by -rate times the slope of `loss`, by central differences at a few places of each."""
    rng, leaves = np.random.default_rng(2), jax.tree_util.tree_leaves_with_path(before)
    for path, leaf in leaves:
        moved = functools.reduce(lambda tree, key: tree[key.key], path, after)
        for place in rng.integers(0, leaf.size, 2):
            index, slope = np.unravel_index(place, leaf.shape), 0.0
            for side in (1, -1):
                kept = leaf[index]
                leaf[index] = kept + side * 1e-5
                slope += side * loss(before) / 2e-5
                leaf[index] = kept
            np.testing.assert_allclose(
                moved[index] - leaf[index], -rate * slope, rtol=2e-3, atol=3e-6, err_msg=str(path)
            )
    assert len(leaves) > 5


def teacher_of(server):
    """The frozen (users, items), the latter 0 where cold."""
    teacher = exact(server.private["state"]["teacher"]["params"])
    return teacher["user"], teacher["item"] * warm_items()[:, None]


def content_of(method):
    values = conditions(Catalogue({"text": features()}, warm_items()), "x", method.config.condition_dim, whiten=True)
    return values.astype(np.float64)


def mixture(p, content, dim):
    gates = np.tanh(content @ p["gate"]["kernel"] + p["gate"]["bias"])
    made = np.tanh(content @ p["experts"]["kernel"] + p["experts"]["bias"])
    return np.tanh(sum(gates[:, [k]] * made[:, k * dim : (k + 1) * dim] for k in range(gates.shape[1])))


def columnwise(values, cut, known):
    made = (values - values[known].mean(0)) / values[known].std(0)
    return np.where(known[:, None], np.clip(made, -cut, cut), 0.0)


STEP = {
    "heater": {"alpha": 0.05, "l2": 0.01, "experts": 3, "rate_decay": 0.5, "decay_every": 2},
    "gar": {"generator_lr": 0.2, "alpha": 0.3, "beta": 0.2, "l2": 0.02, "dropout": 0.0, "generator_dropout": 0.0},
    "aldi": {"alpha": 0.9, "beta": 0.3, "gamma": 0.2, "l2": 0.02},
}
OF = {"heater": {"randomised": 1.0}, "gar": {}, "aldi": {"tws": False}}


@functools.cache
def stepping(name, **settings):
    """(method, its server's compiled update): everything in one batch, by SGD."""
    one_batch = {"optimizer": "sgd", "lr": 0.1, "batch_size": 32, "negatives": 2}
    method = built(name, **one_batch, **STEP[name], **settings)
    return method, jax.jit(method.server_update)


@pytest.mark.parametrize("randomised", [0.0, 1.0])
def test_a_step_of_heater_follows_its_loss(randomised):
    method, update = stepping("heater", randomised=randomised)
    server = with_random_networks(method)
    after, _ = update(KEY, server, received())
    warm, dim = np.flatnonzero(warm_items()), 4
    u, q = teacher_of(server)
    u, q = columnwise(u, 5.0, np.ones(USERS, bool)), columnwise(q, 1.0, warm_items())
    rows = [(user, warm[i], label) for of, label in ((BOUGHT, 1), (LEFT, 0)) for user in of for i in of[user]]
    user, item, label = np.array(rows).T
    told = content_of(method)[item]

    def loss(p):
        made = mixture(p["mixture"], told, dim)
        read = made if randomised else q[item]
        score = (tower(u[user], p["towers"]["user"]) * tower(read, p["towers"]["item"])).sum(1)
        apart = ((made - q[item]) ** 2).sum()
        return ((score - label) ** 2).mean() + 0.05 * apart + 0.01 * weights_of(p, "kernel", "bias")

    was, now = (s.private["state"]["own"]["network"] for s in (server, after))
    follows(exact(was.params), exact(now.params), loss, 0.1)
    layer = exact(was.params)["towers"]["user"]["Dense_0"]
    batch = (u[user] @ layer["kernel"] + layer["bias"]).mean(0)
    held, moved = (exact(x.statistics)["towers"]["user"]["BatchNorm_0"]["mean"] for x in (was, now))
    close(moved, 0.9 * held + 0.1 * batch)


def test_half_of_heaters_samples_are_made_from_content():
    """Where q' is far from every q, the share of the samples that read it shows in the mean input of the tower."""
    config = heater.Config(dim=3, randomised=0.3)
    network = heater.Network(3, config.experts)
    many = 4000
    users, items, content = jnp.zeros((many, 3)), jnp.zeros((many, 3)), jnp.ones((many, 2))
    variables = network.init(KEY, users[:1], items[:1], content[:1], jnp.zeros(1, bool))
    params = jax.tree.map(lambda x: jnp.ones_like(x), variables["params"])
    batch = users, items, content, jnp.zeros(many), jnp.ones(many)
    _, moved = heater.loss_of(config, params, variables["batch_stats"], batch, KEY)
    mean = moved["towers"]["item"]["BatchNorm_0"]["mean"] / 0.1
    made = 3 * np.tanh(5 * np.tanh(3.0) ** 2)  # three equal inputs through a kernel of ones
    np.testing.assert_allclose((mean - 1) / made, 0.3, atol=0.03)


def test_heaters_rate_falls_in_steps():
    method, update = stepping("heater", randomised=1.0)
    server = with_random_networks(method)
    change = []
    for since in (0, 1, 2, 5):
        held = server.replace(private={**server.private, "round": jnp.int32(1 + since)})
        after = update(KEY, held, received())[0]
        networks = (s.private["state"]["own"]["network"].params["towers"]["user"]["Dense_1"] for s in (after, server))
        change.append(np.subtract(*(x["kernel"] for x in networks)))
    for scaled, factor in zip(change, (1, 1, 0.5, 0.25), strict=True):
        close(scaled, factor * change[0], 1e-4)


@pytest.mark.parametrize("tws", [False, True])
def test_a_step_of_aldi_follows_its_loss(tws):
    method, update = stepping("aldi", tws=tws)
    server = with_random_networks(method)
    after, _ = update(KEY, server, received())
    p, q = teacher_of(server)
    user, i, j = triples()
    content = content_of(method)
    frequency = np.zeros(ITEMS)
    for mine in BOUGHT.values():
        frequency[np.flatnonzero(warm_items())[mine]] += 1 / len(mine)
    ratio = len(BOUGHT) / (frequency > 0).sum()
    weight = np.tanh(np.minimum(4 / ratio * frequency, 4.0))[i] if tws else np.ones(len(i))

    def loss(params):
        f = tower(p[user], params["user"])
        g = tower(content[np.append(i, j)], params["item"])
        g_i, g_j = g[: len(i)], g[len(i) :]
        entropy = lambda logit, target: -target * np.log(sigmoid(logit)) - (1 - target) * np.log(sigmoid(-logit))
        total = 0.0
        for n in range(len(i)):
            s_i, s_j = f[n] @ g_i[n], f[n] @ g_j[n]
            t_i, t_j = p[user[n]] @ q[i[n]], p[user[n]] @ q[j[n]]
            s_apart = g_i[n] @ g_i[n] - np.mean([g_i[n] @ other for other in g_j])
            t_apart = q[i[n]] @ q[i[n]] - np.mean([q[i[n]] @ q[other] for other in j])
            total += softplus(s_j - s_i)
            total += 0.9 * weight[n] * entropy(s_i - s_j, sigmoid(t_i - t_j))
            total += 0.3 * weight[n] * entropy(s_apart, sigmoid(t_apart))
            total += 0.2 * (abs(t_i - s_i) + abs(t_j - s_j))
        return total / len(i) + 0.01 * weights_of(params, "kernel", "bias")

    networks = (s.private["state"]["own"]["network"].params for s in (server, after))
    follows(*map(exact, networks), loss, 0.1)


def test_a_step_of_gar_follows_both_losses():
    """The recommender's first, and the generator's against the recommender that has stepped."""
    method, update = stepping("gar")
    server = with_random_networks(method)
    after, _ = update(KEY, server, received())
    p, q = teacher_of(server)
    user, i, j = triples()
    told = content_of(method)[i]
    was, now = (s.private["state"]["own"] for s in (server, after))
    stats = {name: exact(was[name].statistics) for name in ("critic", "generator")}
    critic, stepped = (exact(x["critic"].params) for x in (was, now))
    generator = exact(was["generator"].params)
    made = tower(told, generator, stats["generator"])

    def critic_loss(params):
        u = tower(np.tile(p[user], (3, 1)), params["user"], first=True)
        v = tower(np.concatenate([q[i], made, q[j]]), params["item"], first=True)
        real, fake, other = np.split((u * v).sum(1), 3)
        return softplus(-(real - 0.8 * fake - 0.2 * other)).mean() + 0.01 * weights_of(params, "kernel")

    follows(critic, stepped, critic_loss, 0.1)
    moved = exact(now["critic"].statistics)
    batch = np.concatenate([q[i], made, q[j]])
    close(
        moved["item"]["BatchNorm_0"]["mean"],
        0.99 * stats["critic"]["item"]["BatchNorm_0"]["mean"] + 0.01 * batch.mean(0),
    )
    close(
        moved["item"]["BatchNorm_0"]["var"], 0.99 * stats["critic"]["item"]["BatchNorm_0"]["var"] + 0.01 * batch.var(0)
    )

    def generator_loss(params):
        vectors = tower(told, params)
        u = tower(p[user], stepped["user"], moved["user"], first=True)
        fake, real = ((u * tower(x, stepped["item"], moved["item"], first=True)).sum(1) for x in (vectors, q[i]))
        apart = np.abs(vectors - q[i]).mean()
        return 0.7 * softplus(-(fake - real)).mean() + 0.3 * apart + 0.01 * weights_of(params, "kernel")

    follows(generator, exact(now["generator"].params), generator_loss, 0.2)


@pytest.mark.parametrize("name", TAUGHT)
def test_batches_without_negatives_change_no_network(name):
    """Nothing to take a mean and a variance of."""
    method, update = stepping(name, **OF[name])
    server, told = with_random_networks(method), received()
    samples, _ = told.value
    only_positives = (samples < 0).sum(1, dtype=jnp.int32)
    after, mail = update(KEY, server, told._replace(value=(samples, only_positives)))
    if name == "heater":  # learns from positives alone
        assert all(np.isfinite(x).all() for x in jax.tree.leaves((after.shared, mail)))
    else:
        close(after.private["state"], server.private["state"], 0)


# ---- what is served ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TAUGHT)
def test_warm_items_are_served_the_warm_way_and_cold_ones_from_content(name):
    """By running statistics, in NumPy."""
    method, update = stepping(name, **OF[name])
    after, mail = update(KEY, with_random_networks(method), received())
    own, (p, q), content, warm = after.private["state"]["own"], teacher_of(after), content_of(method), warm_items()
    if name == "aldi":
        params, statistics = exact(own["network"].params), exact(own["network"].statistics)
        users = np.hstack([p, tower(p, params["user"], statistics["user"])])
        student = tower(content, params["item"], statistics["item"])
        items = np.where(warm[:, None], np.hstack([q, 0 * q]), np.hstack([0 * q, student]))
    elif name == "heater":
        params, statistics = exact(own["network"].params), exact(own["network"].statistics)["towers"]
        towers = params["towers"]
        users = tower(columnwise(p, 5.0, np.ones(USERS, bool)), towers["user"], statistics["user"])
        read = np.where(warm[:, None], columnwise(q, 1.0, warm), mixture(params["mixture"], content, 4))
        items = tower(read, towers["item"], statistics["item"])
    else:
        params, statistics = exact(own["critic"].params), exact(own["critic"].statistics)
        made = tower(content, exact(own["generator"].params), exact(own["generator"].statistics))
        users = tower(p, params["user"], statistics["user"], first=True)
        items = tower(np.where(warm[:, None], q, made), params["item"], statistics["item"], first=True)
    close(mail["user"], np.asarray(after.private["user"]), 0)
    close(mail["user"], users, 1e-4)
    close(after.shared["item"], items, 1e-4)


@pytest.mark.parametrize("name", TAUGHT)
def test_the_teacher_trains_first_and_is_frozen_then(name):
    seen = [server.private["state"] for server in trained(name).servers]
    same = lambda a, b: all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))
    still = lambda part: [same(a[part], b[part]) for a, b in itertools.pairwise(seen[:5])]
    assert still("teacher") == [False, False, True, True] and still("own") == [True, True, False, False]
    first, last = (s["teacher"]["params"]["item"] for s in (seen[0], seen[4]))
    touched = (first != last).any(1)
    assert not touched[~warm_items()].any() and touched[np.unique(split().train.item)].all()


# ---- DiffRec -----------------------------------------------------------------------------------------------


def test_a_first_beta_changes_the_first_step():
    """The numbers of linear variances from 1e-5 to 2e-3, whose first beta is 1e-5 anyway; and the loop itself."""
    snr = [99999, 4325.9, 2210.3, 1484.1, 1117.0, 895.4, 747.1, 640.9, 561.1, 499.0]
    weight = [1, 95673, 2115.6, 726.2, 367.1, 221.6, 148.3, 106.2, 79.8, 62.1]
    fixed = linear_schedule(10, 0.1, 1e-4, 0.02, first_beta=1e-5)
    np.testing.assert_allclose(fixed.snr, snr, rtol=1e-4)
    np.testing.assert_allclose(fixed.weight, weight, rtol=2e-3)
    np.testing.assert_allclose(fixed.on_clean[1:4], [0.9567, 0.4890, 0.3285], atol=1e-4)
    other, kept, before = linear_schedule(5, 0.01, 0.1, 1.0, first_beta=1e-5), 1.0, 1.0
    wanted = 1 - 0.01 * np.linspace(0.1, 1.0, 5)
    for t in range(5):
        beta = 1e-5 if t == 0 else 1 - wanted[t] / wanted[t - 1]
        before, kept = kept, kept * (1 - beta)
        np.testing.assert_allclose(other.noise[t] ** 2, 1 - kept, rtol=1e-4)
        np.testing.assert_allclose(other.on_clean[t], np.sqrt(before) * beta / (1 - kept), rtol=1e-4)
        np.testing.assert_allclose(
            other.on_noisy[t], np.sqrt(1 - beta) * (1 - before) / (1 - kept), rtol=1e-4, atol=1e-9
        )


def client_data(history):
    """What scoring a client needs, its history padded."""
    padded = np.array([*history, 0, 0], np.int32)
    return LocalData(
        rows=jnp.arange(ITEMS),
        row_mask=jnp.ones(ITEMS, bool),
        samples=Listed(Batch(jnp.zeros((1, 1), jnp.int32), jnp.zeros((1, 1)), jnp.zeros((1, 1)))),
        history=jnp.asarray(padded),
        history_mask=jnp.arange(len(padded)) < len(history),
        num_samples=jnp.zeros(()),
        num_steps=jnp.int32(0),
        round=jnp.int32(0),
    )


def scores_of(method, history, params=None):
    shared = method.init_server(KEY).shared
    return np.asarray(method.score(shared, params or {}, client_data(history)), np.float64), exact(shared["network"])


@pytest.mark.parametrize("sampling_steps", [0, 3])
def test_scores_are_the_posterior_means_from_the_history(sampling_steps):
    settings = {"noise_scale": 0.001, "noise_low": 0.1, "noise_high": 0.8, "steps": 4, "layers": (6, 5)}
    method = built("cs_diffrec", **settings, sampling_steps=sampling_steps)
    client = method.init_client(jax.random.key(8), method.init_server(KEY).shared)
    scores, p = scores_of(method, [3, 17], client)
    beta, wanted = np.zeros(4), 1 - 0.001 * np.linspace(0.1, 0.8, 4)
    beta[0], beta[1:] = 1e-5, 1 - wanted[1:] / wanted[:-1]
    kept = np.cumprod(1 - beta)
    x = np.zeros(ITEMS)
    x[[3, 17]] = 1.0
    if sampling_steps:
        drawn = np.asarray(jax.random.normal(jax.random.key(client["noise"]), (1, ITEMS)), np.float64)[0]
        x = np.sqrt(kept[2]) * x + np.sqrt(1 - kept[2]) * drawn
    else:
        assert client == {}

    def predicted(x, t):
        angle = t * 1e4 ** (-np.arange(5) / 5)
        time = np.append(np.cos(angle), np.sin(angle)) @ p["Dense_0"]["kernel"] + p["Dense_0"]["bias"]
        hidden = np.append(x, time)
        for layer in ("Dense_1", "Dense_2", "Dense_3"):  # 6, 5, 6
            hidden = np.tanh(hidden @ p[layer]["kernel"] + p[layer]["bias"])
        return hidden @ p["Dense_4"]["kernel"] + p["Dense_4"]["bias"]

    for t in range(3, -1, -1):
        before = kept[t - 1] if t else 1.0
        clean = predicted(x, t)
        x = (np.sqrt(before) * beta[t] * clean + np.sqrt(1 - beta[t]) * (1 - before) * x) / (1 - kept[t])
    close(scores, x, 1e-4)


def test_cold_scores_from_content_are_the_nearest_warm_ones():
    literal, _ = scores_of(built("cs_diffrec"), [1, 2])
    scores, _ = scores_of(built("cs_diffrec", cold="content", neighbours=3), [1, 2])
    warm, cold = np.flatnonzero(warm_items()), np.flatnonzero(~warm_items())
    close(scores[warm], literal[warm], 0)
    content = conditions(Catalogue({"text": features()}, warm_items()), "x", 0)
    unit = content / np.linalg.norm(content, axis=1, keepdims=True)
    for item in cold:
        near = sorted(warm, key=lambda w, item=item: -unit[item] @ unit[w])[:3]
        weights = np.maximum([unit[item] @ unit[w] for w in near], 0) + 1e-9
        np.testing.assert_allclose(scores[item], weights @ literal[near] / weights.sum(), rtol=1e-4, atol=1e-5)
    assert np.abs(scores[cold] - literal[cold]).min() > 0


def test_diffrec_trains_on_everybodys_histories_and_draws_no_negatives():
    engine = engine_of("cs_diffrec")
    state = engine.init(KEY)
    shared = rounds.publish(engine, KEY, state.server, 0)
    arguments = (engine, KEY, shared, state.clients, state.mail, jnp.int32(0), engine.everybody)
    samples, count = jax.device_get(rounds.local_round(engine)(*arguments)[1].value)
    for user in range(USERS):
        history = split().train.item[split().train.user == user]
        np.testing.assert_array_equal(np.sort(-1 - samples[user, : count[user]]), np.sort(history))
    losses = []
    for round_ in range(12):
        state, info = engine.round(KEY, state, round_)
        losses.append(float(info["loss"]))
    assert losses[0] == 0.0 and losses[11] < 0.7 * losses[1]  # the loss of the epoch before
    assert (np.asarray(state.server.private["count"]) == 10).all()


def test_diffrec_beats_popularity_where_no_item_is_cold():
    made = splits.leave_one_out(synthetic.make(200, 100).interactions)
    method = methods.build("cs_diffrec", 200, 100, layers=(32,), batch_size=32, lr=0.01)
    engine = rounds.make_engine(method, clients.build(made, max_buckets=1))
    state = engine.init(KEY)
    for round_ in range(20):
        state, _ = engine.round(KEY, state, round_)
    evaluator = make_evaluator(engine, made)
    hit = lambda ranks: metrics.summarise(ranks.test, (10,))["HR@10"]
    popular = reference.same_for_all(evaluator, reference.popularity_of(evaluator.split))
    assert hit(evaluator.ranks(KEY, state, 20)) > 1.3 * hit(popular)


def test_importance_draws_follow_the_last_losses():
    losses = np.random.default_rng(0).random((3, 10)).astype(np.float32)
    close(diffrec.chances(jnp.asarray(losses), jnp.array([10, 9, 10])), np.full(3, 1 / 3))
    root = np.sqrt((losses**2).mean(1))
    expected = 0.999 * root / root.sum() + 0.001 / 3
    close(diffrec.chances(jnp.asarray(losses), jnp.array([10, 10, 10])), expected)
    close(diffrec.chances(jnp.zeros((3, 10)), jnp.full(3, 10)).sum(), 0.001)  # nothing left to learn: no NaN


def test_the_last_ten_losses_of_each_step_are_kept():
    rng = np.random.default_rng(1)
    held, count, lists = jnp.zeros((3, 10)), jnp.zeros(3, jnp.int32), [[], [], []]
    for size in (5, 5, 40, 7):
        step, new = rng.integers(0, 3, size).astype(np.int32), rng.random(size).astype(np.float32)
        step[step == 2] = np.where(rng.random((step == 2).sum()) < 0.6, 0, 2)  # a step that is rare
        mask = (rng.random(size) < 0.8).astype(np.float32)
        for t, value, there in zip(step, new, mask, strict=True):
            if there:
                lists[t].append(value)
        held, count = diffrec.remember(held, count, jnp.asarray(step), jnp.asarray(new), jnp.asarray(mask))
        for t, values in enumerate(lists):
            last = values[-10:]
            assert count[t] == len(last)
            np.testing.assert_allclose(held[t], [*([0.0] * (10 - len(last))), *last])


def test_the_loss_of_diffrec_is_weighted_and_divided_by_the_chance():
    rng = np.random.default_rng(2)
    made, clean = rng.random((2, 4, 6)).astype(np.float32)
    weight, chance = rng.random((2, 4)).astype(np.float32) + 0.1
    mask = np.array([1, 1, 0, 1], np.float32)
    total, each = 0.0, []
    for n in range(4):
        each.append(weight[n] * np.mean([(made[n, i] - clean[n, i]) ** 2 for i in range(6)]))
        total += mask[n] * each[-1] / chance[n] / 3
    close(diffrec.loss_of(*map(jnp.asarray, (made, clean, weight, chance, mask))), (total, np.array(each)))


# ---- in the engine -----------------------------------------------------------------------------------------

ALL = (*TAUGHT, "cs_diffrec")


def everything_is_finite(tree):
    return all(np.isfinite(x).all() for x in jax.tree.leaves(jax.device_get(tree)) if x.dtype.kind == "f")


@pytest.mark.parametrize("name", ALL)
def test_rounds_train_whoever_takes_part(name):
    """Users and items without interactions among them; and a round of nobody leaves all as it is."""
    run = trained(name)
    assert np.isfinite(run.losses).all() and everything_is_finite((run.servers, run.mail))
    everybody, few, nobody = run.servers[4:]
    pairs = zip(jax.tree.leaves(few.shared), jax.tree.leaves(everybody.shared), strict=True)
    assert all((a != b).any() for a, b in pairs)
    close(nobody, few, 0)
    assert run.ranks.nonfinite == 0 and np.isfinite(run.ranks.test[EMPTY]).any()


@pytest.mark.skipif(len(jax.devices()) < 4, reason="needs 4 devices")
@pytest.mark.parametrize("name", ["heater", "cs_diffrec"])
def test_buckets_and_devices_change_nothing(name):
    """One that reads all samples and one that reads histories; GAR and ALDI receive what Heater does."""
    run = trained(name)
    engine = engine_of(name, buckets=2, devices=4, **({"pretrain": 2} if name in TAUGHT else {}))
    state = engine.init(KEY)
    for round_ in range(3):
        state, info = engine.round(KEY, state, round_)
        np.testing.assert_allclose(info["loss"], run.losses[round_], rtol=1e-4)
    close(jax.device_get(state.server), run.servers[3], 1e-4)


LEARNS = {
    "heater": {"lr": 0.05, "batch_size": 128},
    "gar": {"lr": 0.005, "generator_lr": 0.005, "batch_size": 128, "alpha": 0.9, "beta": 0.5},
    "aldi": {"lr": 0.005, "batch_size": 128},
    "cs_diffrec": {"cold": "content", "neighbours": 5, "layers": (64,), "batch_size": 32, "lr": 0.01},
}


@pytest.mark.parametrize("name", ALL)
def test_cold_items_do_better_than_chance_where_features_tell(name):
    data = synthetic.make(200, 100, feature_noise=0.2)
    made = splits.cold_items(data.interactions)
    catalogue = Catalogue({k: v.values for k, v in data.features.items()}, made.candidates["train"])
    taught = {"pretrain": 10, "teacher_lr": 0.02, "dim": 16, "condition_dim": 7} if name in TAUGHT else {}
    method = methods.build(name, 200, 100, catalogue, **taught, **LEARNS[name])
    engine = rounds.make_engine(method, clients.build(made, max_buckets=1))
    state = engine.init(KEY)
    for t in range(30):
        state, _ = engine.round(KEY, state, t)
    evaluator = make_evaluator(engine, made)
    recall = lambda ranks: metrics.summarise(ranks.test, (5,))["Recall@5"]
    chance = 5 / made.candidates["test"].sum()
    assert recall(evaluator.ranks(KEY, state, 30)) > 1.6 * chance
    if taught:  # and the teacher has learned what was bought
        teacher = state.server.private["state"]["teacher"]["params"]
        users, items = np.asarray(teacher["user"]), np.asarray(teacher["item"])
        wanted = np.zeros((200, 100), bool)
        wanted[made.train.user, made.train.item] = True
        scores, others = users @ items.T, ~wanted & made.candidates["train"]
        right = [(scores[u, wanted[u], None] > scores[u, others[u]]).mean() for u in range(200) if wanted[u].any()]
        assert np.mean(right) > 0.8


@pytest.mark.parametrize(
    ("name", "setting", "message"),
    [
        ("heater", {"pretrain": 0}, "pretrain=0: expected a number > 0"),
        ("heater", {"randomised": 1.5}, "randomised=1.5"),
        ("heater", {"item_lr_scale": 3.0}, "item_lr_scale=3.0: has no effect on centralised training"),
        ("gar", {"beta": -0.1}, "beta=-0.1"),
        ("gar", {"dropout": 1.0}, "dropout=1.0"),
        ("aldi", {"gamma": -1.0}, "gamma=-1.0"),
        ("aldi", {"tws_limit": 2.0}, "tws_limit=2.0: has no effect on tws=false"),
        ("cs_diffrec", {"negatives": 2}, "negatives=2: has no effect on cs_diffrec"),
        ("cs_diffrec", {"dim": 8}, "dim=8: has no effect on cs_diffrec"),
        ("cs_diffrec", {"neighbours": 5}, "neighbours=5: has no effect on cold=literal"),
        ("cs_diffrec", {"sampling_steps": 6}, "sampling_steps=6: expected a number in"),
        ("cs_diffrec", {"noise_low": 0.1}, "noise_scale . noise_high"),
        ("cs_diffrec", {"cold": "knn"}, "cold='knn': expected one of literal, content"),
    ],
)
def test_wrong_settings_are_named(name, setting, message):
    with pytest.raises(ValueError, match=message):
        methods.make_config(name, setting)


@pytest.mark.parametrize("name", TAUGHT)
def test_cold_items_and_features_are_required(name):
    with pytest.raises(ValueError, match=f"{name} makes vectors of cold items, .* or choose --method=mf"):
        methods.build(name, USERS, ITEMS, Catalogue({"text": features()}))
    with pytest.raises(ValueError, match="item features and the data set has none"):
        methods.build(name, USERS, ITEMS, Catalogue({}, warm_items()))


@pytest.mark.parametrize("name", ALL)
def test_a_state_goes_through_a_checkpoint_in_either_phase(name, tmp_path):
    servers = trained(name).servers
    with Checkpoints(tmp_path) as held:
        for place in (1, 4):
            held.save(place, {"server": servers[place]}, {})
            found = held.load({"server": servers[0]})[1]["server"]
            assert jax.tree.structure(found) == jax.tree.structure(servers[place])
            close(found, servers[place], 0)
