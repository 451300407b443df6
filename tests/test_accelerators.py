"""What accelerators do otherwise than CPUs, as far as a CPU can show it."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from fedjax_rec import benchmark, evaluate, layout, rounds, run, system
from fedjax_rec.data import splits, synthetic
from fedjax_rec.run import RunConfig


def ready(method: str, **changes):
    made = synthetic.make(24, 40, min_history=5, median_history=8, max_history=12)
    data = made.interactions, splits.leave_one_out(made.interactions), made.features
    return run.prepare(RunConfig(method=method, max_buckets=1, **{"devices": 1, **changes}), data)


def products(text: str) -> list[str]:
    return [line for line in text.splitlines() if "dot_general" in line]


def lowered(one) -> str:
    """The clients' part of a round, the server's, and the ranking."""
    engine, evaluator, key, round_ = one.engine, one.evaluator, one.key, jnp.int32(0)
    state = engine.init(key)
    shared = rounds.publish(engine, key, state.server, round_)
    local = rounds.local_round(engine), (engine, key, shared, state.clients, state.mail, round_, engine.everybody)
    received = jax.eval_shape(lambda *rest: local[0](engine, *rest), *local[1][1:])[1]
    scorer, asked = evaluate.method_scorer, ((key, round_, shared), (state.clients, state.mail))
    cohort, buckets = engine.everybody, engine.buckets
    rank = (evaluator, scorer, *asked, cohort, buckets, evaluator.targets, (), None, engine.pool)
    parts = (local, (rounds.server_step, (engine, key, state.server, round_, received)), (evaluate._rank_pass, rank))
    return "\n".join(function.lower(*arguments).as_text() for function, arguments in parts)


@pytest.mark.parametrize("method", ["fedncf", "ease", "gpfedrec"])
def test_products_are_float32_on_every_device(method):
    """TPUs round factors to bfloat16, GPUs to TF32, unless a product asks for more."""
    found = products(lowered(ready(method)))
    assert found and all("HIGHEST, HIGHEST" in line for line in found)


@pytest.mark.parametrize("method", ["fedmf", "fedvlr", "plgc"])
def test_no_loop_of_a_round_asks_the_host(method):
    """A loop of known length is a scan; an accelerator's host is asked before every pass of another one."""
    one, round_ = ready(method, block_size=24), jnp.int32(0)
    state = jax.eval_shape(one.engine.init, one.key)
    shared = jax.eval_shape(one.engine.method.publish, one.key, state.server)
    asked = {}
    for fixed in (False, True):
        engine = dataclasses.replace(one.engine, fixed=(one.engine.sizes[0].steps * fixed,))
        local = functools.partial(rounds._client_round, engine, one.key)
        told = (shared, state.clients, state.mail, round_, engine.everybody)
        asked[fixed] = " while[" in str(jax.make_jaxpr(local)(*told))
    assert asked == {False: True, True: False}


def test_blocks_fit_an_accelerators_memory(monkeypatch):
    def asked(stats):
        monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(memory_stats=lambda: stats)])
        return layout.device_block_bytes()

    assert asked({"bytes_limit": 80 * 2**30}) == asked(None) == 2**30
    # 16 GB, of which JAX takes 75 or 95 %
    assert asked({"bytes_limit": 12 * 2**30}) == asked({"bytes_limit": int(15.2 * 2**30)}) == 2**28


@pytest.mark.parametrize(
    "platform, cohort, block, fixed",
    [
        ("gpu", 0, 24, True),
        ("gpu", 0, 23, False),  # a second block, of other lengths
        ("gpu", 6, 9, True),  # 6 and their standard deviation
        ("gpu", 6, 8, False),
        ("cpu", 0, 24, False),
    ],
)
def test_loops_are_fixed_where_an_accelerator_has_one_block(monkeypatch, platform, cohort, block, fixed):
    engine = ready("fedmf", settings={"batch_size": 16}).engine
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    longest = int(engine.clients.buckets[0].length.max())
    assert layout.fixed_steps(dataclasses.replace(engine, block=(block,)), cohort) == (-(-longest * 5 // 16) * fixed,)
    assert engine.fixed == (0,)


def test_a_chosen_precision_holds():
    with jax.default_matmul_precision("bfloat16"):
        found = products(lowered(ready("fedncf")))
    assert any("HIGHEST" not in line for line in found)


def test_memory_counts_what_every_device_holds_whole():
    one, four = ready("ease"), ready("ease", devices=4)
    state = four.engine.init(four.key)
    held = sum(part.data.nbytes for leaf in jax.tree.leaves(state.server) for part in leaf.addressable_shards)
    assert four.engine.memory_bytes()["server"] == 3 * held == 4 * one.engine.memory_bytes()["server"]
    # a checkpoint has it once
    disk = [next(line for line in run.introduction(r).splitlines() if line.startswith("disk")) for r in (one, four)]
    assert disk[0] == disk[1]


def test_free_memory_is_that_of_the_devices_in_use(monkeypatch):
    def device(limit, used):
        return SimpleNamespace(memory_stats=lambda: {"bytes_limit": limit, "bytes_in_use": used})

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    devices = [device(100, 10), device(100, 40), device(100, 0)]
    assert system.available_bytes(devices[:1]) == 90
    assert system.available_bytes(devices) == 3 * 60  # the fullest one decides
    assert system.available_bytes([*devices, SimpleNamespace(memory_stats=lambda: None)]) is None


@pytest.mark.parametrize("method, made", [("fedmf", 0), ("mlp_fusion", 1)])
def test_each_function_of_a_round_compiles_once(method, made):
    """Whoever calls it: the round, the evaluation, the benchmark of the parts. A table that is published as it is needs
    no function."""
    functions = rounds.make_published, rounds.client_round_beside_mail, rounds.server_step
    one, before = ready(method, devices=4), [function._cache_size() for function in functions]
    state = one.engine.init(one.key)
    for round_ in range(2):
        state, _ = one.engine.round(one.key, state, round_)
        one.evaluator.ranks(one.key, state, round_ + 1)
    benchmark._phases(one, state, 1)
    assert [function._cache_size() - held for function, held in zip(functions, before, strict=True)] == [made, 1, 1]


def test_a_table_that_is_published_as_it_is_is_not_copied():
    one = ready("fedmf", devices=4)
    server = one.engine.init(one.key).server
    assert rounds.publish(one.engine, one.key, server, 0)["item"] is server.shared["item"]


def test_bandwidth_is_that_of_all_devices_of_the_mesh(monkeypatch):
    mesh, calls = layout.clients_mesh(4), []
    monkeypatch.setattr(benchmark, "COPY_BYTES", 2**12)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(benchmark.time, "perf_counter", itertools.count().__next__)
    monkeypatch.setattr(benchmark.jax, "block_until_ready", calls.append)
    assert benchmark.memory_bandwidth(mesh) == 2 * 2**12 * 4 * 20
    assert {len(x.sharding.device_set) for x in calls} == {4} and calls[0].nbytes == 4 * 2**12
