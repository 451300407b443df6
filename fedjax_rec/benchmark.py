"""Round throughput of a configuration, beside a plain per-client NumPy loop and the memory bandwidth."""

from __future__ import annotations

import dataclasses
import os
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from fedjax_rec.data.clients import row_offsets
from fedjax_rec.data.splits import Split
from fedjax_rec.experiment import Experiment, RunConfig, check_memory, prepare
from fedjax_rec.layout import AXIS
from fedjax_rec.method import Method
from fedjax_rec.rounds import State, local_round, publish, server_step
from fedjax_rec.system import device_name, peak_memory_bytes, versions
from fedjax_rec.validate import positive
from fedjax_rec.workdir import write_json

COPY_BYTES = 2**28
LOOP_SAMPLES = 2 * 10**7  # the plain loop takes about 0.6 microseconds a sample: larger rounds are not timed


def run(
    config: RunConfig, workdir: str | os.PathLike | None = None, *, rounds: int = 20, data: tuple | None = None
) -> dict[str, Any]:
    """Times `rounds` rounds of training after the first one; writes benchmark.json into the workdir.

    Returns:
        times in seconds (median, min, max over the timed rounds, each waited for; `unwaited`: the mean of as many
        rounds of which only the last is waited for, as the device alone needs them; `phases_s`: rounds' three compiled
        functions waited for one by one; `exchange_s`: what an exchange adds to the rounds that have one, and how many
        of the timed ones had, None for methods without), throughputs per second by the median, bytes, and the first of
        these rounds, with its cohort, as a NumPy loop over clients (None for methods it does not know).
    """
    positive("rounds", rounds)
    ready = prepare(config, data)
    memory = check_memory(ready.engine)
    began = time.perf_counter()
    state = jax.block_until_ready(ready.engine.init(ready.key))
    init_s = time.perf_counter() - began
    began = time.perf_counter()
    state, info = jax.block_until_ready(ready.engine.round(ready.key, state, 0, _cohort(ready, 0)))
    first = time.perf_counter() - began
    times = []
    for round_ in range(1, rounds + 1):
        cohort = _cohort(ready, round_)
        began = time.perf_counter()
        state, info = jax.block_until_ready(ready.engine.round(ready.key, state, round_, cohort))
        times.append(time.perf_counter() - began)
    median = float(np.median(times))
    began = time.perf_counter()
    for round_ in range(rounds + 1, 2 * rounds + 1):  # the host runs ahead of the device
        state, info = ready.engine.round(ready.key, state, round_, _cohort(ready, round_))
    jax.block_until_ready((state, info))
    unwaited = (time.perf_counter() - began) / rounds
    phases, state = _phases(ready, state, rounds)
    exchange, state = _exchange(ready, state, rounds)
    peak = peak_memory_bytes()
    began = time.perf_counter()
    ready.evaluator.ranks(ready.key, state, rounds + 1, ready.eval_cohort)
    first_evaluation = time.perf_counter() - began
    began = time.perf_counter()
    ready.evaluator.ranks(ready.key, state, rounds + 1, ready.eval_cohort)
    evaluation = time.perf_counter() - began
    clients = float(info["clients"])
    share = clients / ready.split.num_users
    samples = samples_per_round(ready.method, ready.split) * share
    bandwidth = memory_bandwidth(ready.engine.mesh)
    moved = rows_moved_bytes(ready.method, samples)
    result = {
        "method": config.method,
        "settings": dataclasses.asdict(ready.method.config),
        "dataset": config.dataset,
        "clients": int(clients),
        "items": ready.split.num_items,
        "samples_per_round": int(samples),
        "compile_s": max(first - median, 0.0),
        "init_s": init_s,
        "first_round_s": first,
        "round_s": {"median": median, "min": min(times), "max": max(times), "n": rounds, "unwaited": unwaited},
        "phases_s": phases,
        "exchange_s": exchange,
        "evaluate_s": {"first": first_evaluation, "again": evaluation},
        "clients_per_s": clients / median,
        "interactions_per_s": len(ready.split.train.item) * share / median,
        "samples_per_s": samples / median,
        "bytes": ready.engine.bytes_per_client(),
        "bytes_per_round": moved,
        "memory_bandwidth_bytes_per_s": bandwidth,
        "roofline_share": moved / bandwidth / median,
        "numpy_loop_round_s": numpy_loop_seconds(ready.method, ready.split, ready.cohort_users(1)),
        "peak_memory_bytes": peak,
        "memory_estimate_bytes": memory,
        "block_sizes": list(ready.engine.block),
        "devices": ready.engine.mesh.size,
        "versions": versions(),
        "device": device_name(),
    }
    if workdir is not None:
        Path(workdir).mkdir(parents=True, exist_ok=True)
        write_json(Path(workdir) / "benchmark.json", result)
    return result


def _phases(ready: Experiment, state: State, rounds: int) -> tuple[dict[str, float], State]:
    """Median seconds of a round's three compiled functions, each waited for: what the server makes for its clients
    (fusion), the clients with the aggregation of their uploads, and the server's step (the pull-back). The first pass
    compiles them and is not counted."""
    engine, key = ready.engine, ready.key
    times = []
    for round_ in range(rounds + 1):
        cohort = _cohort(ready, round_) or engine.everybody
        round_ = jnp.int32(round_)  # as in a round, whose compiled functions serve again
        at = [time.perf_counter()]
        shared = jax.block_until_ready(publish(engine, key, state.server, round_))
        at.append(time.perf_counter())
        worked = local_round(engine)(engine, key, shared, state.clients, state.mail, round_, cohort)
        clients, received, _ = jax.block_until_ready(worked)
        at.append(time.perf_counter())
        server, mail = jax.block_until_ready(server_step(engine, key, state.server, round_, received))
        at.append(time.perf_counter())
        state = State(server, clients, mail)
        times.append(np.diff(at))
    return dict(zip(("publish", "clients", "server_step"), np.median(times[1:], 0).tolist(), strict=True)), state


def _exchange(ready: Experiment, state: State | None, rounds: int) -> tuple[dict[str, Any] | None, State | None]:
    """Median seconds of the method's dense pass over all clients, of up to five; the first one compiles it and is not
    counted."""
    exchange, times = ready.method.exchange, []
    if exchange is None:
        return None, state
    for round_ in range(min(rounds, 5) + 1):
        began = time.perf_counter()
        state, _ = jax.block_until_ready(ready.engine.exchange(ready.key, state, jnp.int32(round_)))
        times.append(time.perf_counter() - began)
    due = sum(map(exchange.due, range(1, rounds + 1)))
    return {"median": float(np.median(times[1:])), "n": len(times) - 1, "rounds_due": due}, state


def _cohort(ready, round_: int):
    users = ready.cohort_users(round_)
    return None if users is None else ready.engine.cohort(users)


def samples_per_round(method: Method, split: Split) -> int:
    """Training samples of a round in which everybody takes part."""
    sampling = method.sampling
    return len(split.train.item) * (1 + sampling.negatives) * sampling.local_epochs


def rows_moved_bytes(method: Method, samples: float) -> float:
    """Bytes that a round cannot help moving: each sampled row is read from the table, then added into the sum
    (a read and a write)."""
    return 3 * samples * getattr(method.config, "dim", 0) * 4


def memory_bandwidth(mesh: Mesh) -> float:
    """Bytes per second of a large copy on all devices of the mesh at once, counting reads and writes; best of five."""
    # virtual CPU devices share one memory; an accelerator copies so fast that the time of a call would count
    devices, copies = (1, 1) if jax.default_backend() == "cpu" else (mesh.size, 20)
    x = jnp.zeros(COPY_BYTES // 4 * devices, device=NamedSharding(mesh, P(AXIS)) if devices > 1 else None)
    copy = jax.jit(lambda x: x + 1)
    jax.block_until_ready(copy(x))
    times = []
    for _ in range(5):
        began = time.perf_counter()
        for _ in range(copies):
            made = copy(x)
        jax.block_until_ready(made)
        times.append(time.perf_counter() - began)
    return 2 * COPY_BYTES * devices * copies / min(times)


def table(result: dict[str, Any]) -> str:
    """A few lines for people."""
    loop, exchange = result["numpy_loop_round_s"], result["exchange_s"]
    against = f"{loop:.3f} s ({loop / result['round_s']['median']:.1f} x)" if loop else "not available for this method"
    rows = {
        "method": f"{result['method']} on {result['dataset']}, {result['clients']:,} clients",
        "device": f"{result['devices']} x {result['device']}",
        "first round": f"{result['first_round_s']:.2f} s (compilation {result['compile_s']:.2f} s)",
        "round": f"median {result['round_s']['median'] * 1e3:.2f} ms, min {result['round_s']['min'] * 1e3:.2f}, "
        f"max {result['round_s']['max'] * 1e3:.2f}, n {result['round_s']['n']}; "
        f"waited for at the end alone {result['round_s']['unwaited'] * 1e3:.2f} ms",
        "of it": ", ".join(f"{name} {1e3 * s:.2f} ms" for name, s in result["phases_s"].items()),
        **(
            {"exchange": f"{exchange['median'] * 1e3:.2f} ms, in {exchange['rounds_due']} of the timed rounds"}
            if exchange
            else {}
        ),
        "throughput": f"{result['clients_per_s']:,.0f} clients/s, {result['interactions_per_s']:,.0f} interactions/s, "
        f"{result['samples_per_s']:,.0f} samples/s",
        "evaluation": f"{result['evaluate_s']['again'] * 1e3:.1f} ms",
        "bandwidth": f"{result['memory_bandwidth_bytes_per_s'] / 1e9:.1f} GB/s measured; the rows a round must move "
        f"use {result['roofline_share']:.1%} of it",
        "NumPy loop": against,
        "peak memory": f"{result['peak_memory_bytes'] / 2**20:,.0f} MiB",
    }
    return "\n".join(f"{name:<12} {text}" for name, text in rows.items())


# ---- the plain loop ----------------------------------------------------------------------------------------


def numpy_loop_seconds(
    method: Method, split: Split, cohort: np.ndarray | None = None, repeats: int = 3
) -> float | None:
    """Median seconds of one round as a loop over the cohort's clients (None: all) that touches only used rows, as one
    would write it by hand in NumPy; None for methods whose score is not linear in the item vector, and for very large
    rounds."""
    if method.name not in ("pfedrec", "fedmf", "fcf", "fedavg") or method.sampling.local_epochs != 1:
        return None
    users = np.arange(split.num_users) if cohort is None else cohort
    if samples_per_round(method, split) * len(users) / split.num_users > LOOP_SAMPLES:
        return None
    rng = np.random.default_rng(0)
    dim = method.config.dim
    table = rng.normal(0, 0.1, (split.num_items, dim)).astype(np.float32)
    heads = rng.normal(0, 0.1, (split.num_users, dim + 1)).astype(np.float32)
    offsets = row_offsets(split.train.user, split.num_users)
    two_steps = method.name == "pfedrec"
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        _numpy_round(rng, table, heads, split, offsets, users, method, two_steps)
        times.append(time.perf_counter() - began)
    return float(np.median(times))


def _numpy_round(rng, table, heads, split: Split, offsets, users, method: Method, two_steps: bool) -> None:
    """One round: each of `users` draws, trains on its rows and adds its change into the sum."""
    sampling, lr, by_row = method.sampling, np.float32(0.1), method.aggregator.by_row
    total, moved = np.zeros_like(table), np.zeros(len(table), np.float32)
    for user in users:
        history = split.train.item[offsets[user] : offsets[user + 1]]
        if not len(history):
            continue
        free = split.num_items - len(history)
        ranks = rng.integers(0, free, len(history) * sampling.negatives)
        negatives = ranks + np.searchsorted(history - np.arange(len(history)), ranks, side="right")
        items = np.concatenate([history, negatives])
        labels = np.zeros(len(items), np.float32)
        labels[: len(history)] = 1
        rows, index = np.unique(items, return_inverse=True)
        local = table[rows]
        order = rng.permutation(len(items))
        size = sampling.batch_size or len(items)
        weight, bias = heads[user, :-1], heads[user, -1:]
        for start in range(0, len(items), size):
            batch = order[start : start + size]
            where, label = index[batch], labels[batch]
            vectors = local[where]
            error = _error(vectors, weight, bias, label)
            step = lr * (error @ vectors), lr * error.sum()
            if two_steps:
                weight -= step[0]
                bias -= step[1]
                error = _error(vectors, weight, bias, label)
            np.add.at(local, where, -lr * error[:, None] * weight)
            if not two_steps:
                weight -= step[0]
                bias -= step[1]
        total[rows] += local - table[rows]
        if by_row:
            moved[rows] += 1
    table += total / (np.maximum(moved, 1)[:, None] if by_row else len(users))


def _error(vectors, weight, bias, label):
    return (1 / (1 + np.exp(-(vectors @ weight + bias))) - label) / np.float32(len(label))
