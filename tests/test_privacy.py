"""Noise on what clients send, what it is worth, and attacks on it."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import subprocess
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick

from fedjax_rec import methods, report, run
from fedjax_rec.data import clients, splits, synthetic
from fedjax_rec.item_sources import Catalogue
from fedjax_rec.methods import fedrkg
from fedjax_rec.privacy import accounting, attacks, mechanisms
from fedjax_rec.privacy.accounting import Release
from fedjax_rec.privacy.mechanisms import Mechanism, private
from fedjax_rec.rounds import make_engine
from fedjax_rec.workdir import UsageError

USERS, ITEMS = 23, 90
KEY = jax.random.key(3)
SMALL = {"dim": 4, "batch_size": 8, "negatives": 2, "lr": 0.2, "item_lr_scale": 0.5, "init_std": 0.3}
OWN = {
    "gpfedrec": {"layers": (8,)},
    "ipfedrec": {"condition_dim": 6, "eta": 0.1, "reg": 10.0},
    "fedrkg": {"interval": 2, "beta": 0.6},
}
CENTRAL = {"ease": {}, "mf": {"dim": 4}}  # what the server alone has no use for is refused


def small(name: str) -> dict:
    return CENTRAL.get(name, SMALL)


@functools.cache
def data():
    return synthetic.make(USERS, ITEMS, min_history=4, median_history=7, max_history=15)


@functools.cache
def split():
    return splits.leave_one_out(data().interactions)


def built(name, **settings):
    warm = np.arange(ITEMS) % 10 > 0 if name == "ipfedrec" else None
    catalogue = Catalogue({modality: feature.values for modality, feature in data().features.items()}, warm)
    return methods.build(name, USERS, ITEMS, catalogue, **{**small(name), **OWN.get(name, {}), **settings})


def engine_of(method):
    return make_engine(method, clients.build(split(), max_buckets=1))


@functools.cache
def plain_engine():
    return engine_of(built("fedmf"))


def play(engine, rounds=2, cohort=None, key=KEY):
    state = engine.init(KEY)
    for number in range(rounds):
        state, _ = engine.round(key, state, number, None if cohort is None else engine.cohort(cohort))
    return jax.tree.map(np.asarray, jax.device_get(state))


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


# ---- mechanisms ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", mechanisms.DRAW)
def test_clipping_is_exact(kind):
    upload = {"item": jnp.arange(12.0).reshape(4, 3) - 5, "network": {"bias": jnp.array([3.0, -4.0])}}
    every = np.concatenate([np.ravel(x) for x in jax.tree.leaves(upload)])
    norm = float(np.abs(every).sum() if kind == "laplace" else np.linalg.norm(every))
    assert float(mechanisms.length(upload, kind)) == pytest.approx(norm, rel=1e-6)
    short = mechanisms.clipped(upload, Mechanism(kind, clip=norm / 4))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y / 4, rtol=1e-6), short, upload)
    assert_same(mechanisms.clipped(upload, Mechanism(kind, clip=norm * 1.01)), upload)


def test_padding_rows_are_not_part_of_an_upload():
    upload = {"item": jnp.array([[3.0], [4.0], [100.0]])}
    short = mechanisms.clipped(upload, Mechanism(clip=2.5), jnp.array([True, True, False]))
    np.testing.assert_allclose(short["item"], [[1.5], [2.0], [0.0]], rtol=1e-6)


@pytest.mark.parametrize(("kind", "std"), [("gaussian", 0.7), ("laplace", 0.7 * math.sqrt(2))])
def test_a_clients_noise(kind, std):
    upload = {"item": jnp.zeros((300, 40)), "network": jnp.zeros(20_000)}
    rows = jnp.arange(300) * 2
    noise = mechanisms.client_noise(KEY, Mechanism(kind, noise=0.7), upload, rows)
    for x in jax.tree.leaves(noise):
        # 12,000 draws and more: four standard errors of a mean and of a standard deviation (kurtosis 6 at most)
        assert abs(float(x.mean())) < 4 * std / math.sqrt(x.size)
        assert float(x.std()) == pytest.approx(std, rel=4 * math.sqrt(5 / 4 / x.size))
    np.testing.assert_array_equal(
        mechanisms.client_noise(KEY, Mechanism(kind, noise=0.7), {**upload, "item": upload["item"][:5]}, rows[5:0:-1])[
            "item"
        ],
        noise["item"][5:0:-1],  # an item's draw is the item's, wherever it stands in the working set
    )


def test_noise_on_touched_rows_leaves_the_others_at_zero():
    moved = np.arange(20) % 3 == 0
    upload = {"views": jnp.where(moved[:, None, None], 1.0, 0.0) * jnp.ones((20, 5, 2)), "network": jnp.zeros(3)}
    noise = mechanisms.client_noise(KEY, Mechanism(noise=1.0, rows="touched"), upload, jnp.arange(20))
    np.testing.assert_array_equal((np.asarray(noise["views"]) != 0).any((1, 2)), moved)
    assert (noise["network"] != 0).all()


@pytest.mark.parametrize("kind", mechanisms.DRAW)
def test_the_sum_of_all_draws_is_drawn_at_once(kind):
    """Three clients: far from the normal limit, so a Laplace sum has to be one."""
    size, levels = 200_000, np.array([0.001, 0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 0.999])
    apart = sum(mechanisms.DRAW[kind](k, (size,)) for k in jax.random.split(KEY, 3))
    at_once = mechanisms.summed_noise(jax.random.key(8), Mechanism(kind, noise=1.0), jnp.float32(3), (size,))
    normal = float(apart.std()) * jax.random.normal(jax.random.key(9), (size,))
    quantiles = lambda x: np.quantile(np.asarray(x), levels)
    gap = np.abs(quantiles(apart) - quantiles(at_once)).max()
    assert gap < 0.15  # of the 0.1 % quantiles, at about 8 for Laplace
    assert kind == "gaussian" or np.abs(quantiles(apart) - quantiles(normal)).max() > 3 * gap


@pytest.mark.parametrize("name", ["fedmf", "fedncf", "fedrkg", "gpfedrec"])
def test_no_noise_and_a_loose_clip_is_the_plain_method_bit_for_bit(name):
    plain = built(name)
    loose = private(plain, Mechanism(clip=1e15), USERS)
    tight = private(plain, Mechanism(clip=1e-3), USERS)
    reference = play(engine_of(plain))
    assert_same(play(engine_of(loose)), reference)
    differ = jax.tree.map(lambda x, y: (x != y).any(), play(engine_of(tight)).server, reference.server)
    assert any(jax.tree.leaves(differ))


@pytest.mark.parametrize("kind", mechanisms.DRAW)
@pytest.mark.parametrize("per_client", [False, True], ids=["summed", "per client"])
def test_noise_of_the_mean(kind, per_client):
    """Both ways give every row of the table the noise of a mean of n clients."""
    plain = plain_engine()
    noisy = private(plain.method, Mechanism(kind, noise=0.5), USERS, per_client=per_client)
    assert (noisy.rows == "all") == per_client
    noisy = engine_of(noisy)
    for cohort in (None, np.arange(6)):
        draws = []
        for seed in range(12):
            tables = [play(e, 1, cohort, jax.random.key(seed)).server.shared["item"] for e in (noisy, plain)]
            draws.append(tables[0] - tables[1])
        n = USERS if cohort is None else len(cohort)
        std = 0.5 * (math.sqrt(2) if kind == "laplace" else 1.0) / math.sqrt(n)
        # 4,320 draws: five standard errors of a standard deviation
        assert np.std(draws) == pytest.approx(std, rel=5 * math.sqrt(0.7 / np.size(draws)))
        assert np.std(draws, axis=(0, 2)).min() > 0.6 * std  # rows that nobody touched as well
    nobody = play(noisy, 1, np.array([], int)).server.shared["item"]
    np.testing.assert_array_equal(nobody, play(plain, 1, np.array([], int)).server.shared["item"])


@pytest.mark.parametrize("name", ["fedavg", "gpfedrec", "ipfedrec", "ease"])
def test_methods_whose_aggregate_or_upload_is_their_own(name):
    plain = built(name)
    noisy = private(plain, Mechanism("laplace", clip=5.0, noise=0.1), USERS)
    without = private(plain, Mechanism("laplace", clip=5.0), USERS)
    assert noisy.rows == ("touched" if name == "ipfedrec" else "all")
    one, other = play(engine_of(noisy), 1), play(engine_of(without), 1)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(one))
    pairs = zip(*map(jax.tree.leaves, (one.server.shared, other.server.shared)), strict=True)
    moved = [(x != y).mean() for x, y in pairs]
    assert max(moved) > 0.8  # nearly every entry of some role
    if name == "gpfedrec":
        assert (one.mail["item"] != other.mail["item"])[:USERS].mean() > 0.8


def test_where_tables_are_sent_their_change_is_clipped():
    """GPFedRec's upload is the table itself, whose norm is far above the bound."""
    plain = built("gpfedrec")
    shared = plain.publish(jax.random.key(0), plain.init_server(jax.random.key(1)))
    rows = jnp.arange(ITEMS)
    data = types.SimpleNamespace(row_mask=rows < ITEMS, rows=rows)
    moved = {"item": shared["item"] + 0.01 * jax.random.normal(jax.random.key(2), shared["item"].shape)}
    client = {"user": jnp.zeros(4), "network": {}}
    for clip in (0.05, 100.0):
        method = private(plain, Mechanism(clip=clip), USERS)
        _, sent = method.upload(jax.random.key(3), shared, client, moved, data)
        change = np.asarray(sent["item"] - shared["item"])
        whole = np.asarray(moved["item"] - shared["item"])
        expected = min(1.0, clip / np.linalg.norm(whole)) * whole
        np.testing.assert_allclose(change, expected, atol=1e-6)
    assert np.linalg.norm(shared["item"]) > 0.1 > 0.05


def test_clients_that_go_on_from_what_they_sent_are_refused():
    with pytest.raises(ValueError, match="method=cofedrec: its clients go on from tables that they have sent"):
        private(built("cofedrec"), Mechanism("laplace", noise=0.1), USERS)


def test_noise_on_every_row_does_not_go_with_a_mean_over_those_who_moved_it():
    by_row = built("fedmf", weighting="by_row")
    with pytest.raises(ValueError, match="a mean by row with dp_mechanism=laplace: noise moves every row"):
        private(by_row, Mechanism("laplace", noise=0.1), USERS)
    private(by_row, Mechanism("laplace", noise=0.1, rows="touched"), USERS)
    private(by_row, Mechanism("laplace", clip=0.1), USERS)  # a bound without noise moves nothing


def test_the_exchange_of_fedrkg_is_noised_once_for_all():
    plain = built("fedrkg", guidance="kg")
    noisy = private(plain, Mechanism("laplace", noise=0.5), USERS)
    one, other = play(engine_of(noisy)), play(engine_of(plain))  # guidance at the end of the second round
    added = one.server.shared["guide"] - other.server.shared["guide"]
    assert added.std() == pytest.approx(0.5 * math.sqrt(2 / USERS), rel=0.2)  # 360 draws
    reached = one.clients["own_item"][:USERS] - other.clients["own_item"][:USERS]
    np.testing.assert_allclose(reached, np.broadcast_to(0.4 * added, reached.shape), atol=1e-6)


# ---- FedRKG's own: noise on steps, and Eq. 14 ----------------------------------------------------------------


@pytest.mark.parametrize("backbone", fedrkg.BACKBONES)
def test_step_noise_reaches_every_row_at_every_step(backbone):
    settings = {"backbone": backbone, "guidance": "personal_only", "clip_norm": 0.1, "batch_size": 0, "local_epochs": 3}
    noisy, plain = (play(engine_of(built("fedrkg", **settings, step_noise=std)), 1) for std in (0.03, 0.0))
    moved = (plain.clients["own_item"] != engine_of(built("fedrkg", **settings)).init(KEY).clients["own_item"])[:USERS]
    still = ~np.asarray(moved).any(2)  # rows outside the working sets: they get noise alone
    added = (noisy.clients["own_item"] - plain.clients["own_item"])[:USERS][still]
    assert still.sum() > 500
    rate = fedrkg.item_rate(built("fedrkg", **settings).config, USERS, ITEMS)
    assert added.std() == pytest.approx(rate * 0.03 * math.sqrt(3), rel=5 * math.sqrt(0.5 / added.size))
    assert abs(added.mean()) < 5 * added.std() / math.sqrt(added.size)


def test_step_noise_reaches_the_gate_and_needs_a_clip():
    settings = {"guidance": "ag", "interval": 1, "clip_norm": 0.1, "gate_lr": 0.5, "gate_epochs": 1, "batch_size": 0}
    noisy, plain = (play(engine_of(built("fedrkg", **settings, step_noise=std)), 1) for std in (0.3, 0.0))
    added = (noisy.clients["gate"]["weight"] - plain.clients["gate"]["weight"])[:USERS]
    # 276 draws; the noisy table moves the gradients a little too, within the clip of 0.1
    assert added.std() == pytest.approx(0.5 * 0.3, rel=0.35)
    with pytest.raises(ValueError, match=r"step_noise=0.3: expected clip_norm > 0"):
        fedrkg.Config(step_noise=0.3)


def test_the_bound_of_equation_14():
    assert accounting.sensitivity_bound(lr=0.1, interval=10, epochs=1, clip=0.05) == pytest.approx(0.1)
    assert accounting.sensitivity_bound(0.01, 100, 2, 0.5, steps_per_epoch=3) == pytest.approx(6.0)


@pytest.mark.parametrize(("backbone", "share"), [("fedmf", 0.5), ("fedncf", 0.05), ("pfedrec", 0.5)])
def test_no_path_is_longer_than_equation_14_says(backbone, share):
    # one batch and no small user vectors: gradients are longer than the clip, point alike, and are the items'
    settings = {"backbone": backbone, "guidance": "kg", "interval": 4, "clip_norm": 0.002, "local_epochs": 2}
    settings |= {"batch_size": 0} | ({} if backbone == "pfedrec" else {"user_init_std": 3.0})
    engine = engine_of(built("fedrkg", **settings))
    start = np.asarray(engine.init(KEY).clients["own_item"])[:USERS]
    table = play(engine, 3).clients["own_item"][:USERS]  # the last round before guidance is the fourth
    longest = np.linalg.norm((table - start).reshape(USERS, -1), axis=1).max()
    rate = fedrkg.item_rate(engine.method.config, USERS, ITEMS)
    steps = accounting.most_steps(engine, engine.method.sampling) // 2
    bound = accounting.sensitivity_bound(rate, 3, 2, 0.002, steps) / 2
    assert share * bound < longest <= bound * (1 + 1e-5)


# ---- accounting ----------------------------------------------------------------------------------------------


def gaussian_epsilon(multiplier: float, delta: float) -> float:
    """Exact (Balle and Wang 2018), by bisection."""
    from scipy.special import log_ndtr

    def delta_of(epsilon):
        a, b = 0.5 / multiplier, epsilon * multiplier
        return math.exp(log_ndtr(a - b)) - math.exp(min(epsilon + log_ndtr(-a - b), 0.0))

    low, high = 0.0, 1e9
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if delta_of(middle) > delta else (low, middle)
    return high


@pytest.mark.parametrize("multiplier", [0.05, 1.0, 8.0])
@pytest.mark.parametrize("count", [1, 40])
def test_epsilon_of_gaussian_noise(multiplier, count):
    pytest.importorskip("dp_accounting")
    exact = gaussian_epsilon(multiplier / math.sqrt(count), 1e-5)
    said = accounting.epsilon((Release("gaussian", 3 * multiplier, 3.0, count),), 1e-5)
    assert exact <= said <= 1.15 * exact + 0.02  # the Renyi accountant is an upper bound, some percent above
    pieces = tuple(Release("gaussian", multiplier, 1.0, 1) for _ in range(count))
    assert accounting.epsilon(pieces, 1e-5) == pytest.approx(said)


def test_epsilon_of_laplace_noise_is_never_above_pure_composition():
    pytest.importorskip("dp_accounting")
    assert accounting.epsilon((Release("laplace", 2.0, 1.0, 1),), 1e-12) == pytest.approx(0.5)
    many = accounting.epsilon((Release("laplace", 20.0, 1.0, 400),), 1e-5)
    assert many < 0.5 * 400 / 20


def test_more_noise_fewer_rounds_and_sums_over_small_cohorts_cost_less():
    pytest.importorskip("dp_accounting")
    of = lambda noise=1.0, count=50, **who: accounting.epsilon(
        (Release("gaussian", noise, 1.0, count, **who),), 1e-5, "sums" if who else "server"
    )
    assert of(noise=2.0) < of() < of(count=100)
    everybody, tenth = of(sampled=100, population=100), of(sampled=100, population=1000)
    assert tenth < 0.6 * everybody
    assert everybody == pytest.approx(of(noise=10.0))


@pytest.mark.parametrize("kind", ["gaussian", "laplace"])
@pytest.mark.parametrize("target", [0.5, 100.0, 1e5])
def test_noise_for_an_epsilon(kind, target):
    pytest.importorskip("dp_accounting")
    releases = (Release(kind, 0.0, 3.0, 40), Release(kind, 0.0, 0.2, 2))
    noise = accounting.noise_for(releases, target, 1e-5)
    assert accounting.epsilon(tuple(r._replace(noise=noise) for r in releases), 1e-5) == pytest.approx(target, rel=1e-3)
    small = accounting.noise_for(tuple(r._replace(sensitivity=1e-9 * r.sensitivity) for r in releases), target, 1e-5)
    assert small == pytest.approx(1e-9 * noise, rel=1e-3)
    for unbounded in ((), (Release(kind, 1.0, math.inf, 1),)):
        with pytest.raises(ValueError, match=r"no noise earns it"):
            accounting.noise_for(unbounded, target, 1e-5)
    with pytest.raises(ValueError, match=r"epsilon 1e-13: no noise earns it"):
        accounting.noise_for(releases, 1e-13, 1e-5)


def test_without_noise_or_bound_there_is_no_epsilon():
    assert accounting.epsilon((Release("gaussian", 0.0, 1.0, 1),), 1e-5) == math.inf
    assert accounting.epsilon((Release("gaussian", 1.0, math.inf, 1),), 1e-5) == math.inf
    assert accounting.epsilon((Release("laplace", 1.0, 1.0, 1),), 1e-5, "sums") == math.inf
    assert accounting.epsilon((Release("gaussian", 0.0, 1.0, 0),), 1e-5) == 0.0


@pytest.mark.parametrize(
    ("release", "delta", "message"),
    [
        (Release("gauss", 1.0, 1.0, 1), 1e-5, "kind='gauss': expected one of gaussian, laplace"),
        (Release("gaussian", 1.0, 0.0, 1), 1e-5, "sensitivity=0.0: expected a number > 0"),
        (Release("gaussian", 1.0, 1.0, 1), 1.5, r"delta=1.5: expected a number in \(0, 1\)"),
    ],
)
def test_what_has_no_epsilon_is_named(release, delta, message):
    with pytest.raises(ValueError, match=message):
        accounting.epsilon((release,), delta)
    with pytest.raises(ValueError, match=r"lr=-1\.0: expected a number > 0"):
        accounting.sensitivity_bound(-1.0, 2, 1, 0.1)


def test_epsilon_of_the_papers_setting():
    """Sensitivity 0.1 and sigma 0.001: noise of a hundredth of what it is to hide."""
    pytest.importorskip("dp_accounting")
    one, many = (accounting.epsilon((Release("gaussian", 1e-3, 0.1, n),), 1e-5) for n in (1, 1000))
    assert 5400 < one < 5600 and 5.0e6 < many < 5.1e6


def test_a_missing_library_is_one_line_before_the_run(monkeypatch):
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    with pytest.raises(UsageError, match=r"pip install 'fedjax_rec\[privacy\]'"):
        run.train(config(dp_mechanism="gaussian", dp_clip=1.0, dp_noise=1.0), data=whole())
    assert run.train(config(dp_mechanism="laplace", dp_noise=1.0), data=whole())["privacy"]["epsilon"] == math.inf


# ---- runs ----------------------------------------------------------------------------------------------------


def config(method="fedmf", settings=None, **changes):
    said = {"rounds": 4, "eval_every": 2, "max_buckets": 1, "devices": 1, **changes}
    return run.RunConfig(method=method, settings={**small(method), **(settings or {})}, **said)


@functools.cache
def whole():
    return data().interactions, split(), data().features


def plan_of(**given):
    return accounting.plans(run.prepare(config(**given), whole()), 4)


def test_releases_of_a_run():
    clip = {"dp_mechanism": "gaussian", "dp_clip": 0.5, "dp_noise": 2.0}
    (release,) = plan_of(**clip)["upload"].releases
    assert release == Release("gaussian", 2.0, 1.0, 4, USERS, USERS, 4)
    (some,) = plan_of(**clip, clients_per_round=5)["upload"].releases
    assert (some.sampled, some.population, some.rounds) == (5, USERS, 4) and 1 <= some.count <= 4
    assert plan_of() == {}
    assert plan_of(**clip)["upload"].unprotected == ()
    assert "numbers of samples" in plan_of(method="fedavg", **clip)["upload"].unprotected[0]
    for apart in ("fedavg", "gpfedrec", "ease"):  # not the plain mean: there is no sum of equal uploads
        assert plan_of(method=apart, **clip)["upload"].releases[0].sampled == 0
    assert "which rows" in plan_of(**clip, dp_rows="touched")["upload"].unprotected[0]


def test_ids_are_not_noised():
    with pytest.raises(ValueError, match=r"dp_mechanism=gaussian with method=mf: its clients send item ids"):
        run.train(config("mf", dp_mechanism="gaussian", dp_clip=0.5, dp_noise=2.0), data=whole())


@pytest.mark.parametrize("per_client", [False, True])
def test_noise_does_not_multiply_the_table_of_ifedrec(per_client):
    """The pull's factor multiplies the whole table: it is left as it is, and noise adds up as on a sent table."""
    noisy = engine_of(
        mechanisms.private(built("ipfedrec"), Mechanism("laplace", noise=50.0), USERS, per_client=per_client)
    )
    rounds = 12
    plain, state = play(engine_of(built("ipfedrec")), rounds), play(noisy, rounds)
    added = np.asarray(state.server.shared["item"] - plain.server.shared["item"]).std()
    assert added < 50 * np.sqrt(2 * rounds / USERS) * 1.5


def test_releases_of_fedrkg():
    steps = {"guidance": "kg", "interval": 2, "beta": 0.5, "clip_norm": 0.1, "batch_size": 0, "local_epochs": 3}
    given = {"dp_mechanism": "gaussian", "dp_noise": 2.0}
    first, second = plan_of(method="fedrkg", settings=steps, **given)["upload"].releases
    rate = SMALL["lr"] * SMALL["item_lr_scale"] * USERS
    assert first.sensitivity == pytest.approx(2 * rate * 2 * 3 * 0.1) and first.count == 1
    assert second.sensitivity == pytest.approx(1.5 * first.sensitivity)
    late = plan_of(method="fedrkg", settings={**steps, "interval": 1, "delay": True}, **given)["upload"].releases
    rounds = [2, 0.5 * 2 + 1]  # guidance at the start of the third and the fourth: two rounds precede it, then one more
    assert [r.sensitivity for r in late] == pytest.approx([n * first.sensitivity / 2 for n in rounds])
    replaced = {**steps, "guidance": "global_only"}
    assert len({r.sensitivity for r in plan_of(method="fedrkg", settings=replaced, **given)["upload"].releases}) == 1
    gated = plan_of(method="fedrkg", settings={**steps, "guidance": "ag"}, **given)["upload"]
    assert "gate" in gated.unprotected[0]
    (noisy,) = plan_of(method="fedrkg", settings={**steps, "step_noise": 0.3})["step"].releases
    assert (noisy.noise, noisy.sensitivity, noisy.count) == (0.3, 0.2, 4 * 3)
    gate = {**steps, "guidance": "ag", "gate_epochs": 5, "step_noise": 0.3}
    assert plan_of(method="fedrkg", settings=gate)["step"].releases[0].count == 4 * 3 + 2 * 5
    shared = {**steps, "step_noise": 0.3, "backbone": "fedncf", "scorer": "shared", "layers": (4,)}
    both = plan_of(method="fedrkg", settings=shared, **given, dp_clip=0.5)
    assert "the network" in both["step"].unprotected[0] and not both["upload"].unprotected
    unclipped = plan_of(method="fedrkg", settings={**steps, "clip_norm": 0.0}, **given)["upload"].releases
    assert all(math.isinf(r.sensitivity) for r in unclipped)


def test_a_run_tells_its_epsilon(tmp_path):
    pytest.importorskip("dp_accounting")
    given = {"dp_mechanism": "gaussian", "dp_clip": 0.5, "dp_noise": 2.0}
    said = run.train(config(**given), tmp_path, data=whole())
    expected = accounting.epsilon((Release("gaussian", 2.0, 1.0, 4),), 1e-5)
    assert said["privacy"]["epsilon"] == pytest.approx(expected)
    assert json.loads((tmp_path / "summary.json").read_text())["privacy"] == said["privacy"]
    assert f"epsilon {expected:.4g} at delta 1e-05" in report.table(said)
    touched = run.train(config(**given, dp_rows="touched", rounds=4, eval_every=4), data=whole(), references=False)
    assert touched["privacy"]["epsilon"] == math.inf
    assert "NOT COVERED: which rows an upload touches" in report.table(touched)
    assert touched["privacy"]["mechanisms"]["upload"]["epsilon_of_values"]["server"] == pytest.approx(expected)


def test_a_workdir_belongs_to_its_mechanism(tmp_path):
    run.train(config(), tmp_path, data=whole())
    assert not [name for name in json.loads((tmp_path / "config.json").read_text()) if name.startswith("dp_")]
    assert "privacy" not in json.loads((tmp_path / "summary.json").read_text())
    with pytest.raises(UsageError, match=r"dp_mechanism: None there, 'laplace' given; dp_noise: None there, 2.0 given"):
        run.train(config(dp_mechanism="laplace", dp_noise=2.0), tmp_path, data=whole())


def test_a_noisy_run_goes_on_where_it_stopped(tmp_path):
    given = {"dp_mechanism": "laplace", "dp_noise": 0.01, "settings": {"redraw": "round"}}
    whole_run = run.train_state(config(**given), data=whole())[2]
    half = dataclasses.replace(config(**given), rounds=2)
    run.train(half, tmp_path, data=whole())
    held = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**held, "rounds": 4}))
    resumed = run.train_state(config(**given), tmp_path, data=whole())[2]
    assert_same(*(jax.tree.map(np.asarray, x.server.shared) for x in (whole_run, resumed)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dp_mechanism": "gauss"}, "did you mean gaussian"),
        ({"dp_clip": 1.0}, "dp_mechanism=none; set dp_mechanism to gaussian or laplace"),
        ({"dp_mechanism": "laplace", "dp_noise": -1.0}, "dp_noise=-1.0"),
        ({"dp_mechanism": "laplace", "dp_rows": "some"}, "dp_rows='some'"),
        ({"dp_delta": 0.0}, "dp_delta=0.0"),
        ({"dp_delta": 1.0}, "dp_delta=1.0: expected a number in"),
    ],
)
def test_wrong_settings_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        run.RunConfig(**change)


# ---- attacks -------------------------------------------------------------------------------------------------


def planted(width: int, bend) -> tuple[jnp.ndarray, jnp.ndarray]:
    """(rows, features): rows are a bent linear map of the features."""
    rng = np.random.default_rng(0)
    features = rng.normal(size=(300, 6)).astype(np.float32) + 1
    return jnp.asarray(bend(features @ rng.normal(size=(6, width)).astype(np.float32))), jnp.asarray(features)


TRAINED = {"hidden": (32,), "steps": 400, "lr": 1e-2}


def test_inversion_finds_a_planted_map_and_the_mean_does_not():
    rows, features = planted(16, lambda x: x)
    found = attacks.inversion(KEY, rows, features, **TRAINED)
    mean = found.measures["mean"]
    for name in ("network", "ridge"):
        attack = found.measures[name]
        assert attack["MSE"] < 0.1 * mean["MSE"] and attack["MAE"] < 0.4 * mean["MAE"]
        assert attack["Pearson"] > 0.9 > mean["Pearson"] and attack["structure"] < 0.3 * mean["structure"]
        assert attack == {name: float(x) for name, x in attacks.closeness(found.true, found.guess[name]).items()}
    assert found.attack == "ridge"  # a linear map is its own
    assert found.measures["ridge"]["MSE"] < 1e-3 * mean["MSE"]
    unrelated = jax.random.normal(jax.random.key(1), (300, 16))
    blind = attacks.inversion(KEY, unrelated, features, **TRAINED)
    assert all(blind.measures[name]["MSE"] > 0.9 * mean["MSE"] for name in blind.measures)
    assert found.true.shape == (240, 6) and {guess.shape for guess in found.guess.values()} == {(240, 6)}
    np.testing.assert_array_equal(blind.true, found.true)  # the same items, whatever the rows
    with pytest.raises(ValueError, match=r"leaked=0.001 of 300 items are 0"):
        attacks.inversion(KEY, unrelated, features, leaked=0.001)


def test_the_network_attacks_where_the_map_is_bent():
    """Of rows that tell the features' lengths alone, a linear map finds next to nothing."""
    rows, _ = planted(2, np.tanh)
    found = attacks.inversion(KEY, rows, jnp.abs(rows), **TRAINED)
    assert found.attack == "network"
    assert found.measures["network"]["MSE"] < 0.2 * found.measures["ridge"]["MSE"]


def test_the_ridge_is_the_solution_on_all_leaked_pairs():
    rows, features = planted(5, lambda x: x)  # fewer dimensions than features: no exact map
    found = attacks.inversion(KEY, rows, features, **TRAINED)
    order = np.asarray(jax.random.permutation(jax.random.split(KEY)[0], 300))
    x, y = np.asarray(rows, float)[order], np.asarray(features, float)[order]
    x, y0 = (x - x[:60].mean(0)) / x[:60].std(0), y[:60].mean(0)

    def fit(part, penalty):
        a, b = x[part], y[part] - y0
        return np.linalg.solve(a.T @ a / len(a) + penalty * np.eye(5), a.T @ b / len(a))

    held, rest = slice(0, 12), slice(12, 60)  # a fifth of the leaked pairs chooses the penalty
    chosen = min(attacks.RIDGES, key=lambda p: ((y0 + x[held] @ fit(rest, p) - y[held]) ** 2).mean())
    np.testing.assert_allclose(found.guess["ridge"], y0 + x[60:] @ fit(slice(0, 60), chosen), atol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": jnp.ones((29, 3))}, "rows of 30 items and features of 29: expected pairs; give both for"),
        ({"steps": 0}, "steps=0: expected a whole number > 0"),
        ({"leaked": 1.5}, r"leaked=1.5: expected a number in \[0.0, 1.0\]"),
    ],
)
def test_what_cannot_be_inverted_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        attacks.inversion(KEY, **{"rows": jnp.ones((30, 4)), "features": jnp.ones((30, 3)), **change})


def test_structural_difference_of_two_items():
    true, guess = jnp.array([[1.0, 0.0], [0.0, 2.0]]), jnp.array([[3.0, 0.0], [5.0, 0.0]])
    np.testing.assert_allclose(attacks.structural_difference(true, guess), [[0, 1], [1, 0]], atol=1e-6)
    assert float(attacks.closeness(true, guess)["structure"]) == pytest.approx(1.0)


def test_closeness_of_a_copy_and_of_the_opposite():
    x = jnp.asarray(np.random.default_rng(1).normal(size=(20, 5)), jnp.float32)
    same, opposite = attacks.closeness(x, x), attacks.closeness(x, -x)
    np.testing.assert_allclose([same[m] for m in ("MSE", "cosine", "Pearson", "structure")], [0, 1, 1, 0], atol=1e-6)
    np.testing.assert_allclose([opposite[m] for m in ("cosine", "Pearson", "structure")], [-1, -1, 0], atol=1e-6)
    assert float(opposite["MSE"]) == pytest.approx(float((4 * x**2).mean()), rel=1e-5)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_share_of_noise(share):
    rng = np.random.default_rng(2)
    items = math.sqrt(1 - share) * rng.normal(size=(1, 400, 8))
    rows = items + math.sqrt(share) * rng.normal(size=(6, 400, 8))
    assert attacks.noise_share(jnp.asarray(rows, jnp.float32)) == pytest.approx(share, abs=0.03)
    with pytest.raises(ValueError, match="rows of 1 draws: expected 2 or more"):
        attacks.noise_share(jnp.asarray(rows[:1], jnp.float32))


def test_auc_counts_ties_as_half():
    scores, positive = jnp.array([3.0, 1.0, 1.0, 0.0]), jnp.array([True, True, False, False])
    assert float(attacks.auc(scores, positive)) == (1 + 1 + 0.5 + 1) / 4
    assert float(attacks.auc(jnp.zeros(6), jnp.arange(6) < 2)) == 0.5


def test_probes_find_the_history_in_plain_uploads_and_not_under_noise():
    plain = built("fedmf", negatives=4, batch_size=0)  # one step: all rows move along the user's vector
    history = np.zeros((USERS, ITEMS), bool)
    history[split().train.user, split().train.item] = True
    users = np.flatnonzero(history.any(1))
    found = {}
    for noise in (0.0, 0.01):
        engine = engine_of(private(plain, Mechanism(clip=0.001, noise=noise), USERS, per_client=True))
        sent = attacks.uploads(engine, KEY, engine.init(KEY), 0, users)
        assert sent.shape == (len(users), ITEMS, 4)
        if not noise:
            np.testing.assert_allclose(np.linalg.norm(sent.reshape(len(users), -1), axis=1), 0.001, rtol=1e-4)
        probed = attacks.probes(*map(jnp.asarray, (sent, history[users], history.sum(0))))
        found[noise] = {n: float(v) for n, v in probed.items()}
    assert found[0.0]["reconstruction"] > 0.95 and found[0.0]["membership"] > 0.95 and found[0.0]["found"] > 0.8
    assert found[0.0]["reconstruction"] > found[0.0]["popularity"] + 0.1
    # means over 23 users of AUCs whose standard error is about 0.11
    assert all(0.35 < found[0.01][name] < 0.65 for name in ("reconstruction", "membership", "norm"))


def test_the_script_writes_its_tables_and_plots(tmp_path):
    pytest.importorskip("dp_accounting")
    root = Path(__file__).resolve().parents[1]
    cold = dict(split="cold_items", rounds=2, eval_every=2, ks=(10,), devices=1)
    makers = {"ipfedrec": {"condition_dim": 8}, "mdifffr": {"condition_dim": 8, "preset": "released", "dim": 4}}
    for name, settings in makers.items():
        run.train(run.RunConfig(method=name, settings=settings, **cold), tmp_path / name)
    command = [
        sys.executable, "experiments/privacy.py", f"--out={tmp_path}", "--rounds=2", "--eval_every=2", "--k=10",
        "--epsilon=1e5", "--upload_noise=1", "--draws=3", "--attack_steps=50", "--probed=30", "--set=dim=4",
        *(str(tmp_path / name) for name in makers),
    ]  # fmt: skip
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, env=quick.ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    written = (tmp_path / "privacy.md").read_text()
    assert written in done.stdout
    rows = {tuple(cell.strip() for cell in line.split("|")[1:-1]) for line in written.splitlines() if "|" in line}
    firsts = {row[0] for row in rows}
    assert {"step", "step, the paper's sigma", "upload", "none (clipped)", "fedmf_1", "1000", *makers} <= firsts
    assert {row[2] for row in rows if row[0] in ("step", "upload")} == {"1e+05"}
    (head,) = (row for row in rows if row[0] == "rows of")
    assert head[3:-1] == ("MSE", "MAE", "cosine", "Pearson", "structure")
    inverted = {name: [row for row in rows if row[0] == name and len(row) == len(head)] for name in makers}
    assert {float(row[-1]) for row in inverted["ipfedrec"]} == {0.0}  # a map of features has no noise
    assert {row[1] for row in inverted["ipfedrec"]} == {"one"}
    assert {row[1] for row in inverted["mdifffr"]} == {"one", "mean of 3"}
    assert all({"network", "ridge", "mean"} == {row[2].strip("*") for row in of} for of in inverted.values())
    assert sum("*" in row[2] for of in inverted.values() for row in of) == 3  # one attack of each rows
    assert all(np.isfinite(float(cell)) for of in inverted.values() for row in of for cell in row[3:])
    probed = [row for row in rows if row[0] in {"fedmf_1", *makers} and len(row) < len(head)]
    assert len(probed) == 3 and all(0 <= float(cell) <= 1 for row in probed for cell in row[3:])
    plots = {path.name: path.stat().st_size for path in tmp_path.glob("*.png")}
    assert set(plots) == {"utility.png", "radar.png", "structure.png"}
    assert min(plots.values()) > 10_000, plots
