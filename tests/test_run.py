"""Runs: the same result whether interrupted or not, selection on validation only, and results that add up."""

from __future__ import annotations

import csv
import dataclasses
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from fedjax_rec import experiment, metrics, report, run
from fedjax_rec.checkpoint import Checkpoints
from fedjax_rec.data import splits, synthetic
from fedjax_rec.evaluate import Ranks
from fedjax_rec.methods import METHODS
from fedjax_rec.protocols import HONEST, PUBLISHED
from fedjax_rec.rounds import Engine, make_engine
from fedjax_rec.run import RunConfig, cohort_size
from fedjax_rec.workdir import UsageError, strict

ROOT = Path(__file__).resolve().parents[1]
USERS, ITEMS = 30, 70
SETTINGS = {"dim": 4, "batch_size": 16, "negatives": 2, "init_std": 0.3, "item_lr_scale": 1.0}
BASE = RunConfig(
    settings=SETTINGS,
    rounds=6,
    eval_every=2,
    checkpoint_every=2,
    ks=(5, 10),
    max_buckets=1,
    devices=1,
)
STUCK = {**SETTINGS, "lr": 1e-30}  # nothing moves, so every round is equally good


def config(**changes) -> RunConfig:
    settings = {**BASE.settings, **changes.pop("settings", {})}
    return dataclasses.replace(BASE, settings=settings, **changes)


@functools.cache
def made() -> synthetic.Synthetic:
    return synthetic.make(USERS, ITEMS, min_history=5, median_history=8, max_history=20, late_users=0.3)


@functools.cache
def data() -> tuple:
    return made().interactions, splits.leave_one_out(made().interactions), made().features


prepare = run.prepare


@functools.cache
def prepared(json_of_layout: str, split: splits.Split) -> run.Experiment:
    layout = {**json.loads(json_of_layout), "ks": BASE.ks}
    interactions, _, features = data()
    return prepare(RunConfig(**layout), (interactions, split, features))


@pytest.fixture(autouse=True, scope="module")
def compile_once():
    """Runs that differ only in their loop share their compiled functions, and all read the same data."""
    only_loop = ("rounds", "eval_every", "ks", "select_metric", "patience", "checkpoint_every")

    def shared(config, given=None):
        layout = {k: v for k, v in dataclasses.asdict(config).items() if k not in only_loop}
        _, split, _ = given or data()
        return dataclasses.replace(prepared(json.dumps(layout, sort_keys=True), split), config=config)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "prepare", shared)
        yield


@pytest.fixture
def no_references(monkeypatch):
    monkeypatch.setattr(run, "reference_results", lambda ready, rounds: {})


def untimed(value):
    """Without what may differ between equal runs."""
    if isinstance(value, dict):
        return {k: untimed(v) for k, v in value.items() if k not in ("seconds", "peak_memory_bytes")}
    return value


def results(folder: Path) -> tuple[list[str], str, dict]:
    """metrics.jsonl and summary.json as text, which tells every bit of a number and NaN from NaN."""
    lines = [json.dumps(untimed(json.loads(line))) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    summary = json.dumps(untimed(json.loads((folder / "summary.json").read_text())), indent=1)
    return lines, summary, dict(np.load(folder / "per_client.npz"))


def assert_same_results(a: Path, b: Path):
    (lines, summary, table), (other_lines, other_summary, other_table) = results(a), results(b)
    assert lines == other_lines
    assert summary == other_summary
    assert table.keys() == other_table.keys()
    for name in table:
        np.testing.assert_array_equal(table[name], other_table[name], err_msg=name)


def stop_after(monkeypatch, rounds: int):
    """The next run receives its signal in that round."""

    class Stop:
        asked = 0

        def __enter__(self):
            return self

        def __exit__(self, *exc):
            pass

        @property
        def received(self):
            self.asked += 1
            return self.asked >= rounds

    monkeypatch.setattr(run, "StopSignal", Stop)


def rounds_logged(folder: Path) -> list[int]:
    return [json.loads(line)["round"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def checkpointed(folder: Path) -> int | None:
    with Checkpoints(folder / "checkpoints") as held:
        return held.latest


# ---- interrupted runs ----------------------------------------------------------------------------------------

INTERRUPTED = {
    "cohorts": config(clients_per_round=0.4, settings={"server_optimizer": "adam", "server_lr": 0.05}),
    "own tables": config(method="fedrap", clients_per_round=7, checkpoint_every=0),
}


@pytest.mark.parametrize("case", INTERRUPTED)
def test_stopped_and_started_again_equals_uninterrupted(case, tmp_path, monkeypatch):
    chosen = INTERRUPTED[case]
    if case != "cohorts":  # the rankers need their time once only
        monkeypatch.setattr(run, "reference_results", lambda ready, rounds: {})
    run.train(chosen, tmp_path / "whole")
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        summary = run.train(chosen, tmp_path / "parts")
    assert summary["status"] == run.STOPPED
    assert checkpointed(tmp_path / "parts") == 3
    assert not (tmp_path / "parts" / "summary.json").exists()
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        run.train(chosen, tmp_path / "parts")
    assert run.train(chosen, tmp_path / "parts")["status"] == "done"
    assert_same_results(tmp_path / "whole", tmp_path / "parts")


def test_a_configuration_holds_what_can_be_recorded(tmp_path):
    """Paths and NumPy's numbers, as loops over np.arange and pathlib give them."""
    given = RunConfig(
        seed=np.int64(1), rounds=np.int32(3), ks=np.array([5, 10]), select_metric="NDCG@5", data_dir=tmp_path,
        clients_per_round=np.float32(0.25), dataset=tmp_path / "a.csv", features={"image": tmp_path / "a.npz"},
        settings={"lr": np.float32(0.5)},
    )  # fmt: skip
    plain = dataclasses.replace(
        given, dataset=str(tmp_path / "a.csv"), data_dir=str(tmp_path), features={"image": str(tmp_path / "a.npz")}
    )
    assert given == plain and json.loads(json.dumps(given.recorded()))["ks"] == [5, 10]
    assert cohort_size(RunConfig(clients_per_round=np.int64(1)).clients_per_round, 8) == 1
    assert cohort_size(RunConfig(clients_per_round=np.float64(1)).clients_per_round, 8) == 8


@pytest.mark.usefixtures("no_references")
def test_a_signal_costs_the_round_on_its_way_alone(tmp_path, monkeypatch):
    """It comes while round 3 is read, when round 4 is on its way already."""
    read = run._read_round

    def told(done, *rest):
        if done == 3:
            signal.raise_signal(signal.SIGTERM)
        return read(done, *rest)

    monkeypatch.setattr(run, "_read_round", told)
    summary = run.train(config(rounds=9, eval_every=100, select_metric="NDCG@5"), tmp_path)
    assert (summary["status"], checkpointed(tmp_path), rounds_logged(tmp_path)) == (run.STOPPED, 4, [1, 2, 3, 4])


@pytest.mark.usefixtures("no_references")
def test_a_round_is_sent_off_before_the_last_one_is_read(monkeypatch):
    """So that a device need not wait for the host; what is judged or saved is read first."""
    told, send, read, judge = [], run._send_round, run._read_round, run._judge_round
    monkeypatch.setattr(run, "_send_round", lambda r, s, n: told.append(f"send {n + 1}") or send(r, s, n))
    monkeypatch.setattr(run, "_read_round", lambda n, *a: told.append(f"read {n}") or read(n, *a))
    monkeypatch.setattr(run, "_judge_round", lambda r, s, line, *a: told.append("judge") or judge(r, s, line, *a))
    run.train(config(rounds=4, eval_every=3))
    assert told == ["send 1", "send 2", "read 1", "send 3", "read 2", "read 3", "judge", "send 4", "read 4", "judge"]


@pytest.mark.parametrize(("first", "stopped_at"), [(4, None), (4, 3), (5, 3), (4, 4)])
def test_a_longer_run_goes_on_and_equals_an_uninterrupted_one(first, stopped_at, tmp_path, monkeypatch):
    """From its end, from its middle, or from where it was stopped after it was lengthened already."""
    chosen, folder = dataclasses.replace(INTERRUPTED["cohorts"], rounds=8), tmp_path / "parts"
    if stopped_at != 4:  # only what is evaluated when due is compared
        monkeypatch.setattr(run, "reference_results", lambda ready, rounds: {})
    run.train(chosen, tmp_path / "whole")
    with monkeypatch.context() as patch:
        if stopped_at:
            stop_after(patch, stopped_at)
        run.train(dataclasses.replace(chosen, rounds=first), folder)
    assert checkpointed(folder) == (stopped_at or first)
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        assert run.train(chosen, folder)["status"] == run.STOPPED
    assert not (folder / "summary.json").exists() and run.config_of(folder).rounds == 8
    run.train(chosen, folder)
    assert_same_results(tmp_path / "whole", folder)


@pytest.mark.usefixtures("no_references")
def test_a_run_is_not_shortened_and_not_lengthened_beyond_an_evaluation_out_of_turn(tmp_path):
    run.train(config(rounds=3), tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.glob("*.json*")}
    for change, said in (
        ({"rounds": 2}, "rounds: 3 there, 2 given"),
        ({"rounds": 4, "seed": 1}, r"\(rounds: 3 there, 4 given; seed: 0 there, 1 given\)"),
        ({"rounds": 4}, r"--rounds=4: .* holds a run of 3 rounds, .* no multiple of --eval_every=2"),
    ):
        with pytest.raises(UsageError, match=said):
            run.train(config(**change), tmp_path)
    assert {path: path.read_bytes() for path in before} == before


def crash_at(monkeypatch, round_: int):
    """The next run dies when this round is logged, as under kill -9: nothing is saved any more."""
    append = run.MetricsLog.append

    def dying(self, line):
        append(self, line)
        if line["round"] == round_:
            raise KeyboardInterrupt

    monkeypatch.setattr(run.MetricsLog, "append", dying)


@pytest.mark.usefixtures("no_references")
@pytest.mark.parametrize("cut", [0, 1, 40])
def test_rounds_after_the_last_checkpoint_are_run_again(tmp_path, monkeypatch, cut):
    run.train(config(), tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        crash_at(patch, 5)
        run.train(config(), tmp_path / "parts")
    assert checkpointed(tmp_path / "parts") == 4
    assert rounds_logged(tmp_path / "parts") == [1, 2, 3, 4, 5]
    path = tmp_path / "parts" / "metrics.jsonl"
    os.truncate(path, path.stat().st_size - cut)
    run.train(config(), tmp_path / "parts")
    assert_same_results(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.usefixtures("no_references")
def test_a_damaged_log_or_checkpoint_stops_a_resumed_run_and_nothing_is_lost(tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        crash_at(patch, 5)
        run.train(config(), tmp_path)
    path = tmp_path / "metrics.jsonl"
    good = path.read_text()
    path.write_text(good.replace('{"round": 3,', '{"round: 3,'))
    spoiled = path.read_text()
    with pytest.raises(UsageError, match=r"metrics\.jsonl line 3: not a JSON object"):
        run.train(config(), tmp_path)
    assert path.read_text() == spoiled
    path.write_text(good)
    newest = tmp_path / "checkpoints" / "4"
    shutil.rmtree(newest / "state")
    for call in (lambda: run.train(config(), tmp_path), lambda: run.evaluate(tmp_path)):
        with pytest.raises(UsageError, match=r"checkpoints/4 cannot be read \(.*\); remove it to go on from round 2"):
            call()
    shutil.rmtree(newest)
    assert run.train(config(), tmp_path)["status"] == "done"
    assert rounds_logged(tmp_path) == [1, 2, 3, 4, 5, 6]


@pytest.mark.usefixtures("no_references")
def test_a_run_killed_before_its_first_checkpoint_starts_anew(tmp_path, monkeypatch):
    run.train(config(), tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        crash_at(patch, 1)
        run.train(config(), tmp_path / "parts")
    run.train(config(), tmp_path / "parts")
    assert_same_results(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.usefixtures("no_references")
def test_a_finished_run_started_again_only_repeats_its_results(tmp_path):
    """Times, memory, versions and device stay those of the run, as the file has them."""
    first = run.train(config(), tmp_path)
    (tmp_path / "per_client.npz").rename(tmp_path / "table.npz")
    before = {path: path.read_bytes() for path in tmp_path.glob("*.json*")}
    again = run.train(config(), tmp_path)
    assert again["seconds"]["compile"] > 0
    assert json.dumps(strict(first)) == json.dumps(again)
    assert {path: path.read_bytes() for path in before} == before
    table, made = np.load(tmp_path / "table.npz"), np.load(tmp_path / "per_client.npz")
    for name in table:  # what is missing is made
        np.testing.assert_array_equal(table[name], made[name])
    (tmp_path / "summary.json").unlink()
    assert json.dumps(untimed(run.train(config(), tmp_path))) == json.dumps(untimed(first))


@pytest.mark.usefixtures("no_references")
def test_a_saved_summary_is_shown_as_the_first_was(tmp_path):
    """Where there is no unseen target, the file has null for its means."""
    kept = run.train(config(rounds=2), tmp_path)
    kept["test_unseen"] = dict.fromkeys(kept["test_unseen"], float("nan"))
    assert report.table(strict(kept)) == report.table(kept)


@pytest.mark.usefixtures("no_references")
def test_a_workdir_changes_no_result(tmp_path):
    with_workdir, without = run.train(config(), tmp_path), run.train(config())
    assert json.dumps(untimed(with_workdir)) == json.dumps(untimed(without))


@pytest.mark.usefixtures("no_references")
@pytest.mark.parametrize(
    ("change", "named"),
    [({"seed": 1}, "seed: 0 there, 1 given"), ({"settings": {"lr": 0.2}}, "0.2"), ({"block_size": 2}, "block_size")],
    ids=str,
)
def test_a_workdir_of_another_run_is_refused_naming_the_difference(tmp_path, change, named):
    run.train(config(rounds=1), tmp_path)
    before = results(tmp_path)[:2]
    with pytest.raises(UsageError, match=named):
        run.train(config(rounds=1, **change), tmp_path)
    assert results(tmp_path)[:2] == before


@pytest.mark.usefixtures("no_references")
def test_a_checkpoint_is_restored_without_a_fresh_state_beside_it(tmp_path, monkeypatch):
    """Client state may be most of the memory: it is there once."""
    run.train(config(rounds=4), tmp_path, data=data())
    init = Engine.init

    def traced_alone(self, key):
        assert isinstance(key, jax.core.Tracer), "a state is made"
        return init(self, key)

    monkeypatch.setattr(Engine, "init", traced_alone)
    shutil.rmtree(tmp_path / "checkpoints" / "4")
    assert run.train(config(rounds=4), tmp_path, data=data())["rounds"] == 4
    assert run.judge(tmp_path, ranking="sampled_99")["judged_round"] == 4
    with pytest.raises(AssertionError, match="a state is made"):
        run.train(config(rounds=4), data=data())


@pytest.mark.parametrize("method", ["fedrap", "gpfedrec"])
def test_the_shapes_of_a_state_are_those_of_a_fresh_one(method):
    """With their places on a mesh; GPFedRec has mail."""
    ready = prepare(config(method=method, devices=4), data())
    told, fresh = ready.engine.shapes(ready.key), ready.engine.init(ready.key)
    assert jax.tree.structure(told) == jax.tree.structure(fresh)
    for a, b in zip(jax.tree.leaves(told), jax.tree.leaves(fresh), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype) and a.sharding.is_equivalent_to(b.sharding, b.ndim)


# ---- a real process, killed ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def killed(tmp_path_factory) -> dict[str, Path]:
    """Workdirs of one configuration: `whole`, and `killed` in the middle, its last line torn, and started again."""
    folder = tmp_path_factory.mktemp("killed")
    rows = made().interactions
    with (folder / "tiny.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["user", "item", "timestamp"])
        writer.writerows(zip(rows.user, rows.item, rows.time, strict=True))
    command = [
        *(sys.executable, str(ROOT / "launch.py"), f"--dataset={folder / 'tiny.csv'}", "--rounds=300"),
        *("--set=dim=4", "--set=batch_size=16", "--k=5,10", "--eval_every=20", "--checkpoint_every=10"),
        *("--clients_per_round=0.5", "--max_buckets=1", "--cpu_devices=1", "--noprogress", "--noplots"),
        *(f"--data_dir={folder}", f"--compile_cache={folder / 'cache'}"),
    ]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}

    def start(name):
        return subprocess.Popen(
            [*command, f"--workdir={folder / name}"], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )

    def finish(name):
        process = start(name)
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output.decode()

    finish("whole")
    process = start("killed")
    log = folder / "killed" / "metrics.jsonl"
    while process.poll() is None and not (log.exists() and log.read_text().count("\n") >= 25):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL, "the run ended before it was killed"
    assert not (folder / "killed" / "summary.json").exists()
    with log.open("a") as file:  # half of the next line
        file.write(log.read_text().splitlines()[-1][:30])
    finish("killed")
    return {name: folder / name for name in ("whole", "killed")}


def test_kill_and_resume_equals_uninterrupted(killed):
    assert rounds_logged(killed["whole"]) == list(range(1, 301))
    assert_same_results(killed["whole"], killed["killed"])


# ---- stopping ------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_references")
def test_a_loss_that_is_not_finite_stops_naming_the_round_and_keeps_the_checkpoint(tmp_path):
    exploding = config(settings={"lr": 1e25, "batch_size": 0}, checkpoint_every=1, eval_every=6)
    with pytest.raises(FloatingPointError, match="after round 2"):
        run.train(exploding, tmp_path)
    assert checkpointed(tmp_path) == 1
    assert rounds_logged(tmp_path) == [1]
    assert not (tmp_path / "summary.json").exists()


@pytest.mark.usefixtures("no_references")
def test_scores_that_are_not_finite_stop_before_they_are_ranked(tmp_path):
    with pytest.raises(FloatingPointError, match="scores are not finite after round 1"):
        run.train(config(settings={"lr": 1e25, "batch_size": 0}, eval_every=1), tmp_path)


def test_a_signal_while_rankers_are_judged_leaves_only_these_to_the_next_start(tmp_path, monkeypatch):
    run.train(config(rounds=2), tmp_path / "whole", data=data())

    def interrupted(ready, rounds):
        yield "random", {}
        signal.raise_signal(signal.SIGINT)
        yield "popularity", {}
        raise AssertionError("it goes on")

    with monkeypatch.context() as patch:
        patch.setattr(run, "reference_results", interrupted)
        summary = run.train(config(rounds=2), tmp_path / "parts", data=data())
    assert summary["status"] == run.STOPPED and checkpointed(tmp_path / "parts") == 2
    assert not (tmp_path / "parts" / "summary.json").exists()
    monkeypatch.setattr(run, "_send_round", None)
    assert run.train(config(rounds=2), tmp_path / "parts", data=data())["status"] == "done"
    assert_same_results(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.usefixtures("no_references")
def test_patience_stops_after_so_many_rounds_without_improvement(tmp_path):
    stuck = config(settings=STUCK, rounds=50, patience=4)
    summary = run.train(stuck, tmp_path)
    assert (summary["status"], summary["best_round"], summary["rounds"]) == ("done", 2, 6)
    assert rounds_logged(tmp_path) == [1, 2, 3, 4, 5, 6]
    for rounds in (50, 60):  # it has had its patience, also when more rounds are allowed
        again = run.train(dataclasses.replace(stuck, rounds=rounds), tmp_path)
        assert json.dumps(again) == json.dumps(strict(summary)) and run.config_of(tmp_path).rounds == rounds


# ---- selection -----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_references")
@pytest.mark.parametrize(("protocol", "best"), [("honest", 2), ("published", 6)])
def test_of_equally_good_rounds_the_protocol_names_one(protocol, best):
    assert {"honest": HONEST, "published": PUBLISHED["fedmf"]}[protocol].keep == ("first" if best == 2 else "last")
    summary = run.train(config(settings=STUCK, protocol=protocol))
    assert summary["best_round"] == best
    assert bool(summary["leaks"]) == (protocol == "published")


def test_better_is_strict_only_for_first():
    best = run.Best(4, 0.5, Ranks(np.zeros((1, 1)), np.zeros((1, 1)), np.zeros(1, int), 0))
    last = PUBLISHED["fedmf"]
    assert run.better(HONEST, 0.1, None) and run.better(last, 0.1, None)
    assert not run.better(HONEST, 0.5, best) and run.better(last, 0.5, best)
    for protocol in (HONEST, last):
        assert run.better(protocol, 0.6, best) and not run.better(protocol, 0.4, best)


@pytest.mark.usefixtures("no_references")
def test_the_selected_round_is_the_best_on_validation(tmp_path):
    summary = run.train(config(rounds=12, eval_every=1), tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    values = [line["valid"]["NDCG@10"] for line in lines]
    assert len(set(values)) > 3
    assert summary["best_round"] == 1 + int(np.argmax(values))
    chosen = lines[summary["best_round"] - 1]
    for part in ("valid", "test"):  # and what is reported of it is what was measured then
        assert {k: summary[part][k] for k in chosen[part]} == chosen[part]


@pytest.mark.usefixtures("no_references")
def test_test_items_influence_neither_training_nor_selection(tmp_path):
    """Every user's test item is exchanged for another; only test metrics may change."""
    interactions, split, features = data()
    rng = np.random.default_rng(0)
    taken = {(u, i) for part in (split.train, split.valid, split.test) for u, i in zip(*part, strict=True)}
    free = [rng.permutation([i for i in range(ITEMS) if (u, i) not in taken]) for u in range(USERS)]
    other = splits.Pairs(split.test.user, np.array([f[0] for f in free], np.int32)[split.test.user])
    chosen = config(rounds=8, eval_every=1)
    first = run.train(chosen, tmp_path / "a")
    second = run.train(chosen, tmp_path / "b", data=(interactions, dataclasses.replace(split, test=other), features))
    assert first["best_round"] == second["best_round"]
    assert first["valid"] == second["valid"]
    assert first["test"] != second["test"]
    strip = lambda line: {k: v for k, v in untimed(json.loads(line)).items() if k != "test"}
    a, b = ([strip(x) for x in (tmp_path / n / "metrics.jsonl").read_text().splitlines()] for n in "ab")
    assert a == b


@pytest.mark.usefixtures("no_references")
def test_evaluation_happens_when_due_and_in_the_last_round(tmp_path):
    run.train(config(rounds=5, eval_every=3), tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["round"] for line in lines if "valid" in line] == [3, 5]
    assert all(("test" in line) == ("valid" in line) for line in lines)


# ---- cohorts -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("given", "size"), [(0, 40), (1.0, 40), (1, 1), (0.5, 20), (7, 7), (40, 40), (0.001, 1)])
def test_cohort_size_from_number_or_share(given, size):
    assert run.cohort_size(given, 40) == size


def test_the_share_of_all_and_one_client_are_never_the_same_run(tmp_path):
    """Though 1 == 1.0: everybody is recorded as 0, and a workdir's 1.0 is an earlier version's one client."""
    everybody, one = RunConfig(clients_per_round=1.0), RunConfig(clients_per_round=1)
    assert everybody == RunConfig(clients_per_round=np.float64(1)) == RunConfig() != one
    assert dataclasses.replace(everybody, rounds=7).clients_per_round == 0
    for held, expected in ((1.0, one), (1, one), (0.0, everybody), (0.5, RunConfig(clients_per_round=0.5))):
        (tmp_path / "config.json").write_text(json.dumps({**RunConfig().recorded(), "clients_per_round": held}))
        assert run.config_of(tmp_path) == expected
        run.claim(tmp_path, expected.recorded())


def test_what_a_split_is_judged_by():
    recalls = "Recall@20+Recall@50+Recall@100"
    judged = lambda **given: (lambda c: (c.ks, c.select_metric))(RunConfig(**given))
    assert judged() == ((10, 50), "NDCG@10")
    assert judged(split="cold_items") == ((20, 50, 100), recalls)
    assert judged(split="cold_items", ks=(5,)) == ((5,), "Recall@5")
    assert judged(select_metric="NDCG@20") == ((10, 20, 50), "NDCG@20")


def test_impossible_cohorts_are_refused():
    with pytest.raises(UsageError, match="41: the data set has 40 users"):
        run.cohort_size(41, 40)
    with pytest.raises(ValueError, match=r"clients_per_round=2\.5"):
        RunConfig(clients_per_round=2.5)
    with pytest.raises(ValueError, match="clients_per_round=-1"):
        RunConfig(clients_per_round=-1)


@pytest.mark.usefixtures("no_references")
@pytest.mark.parametrize(("given", "size"), [(0.3, 9), (11, 11), (1, 1), (0, USERS)])
def test_so_many_clients_take_part(tmp_path, given, size):
    run.train(config(clients_per_round=given, rounds=2), tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["clients"] for line in lines] == [size, size]


def test_a_small_cohort_is_told_what_its_steps_weigh(monkeypatch):
    assert "cohort" not in experiment.introduction(run.prepare(config(), data()))
    ready = run.prepare(config(clients_per_round=1, settings={"item_lr_scale": 0.5}), data())
    assert f"cohort         1 of {USERS} clients a round\n" in experiment.introduction(ready)
    monkeypatch.setattr(experiment, "LARGEST_WEIGHT", 10)
    said = experiment.introduction(ready)
    assert f"count {USERS} times; if the loss grows: --set item_lr_scale={0.5 * 10 / USERS:.3g}" in said
    own = dataclasses.replace(ready, method=ready.method._replace(config=None))  # a method that was built by hand
    assert f"cohort         1 of {USERS} clients a round\n" in experiment.introduction(own)


def test_guidance_that_would_come_after_the_last_round_is_told():
    said = lambda **settings: experiment.introduction(
        run.prepare(config(method="fedrkg", rounds=5, settings=settings), data())
    )
    assert "guidance       none in 5 rounds: clients learn alone" in said(interval=6)
    assert "none in 5 rounds" not in said(interval=5)
    assert "none in 5 rounds" not in said(interval=6, guidance="local_only")


def test_a_published_protocol_is_not_changed_in_passing():
    with pytest.raises(UsageError, match=r"draw=stratified: protocol=published of fedmf is draw=independent"):
        run.prepare(config(protocol="published", settings={"draw": "stratified"}), data())


def test_cohorts_are_distinct_users_drawn_anew_each_round_from_the_seed():
    ready = run.prepare(config(clients_per_round=9))
    drawn = [ready.cohort_users(round_) for round_ in range(20)]
    assert all(len(set(users)) == 9 and set(users) <= set(range(USERS)) for users in drawn)
    assert len({tuple(users) for users in drawn}) == 20
    assert set(np.concatenate(drawn)) == set(range(USERS))
    np.testing.assert_array_equal(ready.cohort_users(3), drawn[3])
    other = run.prepare(config(clients_per_round=9, seed=1))
    assert (other.cohort_users(0) != drawn[0]).any()


# ---- what a run says -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    run.train(config(rounds=4), folder, data=data())
    return folder


def summary_of(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text())


def test_the_workdir_holds_the_promised_files(finished):
    assert {p.name for p in finished.iterdir()} >= {
        *("config.json", "metrics.jsonl", "summary.json", "per_client.npz", "checkpoints")
    }


def test_the_summary_has_all_promised_keys(finished):
    summary = summary_of(finished)
    promised = (
        "method backbone dataset counts protocol split seed rounds best_round valid test test_seen test_unseen "
        "reference_rankers seconds bytes peak_memory_bytes versions device"
    )
    assert set(promised.split()) <= summary.keys()
    assert {"compile", "train_round_median", "eval_median", "total"} <= summary["seconds"].keys()
    assert {"up", "down"} <= summary["bytes"].keys()
    names = ["random", "popularity", "unseen_first", "least_sampled", "content_profile", "content_centred"]
    assert sorted(summary["reference_rankers"]) == sorted(names)
    for said in (summary, *summary["reference_rankers"].values()):
        for part in ("valid", "test", "test_seen", "test_unseen"):
            expected = {f"{name}@{k}" for name in ("HR", "Recall", "Precision", "NDCG") for k in BASE.ks}
            assert {*expected, "MRR", "clients"} <= said[part].keys()


def test_fractions_lie_between_zero_and_one(finished):
    summary = summary_of(finished)
    for said in (summary, *summary["reference_rankers"].values()):
        for part in ("valid", "test", "test_seen", "test_unseen"):
            for name, value in said[part].items():
                if name.startswith(("HR", "Recall", "Precision", "NDCG", "MRR", "Coverage")):
                    assert 0 <= value <= 1, (part, name)


def test_per_client_results_average_to_the_summary(finished):
    summary, table = summary_of(finished), np.load(finished / "per_client.npz")
    for name in metrics.per_client(np.ones((1, 1)), BASE.ks):
        # float32 values, summed in another order
        np.testing.assert_allclose(np.nanmean(table[name]), summary["test"][name], rtol=1e-6, err_msg=name)
    again = metrics.summarise(table["valid_rank"], BASE.ks)
    assert again == summary["valid"]


def test_per_client_rows_are_the_users_of_the_data(finished):
    interactions, split, _ = data()
    table = np.load(finished / "per_client.npz")
    np.testing.assert_array_equal(table["user_id"], interactions.user_ids.astype(str))
    popularity = np.bincount(split.train.item, minlength=ITEMS)
    for user in range(USERS):
        mine = split.train.item[split.train.user == user]
        target = split.test.item[split.test.user == user]
        assert table["train_items"][user] == len(mine)
        np.testing.assert_allclose(table["mean_popularity"][user], popularity[mine].mean(), rtol=1e-12)
        np.testing.assert_array_equal(table["test_item"][user], interactions.item_ids[target].astype(str))
        np.testing.assert_array_equal(table["test_seen"][user], popularity[target] > 0)


def test_targets_unseen_in_training_are_reported_apart(finished):
    summary, (_, split, _) = summary_of(finished), data()
    unseen = int((np.bincount(split.train.item, minlength=ITEMS)[split.test.item] == 0).sum())
    assert 0 < unseen < USERS
    assert summary["test_unseen"]["clients"] == unseen
    assert summary["test_seen"]["clients"] == USERS - unseen
    for name in ("HR@10", "NDCG@5", "MRR"):
        whole = summary["test"][name] * USERS
        parts = summary["test_seen"][name] * (USERS - unseen) + summary["test_unseen"][name] * unseen
        np.testing.assert_allclose(parts, whole, rtol=1e-6)  # float32 means
    # the ranker that puts items without training interactions first finds those, and only those, on top
    first = summary["reference_rankers"]["unseen_first"]
    assert first["test_unseen"]["MRR"] > first["test_seen"]["MRR"]


def test_counts_describe_the_data(finished):
    counts, interactions = summary_of(finished)["counts"], data()[0]
    assert (counts["users"], counts["items"], counts["pairs"]) == (USERS, ITEMS, len(interactions))
    assert counts["train"] + counts["valid"] + counts["test"] == len(interactions)
    assert 0 <= counts["padding_fraction"] < 1


# ---- evaluating a checkpoint ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def selected_before(tmp_path_factory) -> Path:
    """A run of four rounds that selected its second: nothing moves, so the first of equals is taken."""
    folder = tmp_path_factory.mktemp("selected")
    run.train(config(rounds=4, settings=STUCK), folder, data=data())
    return folder


def test_evaluating_again_speaks_of_the_selected_round(selected_before):
    """Also with other cut-offs, and with the ranks that training kept, which need no model."""
    summary = summary_of(selected_before)
    said = run.evaluate(selected_before)
    assert (said["selected_round"], said["judged_round"], said["round"]) == (summary["best_round"],) * 3 == (2, 2, 2)
    for part in ("valid", "test", "test_seen", "test_unseen", "reference_rankers"):
        assert strict(said[part]) == summary[part]
    assert json.loads((selected_before / "evaluation.json").read_text()) == strict(said)
    more = run.evaluate(selected_before, ks=(1, 10), ndcg="released")
    assert more["judged_round"] == 2 and more["test"]["NDCG@10"] == said["test"]["NDCG@10"]
    assert {"HR@1", "NDCG_released@10"} <= more["test"].keys()
    assert "selected on validation" not in report.table(more)


def test_evaluating_by_other_ranks_judges_the_last_round_and_says_so(selected_before):
    last = json.loads((selected_before / "metrics.jsonl").read_text().splitlines()[-1])
    for change in ({"ranking": "sampled_99"}, {"eval_clients": 5}, {"eval_clients": USERS}):
        said = run.evaluate(selected_before, **change)
        assert (said["selected_round"], said["judged_round"], said["round"]) == (2, 4, 4)
        assert "Judged is round 4, the last one kept; selected on validation was round 2." in report.table(said)
    for part in ("valid", "test"):  # of everybody
        assert {name: said[part][name] for name in last[part]} == last[part]


@pytest.mark.usefixtures("no_references")
def test_evaluating_on_other_data_is_refused(tmp_path, monkeypatch):
    run.train(config(rounds=1), tmp_path, data=data())
    renamed = dataclasses.replace(data()[0], user_ids=data()[0].user_ids[::-1])
    whole = run.prepare
    other = lambda config, given=None: dataclasses.replace(whole(config), interactions=renamed)
    monkeypatch.setattr(run, "prepare", other)
    with pytest.raises(UsageError, match="users, items or pairs of 'synthetic' are not those the run was trained on"):
        run.evaluate(tmp_path)


@pytest.mark.usefixtures("no_references")
def test_evaluating_otherwise_changes_only_what_was_asked(finished):
    plain = run.evaluate(finished)
    more = run.evaluate(finished, ks=(1, 10))
    assert more["test"]["HR@10"] == plain["test"]["HR@10"] and "HR@1" in more["test"]
    sampled = run.evaluate(finished, ranking="sampled_99")
    assert sampled["ranking"] == "sampled_99"
    assert run.evaluate(finished, eval_clients=5)["test"]["clients"] == 5


@pytest.mark.parametrize("ks", [(), (0,)], ids=str)
def test_impossible_cut_offs_are_refused_before_anything_is_judged(finished, ks):
    with pytest.raises(ValueError, match="ks="):
        run.evaluate(finished, ks=ks)


def test_evaluating_nothing_says_so(tmp_path):
    with pytest.raises(UsageError, match=r"config\.json does not exist"):
        run.evaluate(tmp_path)


@pytest.mark.usefixtures("no_references")
def test_evaluating_a_run_without_a_checkpoint_says_so(tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        crash_at(patch, 1)
        run.train(config(), tmp_path)
    with pytest.raises(UsageError, match="no checkpoint"):
        run.evaluate(tmp_path)


# ---- memory --------------------------------------------------------------------------------------------------


def remedy(monkeypatch, engine, have: int) -> str:
    monkeypatch.setattr(experiment, "available_bytes", lambda devices: have)
    with pytest.raises(UsageError) as error:
        run.check_memory(engine)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_run_that_fits_passes(monkeypatch):
    engine = run.prepare(config()).engine
    need = engine.memory_bytes()
    for have in (need["total"], None):
        monkeypatch.setattr(experiment, "available_bytes", lambda devices, have=have: have)
        assert run.check_memory(engine) == need


def test_dense_graphs_count_in_memory():
    """The matrix of users and items that BM3 propagates over, in several copies."""
    need = {}
    for name in ("vbpr", "bm3", "pgl"):
        chosen = dataclasses.replace(BASE, method=name, settings={"dim": 4})
        need[name] = run.prepare(chosen, data()).engine.memory_bytes()["server"]
    assert min(need["bm3"], need["pgl"]) - need["vbpr"] > 20 * USERS * ITEMS


def test_blocks_are_made_for_the_cohort():
    everybody, few = (run.prepare(config(clients_per_round=n)).engine for n in (0, 4))
    assert everybody.block == (USERS,) and few.block == (6,)  # 4 and their standard deviation


@pytest.mark.parametrize("cohort", [0, 4])
@pytest.mark.parametrize("share", [0.01, 0.5, 0.99])
def test_a_block_that_does_not_fit_is_answered_with_one_that_does(monkeypatch, share, cohort):
    engine = run.prepare(config(clients_per_round=cohort, max_buckets=3)).engine
    need = engine.memory_bytes()
    have = int(need["total"] - need["block"] + share * need["block"])
    said = remedy(monkeypatch, engine, have)
    if "--block_size=" not in said:  # not even one client at a time fits
        alone = make_engine(engine.method, engine.clients, block_size=1).memory_bytes()
        assert alone["total"] > have and ("dim=" in said or "more devices" in said)
        return
    block = int(said.split("--block_size=")[1].split()[0])
    assert make_engine(engine.method, engine.clients, block_size=block).memory_bytes()["total"] <= have


def test_tables_that_do_not_fit_are_answered_with_a_width_that_does(monkeypatch):
    wide = run.prepare(config(settings={"dim": 256}, block_size=1)).engine
    have = wide.memory_bytes()["total"] // 2
    said = remedy(monkeypatch, wide, have)
    dim = int(said.split("dim=")[1].split(",")[0])
    narrow = METHODS["fedmf"].build(dataclasses.replace(wide.method.config, dim=dim), USERS, ITEMS)
    assert 0 < dim < 256
    assert make_engine(narrow, wide.clients, block_size=1).memory_bytes()["total"] <= have


def test_the_networks_of_a_block_are_counted():
    blocks = []
    for layers in ((8,), (512, 256)):
        settings = {"dim": 4, "branches": "mlp", "layers": layers}
        blocks.append(
            run.prepare(config(method="fedncf", settings=settings, block_size=8)).engine.memory_bytes()["block"]
        )
    assert blocks[1] - blocks[0] > 4 * 8 * 512 * 256 * 4


def test_what_clients_are_shown_but_do_not_hold_is_not_counted_for_each():
    """EASE's weights are items x items, once; its clients hold their histories."""
    engine = run.prepare(dataclasses.replace(BASE, method="ease", settings={})).engine
    need = engine.memory_bytes()
    assert need["server"] == 3 * 4 * ITEMS**2 and need["uploads"] == 4 * ITEMS**2
    assert 4 * ITEMS <= need["block"] / max(engine.block) < 4 * ITEMS**2


def test_the_samples_that_a_server_collects_are_counted():
    engine = run.prepare(dataclasses.replace(BASE, method="mf", settings={"negatives": 2})).engine
    longest = engine.buckets[-1].history.shape[1]
    assert engine.memory_bytes()["uploads"] == 4 * engine.clients.num_slots * (3 * longest + 1)


# ---- configuration -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"method": "pfedrc"}, r"did you mean pfedrec\?"),
        ({"split": "leave_one"}, r"did you mean leave_one_out\?"),
        ({"protocol": "honset"}, r"did you mean honest\?"),
        ({"select_metric": "MAP@10"}, "select_metric='MAP@10': expected one of"),
        ({"select_metric": "NDCG@7", "ks": (10,)}, "select_metric='NDCG@7': expected one of"),
        ({"rounds": 0}, "rounds=0"),
        ({"eval_every": 0}, "eval_every=0"),
        ({"seed": -1}, "seed=-1"),
        ({"ks": (0,)}, "ks=0"),
        ({"patience": -1}, "patience=-1"),
        ({"ks": ()}, r"ks=\(\): expected one cut-off or more"),
        ({"clients_per_round": float("inf")}, "clients_per_round=inf: expected a finite number"),
        ({"dp_noise": float("nan")}, "dp_noise=nan"),
    ],
    ids=str,
)
def test_impossible_configurations_are_refused_by_name(change, said):
    with pytest.raises(ValueError, match=said):
        RunConfig(**change)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("rounds", "50", "rounds='50': expected a whole number"),
        ("rounds", 2.5, r"rounds=2\.5: expected a whole number"),
        ("seed", None, "seed=None: expected a whole number"),
        ("ks", 10, "ks=10: expected one cut-off or more"),
        ("ks", (5, 2.5), r"ks=2\.5: expected whole numbers"),
        ("clients_per_round", "7", "clients_per_round='7': expected a finite number"),
    ],
)
def test_values_of_another_type_are_refused_by_name(name, value, said):
    wrong = RunConfig()
    object.__setattr__(wrong, name, value)  # the type checker of the tests refuses them earlier
    with pytest.raises(ValueError, match=said):
        wrong.__post_init__()


def test_devices_that_are_not_there_are_refused():
    with pytest.raises(UsageError, match=r"devices=99: only 4 are there.*--cpu_devices=99"):
        prepare(config(devices=99), data())


def test_features_of_a_file_join_the_items_and_stand_in_for_the_data_sets_own(tmp_path):
    """A file in another order, with an item too many and one too few, beside and in place of what the data set has."""
    interactions, _, own = run.load_data(RunConfig())
    ids = interactions.item_ids[1:][::-1]
    values = np.arange(2.0 * (len(ids) + 1)).reshape(-1, 2)
    path = tmp_path / "made.npz"
    np.savez(path, values=values, raw_ids=np.append(ids, ids.max() + 1))
    given = run.load_data(RunConfig(features={"tags": str(path), "image": str(path)}))[2]
    assert set(given) == {*own, "tags"} and given["image"].values.shape[1] == 2
    np.testing.assert_array_equal(given["text"].values, own["text"].values)
    np.testing.assert_array_equal(given["tags"].values[1:], values[:-1][::-1])
    assert given["tags"].num_missing == 1
    np.testing.assert_allclose(given["tags"].values[0], values[:-1].mean(0))
    said = RunConfig(features={"tags": str(path)}).recorded()
    assert said["features"] == {"tags": str(path)} and "features" not in RunConfig().recorded()
