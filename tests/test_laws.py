"""What every method must satisfy, whatever it computes (DESIGN.md, section 8)."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections import Counter
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from fedjax_rec import methods
from fedjax_rec.client_step import SERVER, START, client_key, streams
from fedjax_rec.data import clients, splits, synthetic
from fedjax_rec.item_sources import Catalogue
from fedjax_rec.layout import clients_mesh
from fedjax_rec.rounds import Engine, make_engine
from fedjax_rec.types import ITEM_ROLES

USERS, ITEMS, EMPTY = 41, 200, 5  # user EMPTY has no training item
KEY = jax.random.key(7)
SMALL = {"dim": 4, "batch_size": 8, "negatives": 2, "lr": 0.1, "item_lr_scale": 0.5, "init_std": 0.3}
EVEN, ODD = np.arange(0, USERS, 2), np.arange(1, USERS, 2)
ROUNDS = (None, EVEN, None)  # who takes part


class Case(NamedTuple):
    name: str
    settings: dict[str, Any]
    negative_pool: str = "outside_train"


TOWER = {"layers": (8, 4)}
BY_ROW = {"weighting": "by_row", "item_lr_scale": 2.0}
VIEWS = {"id_dim": 6, "local_epochs": 2, "fusion_lr_scale": 2.0}
# sgd: adaptive steps blow rounding up where a gradient is nearly zero
DIFFUSION = {"condition_dim": 6, "diffusion_batch": 64, "diffusion_optimizer": "sgd", "diffusion_lr": 0.01}
PULL = {"condition_dim": 6, "eta": 0.1, "reg": 10.0, "layers": (8,), "user_lr_scale": 1.0, "user_init_std": 0.3}
CLUSTERS = {"item_clusters": 4, "reg": 0.05, "own_lr_scale": 10.0}
OWN = {
    "fedncf": TOWER,
    "gpfedrec": TOWER,
    "gpfedrec_anchors": {**TOWER, "anchor_items": 20},
    "cofedrec": CLUSTERS,
    "cofedrec_anchors": {**CLUSTERS, "contrast_items": 30},
    "feddae": {"layers": (8,), "gate_width": 4, "history_rows": 64, "lr": 0.01, "dropout": 0.0},
    "fedvlr": VIEWS,
    "fedmr": VIEWS,
    "mlp_fusion": VIEWS,
    "fedvbpr": {**VIEWS, "id_dim": 2},
    "mdifffr": DIFFUSION,
    "light_mdifffr": DIFFUSION,
    "ipfedrec": PULL,
    "ifedncf": PULL,
    "cs_fedncf": TOWER,
}
NAMED = {
    name: Case(name, OWN.get(name, {}))
    for name, entry in methods.METHODS.items()
    if not entry.central and name not in methods.ALIASES
}
# the code of another method under other settings: the loop over clients says enough
KIN = ("fedavg", "fcf", "fedmr", "mlp_fusion", "light_mdifffr", "ifedncf", "cs_fedncf")
PLAIN = {name: case for name, case in NAMED.items() if name not in KIN}
COLD = ("mdifffr", "light_mdifffr", "ipfedrec", "ifedncf", "cs_fcf", "cs_fedncf")  # make rows of some items
TWICE = {"redraw": "epoch", "local_epochs": 2}
SPECIAL = {name: NAMED[name] for name in KIN} | {
    "momentum": Case(
        "fedmf", {"optimizer": "momentum", "lr": 0.01, "weighting": "by_size", "local_epochs": 2}, "outside_all"
    ),
    "adam": Case(
        "fedncf",
        {"optimizer": "adam", "lr": 0.01, "draw": "independent", "server_optimizer": "adam", "server_lr": 0.1}
        | {"item_lr_scale": 20.0}  # a row's few clients are averaged with all: small changes are mostly rounding
        | {"client_init": "shared", **TWICE, **TOWER},
    ),
    "by row": Case("fedncf", {**TOWER, **BY_ROW}),
    "pfedrec by row": Case("pfedrec", {**BY_ROW, "server_lr": 2.0}),
    "cold rows by row": Case("cs_fcf", {**BY_ROW, "cold": "map"}),
    "plgc by row": Case("plgc", {**BY_ROW, "backbone": "fedmf"}),
    "regularised": Case("fedmf", {"l2": 0.02, "user_init_std": 0.3}),
    "fresh negatives": Case("fedrap", {**TWICE, "rate_decay": 0.9}, "trained_items"),
    "whole table": Case("fedrap", {"regularise": "table", "batch_size": 0}),
    "plgc over fedncf": Case("plgc", {"backbone": "fedncf", **TOWER, "kernel": "network", "contrast_weight": 0.1}),
    "plgc over fedmf": Case(
        "plgc", {"backbone": "fedmf", "optimizer": "adam", "lr": 0.01, "top_eigenvalues": 2, "normalise": True, **TWICE}
    ),
    "plgc replaced": Case("plgc", {"table": "replaced", "contrast": "mixed", "probability": True, "centre": False}),
    # dropped entries are scaled up, which blows rounding up too: small steps
    "dropout": Case(
        "feddae", {**OWN["feddae"], "lr": 0.002, "layers": (8, 6), "dropout": 0.5, "local_epochs": 3, "beta": 1.0}
    ),
    "views over fedncf": Case("fedvlr", {**VIEWS, **TOWER, "backbone": "fedncf", "router": "item"}),
    "views over pfedrec": Case("fedvlr", {**VIEWS, "backbone": "pfedrec", "router": "batch_mean", "batch_size": 0}),
    "views over fedrap": Case("fedvlr", {**VIEWS, "backbone": "fedrap", "operators": ("gate", "attention")}),
    "diffusion over fedncf": Case(
        "mdifffr",
        {"preset": "proper", **DIFFUSION, **TOWER, "backbone": "fedncf", "sampling_noise": True, "neighbours": 3},
    ),
    "strong pull": Case("ipfedrec", {**PULL, "reg": 190.0, "local_epochs": 2}, "outside_all"),
    "copies of the fusion": Case(
        "fedvlr", {**VIEWS, "backbone": "fedrap", "update": "parameters", "loss": "bpr"}, "trained_items"
    ),
    "graph of distances": Case(
        "gpfedrec", {**TOWER, "affinity": "distance", "message_layers": 2, "reg": 5.0}, "outside_all"
    ),
    "guidance": Case("fedrkg", {"interval": 2, "beta": 0.6, "gate_lr": 0.3, "gate_epochs": 2}),
    "guidance, released": Case(
        "fedrkg",
        {"backbone": "pfedrec", "interval": 1, "beta": 0.6, "gate_lr": 0.3, "delay": True, "clip_norm": 0.1}
        | {"rate_decay": 0.9},
        "outside_all",
    ),
    "guidance, plain": Case(
        "fedrkg",
        {**TOWER, "backbone": "fedncf", "guidance": "kg", "interval": 2, "beta": 0.3, "scorer": "shared"}
        | {"server_optimizer": "momentum", "server_lr": 0.5},
        "trained_items",
    ),
}
CASES = PLAIN | SPECIAL
GUIDED = [name for name in SPECIAL if "guidance" in name]
DISTINCT = [  # others are these with other settings
    "fedmf",
    "fedncf",
    "pfedrec",
    "fedrap",
    "plgc",
    "fedvlr",
    "fedvbpr",
    "mdifffr",
    "ipfedrec",
    "guidance",
    "guidance, released",
    "by row",
]
FUSED = [name for name in SPECIAL if "views" in name or "fusion" in name]
PLGC = [name for name in SPECIAL if name.startswith("plgc")]
DENSE = ["gpfedrec", "views over pfedrec"]
PULLED = ["ifedncf", "strong pull"]
SPARSE = [
    c
    for c in [*DISTINCT, *PULLED, "momentum", "adam", "regularised", "fresh negatives", *PLGC, *FUSED]
    if c not in DENSE
]
traces: Counter = Counter()  # of a round, by engine
first_states: dict = {}  # on the host, by the functions that make them


@functools.cache
def split() -> splits.Split:
    data = synthetic.make(USERS, ITEMS, min_history=4, median_history=9, max_history=30)
    whole = splits.leave_one_out(data.interactions)
    keep = whole.train.user != EMPTY
    return dataclasses.replace(whole, train=splits.Pairs(whole.train.user[keep], whole.train.item[keep]))


@functools.cache
def method(case: str):
    name, settings, _ = CASES[case]
    features = synthetic.make(USERS, ITEMS, min_history=4, median_history=9, max_history=30).features
    warm = np.arange(ITEMS) % 10 > 0 if name in COLD else None
    catalogue = Catalogue({modality: feature.values for modality, feature in features.items()}, warm)
    return methods.build(name, USERS, ITEMS, catalogue, **{**SMALL, **settings})


@functools.cache
def engine(
    case: str, *, buckets: int = 1, block: int = 0, devices: int = 1, rows: str = "", fixed: bool = False
) -> Engine:
    """By default in the layout that the other tests compare with. `fixed`: each bucket is one block, with as many steps
    as its histories may take, as accelerators have it."""
    plain = method(case)

    def counted(*args):
        traces[case, buckets, block, devices, rows] += 1
        return plain.server_update(*args)

    chosen = plain._replace(server_update=counted, rows=rows or plain.rows)
    population = clients.build(
        split(), negative_pool=CASES[case].negative_pool, max_buckets=buckets, num_devices=devices
    )
    made = make_engine(chosen, population, block_size=USERS if fixed else block)
    return dataclasses.replace(made, fixed=tuple(size.steps for size in made.sizes)) if fixed else made


def start(engine: Engine):
    """A copy of the first state: a round gives its argument away. One layout of a method makes it for all, which begin
    alike (a test of its own)."""
    made = engine.method
    maker = made.init_server, made.init_client, made.publish, made.client_init
    if maker not in first_states:
        first_states[maker] = on_host(engine, engine.init(KEY))
    state, user = first_states[maker], np.minimum(engine.clients.users, USERS - 1)  # no matter whose padding is
    by_slot = lambda tree: jax.tree.map(lambda x: x[user], tree)
    state = state.replace(clients=by_slot(state.clients), mail=by_slot(state.mail))
    return jax.tree.map(lambda x, said: jax.device_put(x, said.sharding), state, engine.shapes(KEY))


def play(engine: Engine, rounds=ROUNDS):
    """State (on the host, without padding users) and infos after the rounds, from the start."""
    state, infos = start(engine), []
    for number, users in enumerate(rounds):
        state, info = engine.round(KEY, state, number, engine.cohort(users))
        infos.append(info)
    return on_host(engine, state), jax.device_get(infos)


def on_host(engine: Engine, state):
    state = jax.tree.map(np.array, jax.device_get(state))
    by_user = lambda tree: jax.tree.map(lambda x: x[engine.clients.slots], tree)
    return state.replace(clients=by_user(state.clients), mail=by_user(state.mail))


@functools.cache
def played(case: str, **variant):
    return play(engine(case, **variant))


@functools.cache
def slow(case: str) -> oracle.Oracle:
    pool = CASES[case].negative_pool
    trained = np.unique(split().train.item) if pool == "trained_items" else None
    return oracle.Oracle(method(case), split(), trained, spare_held_out=pool == "outside_all")


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def assert_close(a, b):
    """float32 sums of some tens of terms of size 1 in another order, carried through three rounds."""
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=5e-6), a, b)


# ---- bit for bit -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", PLAIN)
def test_same_seed_same_result(case):
    assert_same(play(engine(case)), played(case))


@pytest.mark.parametrize("case", PLAIN)
def test_stopping_between_rounds_changes_nothing(case):
    again = engine(case)
    state, _ = again.round(KEY, start(again), 0)
    placed = jax.tree.map(lambda x: x.sharding, state)
    state = jax.device_put(jax.device_get(state), placed)  # as a checkpoint brings it back
    for number in (1, 2):
        state, _ = again.round(KEY, state, number, again.cohort(ROUNDS[number]))
    assert_same(on_host(again, state), played(case)[0])


@pytest.mark.parametrize("case", PLAIN)
def test_absent_clients_stay_as_they_were(case):
    before, _ = play(engine(case), ROUNDS[:1])
    after, (*_, info) = play(engine(case), ROUNDS[:2])
    of = lambda state, users: jax.tree.map(lambda x: x[users], state.clients)
    assert_same(of(before, ODD), of(after, ODD))
    assert info["clients"] == len(EVEN)
    for user in np.setdiff1d(EVEN, EMPTY):
        leaves = zip(*(jax.tree.leaves(of(state, user)) for state in (before, after)), strict=True)
        assert any((x != y).any() for x, y in leaves), f"user {user} took part and did not move"


@pytest.mark.parametrize("case", PLAIN)
def test_a_cohort_is_a_set(case):
    users = np.array([17, 3, 40, 8, 22])
    assert_same(play(engine(case), [users]), play(engine(case), [users[::-1]]))


@pytest.mark.parametrize("case", ["fedmf", "fedncf", "fedrap"])
def test_nobody_takes_part(case):
    before = on_host(engine(case), start(engine(case)))
    state, (info,) = play(engine(case), [np.array([], int)])
    assert_same(state.clients, before.clients)
    assert_same(state.server.shared, before.server.shared)
    assert info == {"loss": 0, "clients": 0}


@pytest.mark.parametrize("case", ["fedrap", "plgc", "fedvlr", "ipfedrec"])
def test_clients_start_alike_whatever_the_layout(case):
    spread = engine(case, buckets=2, devices=min(4, len(jax.devices())))
    assert_same(*(on_host(made, made.init(KEY)) for made in (engine(case), spread)))


# ---- to a tolerance ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_engine_is_the_loop_over_clients(case):
    state, infos = on_host(engine(case), start(engine(case))), []
    for number, users in enumerate(ROUNDS):
        state, info = slow(case).round(KEY, state, number, users)
        infos.append(info)
    fast_state, fast_infos = played(case)
    assert_close(fast_state, on_host(engine(case), state))
    assert_close([info["loss"] for info in fast_infos], [info["loss"] for info in infos])


@pytest.mark.parametrize("case", DISTINCT)
def test_blocks_and_buckets_change_nothing(case):
    assert (len(engine(case).buckets), len(engine(case, buckets=2, block=3).buckets)) == (1, 2)
    assert_close(played(case, buckets=2, block=3), played(case))


def test_blocks_made_for_a_cohort_change_nothing():
    plain, users = engine("fedmf"), np.array([17, 3, 40, 8])
    smaller = make_engine(plain.method, plain.clients, cohort=len(users))
    assert plain.block == (USERS,) and smaller.block == (len(users) + 2,)
    fixed = dataclasses.replace(smaller, fixed=(smaller.sizes[0].steps,))
    for made in (smaller, fixed):
        assert_close(play(made, [users, None]), play(plain, [users, None]))


def test_blocks_of_one_client_change_nothing():
    assert_close(played("momentum", block=1), played("momentum"))


@pytest.mark.skipif(len(jax.devices()) < 4, reason="needs 4 devices")
@pytest.mark.parametrize("case", DISTINCT)
def test_devices_change_nothing(case):
    assert_close(played(case, devices=4), played(case))


@pytest.mark.parametrize("case", ["momentum", "fedrap", "fedvlr", "gpfedrec"])
def test_loops_of_fixed_length_change_nothing(case):
    assert all(engine(case, buckets=2, fixed=True).fixed)
    assert_close(played(case, buckets=2, fixed=True), played(case))


@pytest.mark.parametrize("case", SPARSE)
def test_touched_rows_are_all_that_moves(case):
    sparse, dense = engine(case), engine(case, rows="all")
    assert dense.sizes[0].dense
    assert not all(size.dense for size in sparse.sizes), "this case would compare a thing with itself"
    assert_close(played(case, rows="all"), played(case))


# ---- further -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", PLAIN)
def test_changing_cohorts_compile_once(case, caplog):
    play(engine(case), [None])
    before = traces[case, 1, 0, 1, ""]
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        play(engine(case), [None, EVEN, ODD, np.array([1]), np.array([], int)])
    assert traces[case, 1, 0, 1, ""] == before > 0
    assert not [r for r in caplog.records if "Compiling" in r.getMessage() and "_round" in r.getMessage()]


@pytest.mark.parametrize("case", PLAIN)
def test_no_private_role_leaves_the_client(case):
    state = on_host(engine(case), start(engine(case)))
    own = jax.tree.map(lambda x: x[0], state.clients)
    shared = slow(case).published(KEY, state)
    kept, upload, *_ = slow(case).client(KEY, shared, (), own, 0, 0)
    assert set(kept) == set(own) and own
    assert set(upload) <= set(shared)
    assert not set(upload) & set(own)
    assert not set(shared) & set(own)


@pytest.mark.parametrize("case", PLAIN)
def test_different_histories_give_different_scores(case):
    """Also when everything private starts alike."""
    state = start(engine(case))
    alike = jax.tree.map(lambda x: jax.device_put(np.repeat(x[:1], len(x), 0), x.sharding), state.clients)
    state, _ = engine(case).round(KEY, state.replace(clients=alike), 0)
    one, other = (np.asarray(slow(case).scores(on_host(engine(case), state), user)) for user in (0, 1))
    assert one.shape == other.shape == (ITEMS,)
    assert np.isfinite(one).all()
    # centred: a user's bias moves all scores alike. 1e-5 is far above the rounding of scores of size 1
    assert np.abs((one - one.mean()) - (other - other.mean())).max() > 1e-5


@pytest.mark.parametrize("case", CASES)
def test_a_client_without_data_is_harmless(case):
    state, infos = played(case)
    before = on_host(engine(case), start(engine(case)))
    of_empty = lambda s: jax.tree.map(lambda x: x[EMPTY], s.clients)
    if case not in GUIDED:  # guidance reaches everybody
        assert_same(of_empty(state), of_empty(before))
    for leaf in jax.tree.leaves((state, infos)):
        assert np.isfinite(leaf).all()
    alone, (info,) = play(engine(case), [np.array([EMPTY])])
    assert info["clients"] == 1 and info["loss"] == 0
    assert_same(alone.server.shared, before.server.shared)


@pytest.mark.parametrize("case", PLAIN)
def test_uploads_are_finite_and_move_what_the_client_saw(case):
    state = on_host(engine(case), start(engine(case)))
    shared = slow(case).published(KEY, state)
    user = 0
    own = jax.tree.map(lambda x: x[user], state.clients)
    key = client_key(KEY, jnp.int32(0), jnp.int32(user))
    _, upload, *_ = slow(case).client(key, shared, (), own, user, 0)
    data = slow(case).data(streams(key)[0], user, 0)
    if not upload:
        return  # a method that exchanges tables in some rounds only
    (table,) = (jax.tree.leaves(upload[role])[0] for role in upload if role in ITEM_ROLES)
    if method(case).aggregator.over_mail:  # whole tables are sent, not changes
        table = table - shared["item"]
    moved = (np.asarray(table).reshape(ITEMS, -1) != 0).any(axis=1)
    assert moved[slow(case).history(user)].all()
    batch = oracle.all_batches(data)
    assert set(np.flatnonzero(moved)) <= set(np.asarray(batch.item)[np.asarray(batch.mask) > 0])
    for leaf in jax.tree.leaves(upload):
        assert np.isfinite(leaf).all()


@pytest.mark.parametrize("case", PLAIN)
def test_loss_falls(case):
    # CoFedRec's contrast takes most of a second a round, and its loss falls within a few
    _, infos = play(engine(case), [None] * (12 if case == "cofedrec" else 60))
    losses = [float(info["loss"]) for info in infos]
    # negatives are drawn anew each round, which moves a mean of five rounds by some thousandths
    assert np.mean(losses[-5:]) < 0.98 * np.mean(losses[:5])


def test_start_rounds_and_server_use_different_keys():
    users, times = [jnp.uint32(0), jnp.uint32(3), SERVER], [START, jnp.uint32(0), jnp.uint32(1)]
    keys = [k for t in times for u in users for k in (client_key(KEY, t, u), *jax.random.split(client_key(KEY, t, u)))]
    assert len({tuple(np.asarray(jax.random.key_data(k)).tolist()) for k in [KEY, *keys]}) == len(keys) + 1


@pytest.mark.skipif(len(jax.devices()) < 4, reason="needs 4 devices")
def test_mesh_and_clients_must_agree():
    with pytest.raises(ValueError, match="mesh of 4 devices, clients built for 1"):
        make_engine(method("fcf"), clients.build(split()), mesh=clients_mesh(4))
