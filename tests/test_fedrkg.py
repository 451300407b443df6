"""What is special about FedRKG; that it obeys the laws of all methods is in test_laws.py."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_rec import layout, methods
from fedjax_rec.data import clients, splits, synthetic
from fedjax_rec.methods import fedrkg
from fedjax_rec.rounds import make_engine

USERS, ITEMS = 23, 90
KEY = jax.random.key(3)
SMALL = {"dim": 4, "batch_size": 8, "negatives": 2, "lr": 0.2, "item_lr_scale": 0.5, "init_std": 0.3}
SAME_MODEL = {
    "fedmf": {},
    "pfedrec": {"server_lr": 1.0, "client_init": "shared"},
    "fedncf": {"layers": (8,), "branches": "mlp", "server_lr": 0.7},
}


@functools.cache
def split():
    return splits.leave_one_out(
        synthetic.make(USERS, ITEMS, min_history=4, median_history=7, max_history=15).interactions
    )


def engine_of(name="fedrkg", **settings):
    method = methods.build(name, USERS, ITEMS, **{**SMALL, **settings})
    return make_engine(method, clients.build(split(), max_buckets=1))


def play(engine, rounds, cohort=None):
    state, infos = engine.init(KEY), []
    for t in range(rounds):
        state, info = engine.round(KEY, state, t, None if cohort is None else engine.cohort(cohort))
        infos.append(info)
    return jax.tree.map(np.asarray, jax.device_get(state)), infos


def close(a, b):
    # float32 sums of tens of terms of size 1 in another order, over a few rounds
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=5e-6), a, b)


def test_gate_and_fusion_are_the_equations():
    rng = np.random.default_rng(0)
    own, guide, weight, bias = rng.normal(size=(6, 3)), rng.normal(size=(6, 3)), rng.normal(size=9), 0.3
    expected = 1 / (1 + np.exp(-(np.concatenate([own, guide, own - guide], 1) @ weight + bias)))
    gate = {"weight": jnp.asarray(weight, jnp.float32), "bias": jnp.float32(bias)}
    own32, guide32 = jnp.asarray(own, jnp.float32), jnp.asarray(guide, jnp.float32)
    close(fedrkg.gate_values(gate, own32, guide32), expected)
    close(fedrkg.guided(own32, guide32, 0.9, gate), 0.9 * own + 2 * 0.1 * expected[:, None] * guide)
    close(fedrkg.guided(own32, guide32, 0.9), 0.9 * own + 0.1 * guide)


def test_schedule():
    rounds = lambda **s: [t for t in range(10) if fedrkg.is_guidance_round(fedrkg.Config(**s), t)]
    assert rounds(interval=3) == [2, 5, 8]
    assert rounds(interval=3, delay=True) == [4, 7]
    assert rounds(interval=1) == list(range(10))
    assert rounds(interval=1, delay=True) == list(range(2, 10))


@pytest.mark.parametrize("backbone", SAME_MODEL)
def test_everything_kept_is_local_training_bit_for_bit(backbone):
    kept, _ = play(engine_of(backbone=backbone, guidance="kg", beta=1.0, interval=1), 3)
    alone, _ = play(engine_of(backbone=backbone, guidance="personal_only"), 3)
    jax.tree.map(np.testing.assert_array_equal, kept.clients, alone.clients)


@pytest.mark.parametrize("backbone", SAME_MODEL)
@pytest.mark.parametrize("variant", [{"guidance": "kg", "beta": 0.0}, {"guidance": "global_only"}], ids=str)
def test_nothing_kept_is_the_backbones_method(backbone, variant):
    """Replacing every table every round, with the network averaged: the method that FedRKG is built over."""
    same = {**SAME_MODEL[backbone], "evaluate_at": "post_aggregate"}
    ours, _ = play(engine_of(backbone=backbone, interval=1, scorer="shared", **variant, **same), 4)
    base, _ = play(engine_of(backbone, **same), 4)
    close(ours.server.shared["guide"], base.server.shared["item"])
    if backbone == "fedncf":
        close(ours.server.shared["network"], base.server.shared["network"])
    close({role: ours.clients[role] for role in base.clients}, base.clients)
    for table in ours.clients["own_item"][:USERS]:
        np.testing.assert_array_equal(table, ours.server.shared["guide"])


def test_guidance_reaches_every_row_of_every_user():
    settings = {"interval": 3, "beta": 0.6}
    before, _ = play(engine_of(guidance="personal_only"), 3, cohort=np.arange(10))
    after, _ = play(engine_of(guidance="kg", **settings), 3, cohort=np.arange(10))
    own = before.clients["own_item"][:USERS]
    mean = own.astype(np.float64).mean(0)
    close(after.server.shared["guide"], mean)
    close(after.clients["own_item"][:USERS], 0.6 * own + 0.4 * mean)
    trained = (own != own[10]).any(axis=(0, 2))  # rows that somebody moved; user 10 was absent
    assert (after.clients["own_item"][10] != own[10]).any(1)[trained].all() and trained.sum() > ITEMS / 2
    jax.tree.map(np.testing.assert_array_equal, before.clients["user"], after.clients["user"])


@pytest.mark.parametrize("backbone", SAME_MODEL)
def test_an_untrained_gate_is_plain_guidance(backbone):
    settings = {"backbone": backbone, "interval": 2, "beta": 0.5}
    plain, _ = play(engine_of(guidance="kg", **settings), 4)
    gated, infos = play(engine_of(guidance="ag", gate_lr=0.0, **settings), 4)
    close(gated.clients["own_item"], plain.clients["own_item"])
    assert [float(info["gate"]) for info in infos if "gate" in info] == [0.5, 0.5]


def test_the_gate_learns_and_only_in_guidance_rounds():
    settings = {"interval": 2, "beta": 0.5, "gate_lr": 0.5}
    gates = [play(engine_of(**settings), t)[0].clients["gate"]["weight"][:USERS] for t in (1, 2, 3)]
    assert not gates[0].any()
    assert gates[1].any(1).all() and len(np.unique(gates[1], axis=0)) == USERS
    np.testing.assert_array_equal(gates[1], gates[2])


def test_an_exchange_in_ragged_blocks_is_that_of_all_clients_at_once(monkeypatch):
    settings = {"interval": 2, "beta": 0.3, "gate_lr": 0.5}
    whole = engine_of(**settings)
    assert whole.exchange_block() >= USERS
    at_once = play(whole, 2)
    row = whole.row_bytes()
    monkeypatch.setattr(layout, "EXCHANGE_CPU_BYTES", 3 * ITEMS * row * 4)
    blocks = engine_of(**settings)
    assert blocks.exchange_block() == 4 and USERS % 4
    by_blocks = play(blocks, 2)
    close(by_blocks[0], at_once[0])
    close(by_blocks[1][-1], at_once[1][-1])  # the gate's loss, a mean over all blocks


def test_gate_training_lowers_the_loss_of_the_fused_model():
    first, last = (
        float(play(engine_of(interval=3, beta=0.3, gate_lr=1.0, gate_epochs=n, lr=0.5), 3)[1][-1]["gate_loss"])
        for n in (1, 5)
    )
    assert last < first  # each is the mean over its epochs


@pytest.mark.parametrize("backbone", SAME_MODEL)
def test_only_the_table_leaves_the_client_and_only_in_an_exchange(backbone):
    engine = engine_of(backbone=backbone, interval=2)
    state, _ = play(engine, 2)
    one = jax.tree.map(lambda x: x[0], state.clients)
    sent = engine.method.exchange.upload(one)
    assert set(sent) == {"guide"} and "gate" in one
    np.testing.assert_array_equal(sent["guide"], one["own_item"])
    assert set(state.server.shared) == {"guide"}
    sizes = engine.bytes_per_client()
    assert sizes["up"] == sizes["down"] == 0
    assert sizes["exchange_up"] == sizes["exchange_down"] == one["own_item"].nbytes


def test_local_only_shares_nothing():
    shared, _ = play(engine_of(backbone="fedncf", guidance="personal_only", scorer="shared"), 1)
    local, _ = play(engine_of(backbone="fedncf", guidance="local_only", scorer="shared"), 1)
    assert "network" in shared.server.shared and "network" not in shared.clients
    assert "network" not in local.server.shared and "network" in local.clients


def test_released_preset():
    engine = engine_of(preset="released", interval=1)
    config = engine.method.config
    assert (config.clip_norm, config.delay, config.client_init) == (1.0, True, "shared")
    assert methods.make_config("fedrkg", {"preset": "released"}).init_std == 1.0
    released = ("fedrkg", "pfedrec", "cofedrec", "cofedrec_anchors")
    assert {methods.make_config(name, {"preset": "released"}).lr for name in released} == {0.1}
    state = engine.init(KEY)
    heads = np.asarray(state.clients["head"]["weight"])
    assert (heads == heads[0]).all()
    before = np.asarray(state.clients["own_item"])
    state, _ = engine.round(KEY, state, 0)
    steps = -(-3 * max(np.bincount(split().train.user)) // 8)  # 3 samples per positive, batches of 8
    moved = np.linalg.norm((np.asarray(state.clients["own_item"]) - before).reshape(len(before), -1), axis=1)
    assert 0 < moved.max() <= 1.001 * steps * 0.1 * ITEMS * 80  # each step's norm is 1 at most
    mine = methods.make_config("fedrkg", {"preset": "released", "clip_norm": 0.1, "delay": False, "item_lr_scale": 2})
    assert (mine.clip_norm, mine.delay, mine.item_lr_scale, mine.rate_by_items) == (0.1, False, 2.0, True)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"beta": 1.5}, "beta=1.5"),
        ({"guidance": "kgg"}, "did you mean kg"),
        ({"interval": 0}, "interval=0"),
        ({"backbone": "fedrap"}, "backbone='fedrap'"),
        ({"gate_lr": -1.0}, "gate_lr=-1.0"),
        ({"scorer": "globl"}, "scorer="),
    ],
)
def test_wrong_settings_are_named(setting, message):
    with pytest.raises(ValueError, match=message):
        fedrkg.Config(**setting)
