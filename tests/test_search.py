"""The grid search: validation only, a budget, resumable, and a flagfile of the best at its end."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from fedjax_rec import run, search
from fedjax_rec.data import splits, synthetic
from fedjax_rec.run import RunConfig
from fedjax_rec.workdir import UsageError

CONFIG = RunConfig(
    settings={"dim": 4, "batch_size": 16}, rounds=4, eval_every=2, ks=(5, 10), max_buckets=1, devices=1,
    filters={"min_user": 3}, dataset="tiny.csv",
)  # fmt: skip
GRID = {"lr": "0.001,1,4", "negatives": "1,2"}


@pytest.fixture(scope="module")
def data():
    made = synthetic.make(30, 70, min_history=5, median_history=8, max_history=20)
    return made.interactions, splits.leave_one_out(made.interactions), made.features


@pytest.fixture
def fake(monkeypatch):
    """Trials that cost nothing: the score is a function of the settings. Returns the settings asked for."""
    asked = []

    def train(config, **options):
        assert options["references"] is False
        asked.append(dict(config.settings))
        if config.settings["lr"] > 3:
            raise FloatingPointError("the loss is nan after round 1")
        score = config.settings["lr"] / config.settings["negatives"]
        return {"status": "done", "best_round": 2, "valid": {"NDCG@10": score}, "test": {"NDCG@10": 0.987}}

    monkeypatch.setattr(run, "train", train)
    return asked


def trials(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "trials.jsonl").read_text().splitlines()]


def test_the_whole_grid_is_run_and_the_best_on_validation_is_written(fake, data, tmp_path):
    lines, status = search.search(CONFIG, GRID, tmp_path, data=data)
    assert status == "done" and lines == trials(tmp_path)
    assert sorted((s["lr"], s["negatives"]) for s in fake) == [(r, n) for r in (0.001, 1.0, 4.0) for n in (1, 2)]
    assert all(s["dim"] == 4 for s in fake)
    best = search.best_of(lines)
    assert best["settings"] == {"lr": 1.0, "negatives": 1} and best["score"] == 1.0
    assert [line["score"] for line in lines if line["settings"]["lr"] == 4] == [search.FAILED] * 2
    table = search.table(CONFIG, lines).splitlines()
    assert table[2].endswith("lr=1.0 negatives=1")
    assert table[-1].startswith("failed  lr=4.0") and table[-1].endswith(": the loss is nan after round 1")
    assert search.table(CONFIG, lines, most=1).endswith("1 more failed")


def test_no_test_metric_is_shown_or_recorded(data, tmp_path, capsys):
    """A real run, so that all that a run would say is there to leak."""
    lines, _ = search.search(CONFIG, {"lr": "1"}, tmp_path, data=data)
    shown = capsys.readouterr().out + search.table(CONFIG, lines)
    config = dataclasses.replace(CONFIG, settings={**CONFIG.settings, "lr": 1.0})
    summary = run.train(config, data=data, references=False)
    assert lines[0]["score"] == summary["valid"]["NDCG@10"] != summary["test"]["NDCG@10"]
    written = shown + "".join(path.read_text() for path in tmp_path.iterdir())
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "trials.jsonl", "best.flags"}
    assert '"test"' not in written and f"{summary['test']['NDCG@10']:.4f}" not in written
    assert set(lines[0]) == {"trial", "settings", "score", "best_round", "seconds"}


def test_a_budget_draws_a_part_of_the_grid_and_a_larger_one_goes_on(fake, data, tmp_path):
    search.search(CONFIG, GRID, tmp_path, trials=2, data=data)
    first = trials(tmp_path)
    assert len(first) == len(fake) == 2
    search.search(CONFIG, GRID, tmp_path, trials=5, data=data)
    assert trials(tmp_path)[:2] == first and len(fake) == 5
    assert len({line["trial"] for line in trials(tmp_path)}) == 5
    seeds = [dataclasses.replace(CONFIG, seed=seed) for seed in range(6)]
    for config in seeds:
        search.search(config, GRID, tmp_path / str(config.seed), trials=2, data=data)
    assert len({tuple(line["trial"] for line in trials(tmp_path / str(c.seed))) for c in seeds}) > 1


def test_other_features_are_another_search(data, fake, tmp_path):
    config = dataclasses.replace(CONFIG, method="mlp_fusion")
    search.search(config, {"lr": "0.001,1", "negatives": "1"}, tmp_path, trials=1, data=data)
    other = {name: dataclasses.replace(one, values=one.values + 1) for name, one in data[2].items()}
    with pytest.raises(UsageError, match="content_hash"):
        search.search(config, {"lr": "0.001,1", "negatives": "1"}, tmp_path, trials=2, data=(*data[:2], other))
    assert len(fake) == 1


def test_a_killed_search_goes_on(fake, data, tmp_path):
    search.search(CONFIG, GRID, tmp_path, trials=3, data=data)
    held = (tmp_path / "trials.jsonl").read_text()
    kept = held.splitlines(keepends=True)[:2]
    (tmp_path / "trials.jsonl").write_text("".join(kept) + '{"trial": 5, "sett')  # killed while writing
    fake.clear()
    lines, _ = search.search(CONFIG, GRID, tmp_path, trials=3, data=data)
    assert len(fake) == 1 and lines == trials(tmp_path)
    same = lambda text: [{k: v for k, v in json.loads(x).items() if k != "seconds"} for x in text.splitlines()]
    assert same((tmp_path / "trials.jsonl").read_text()) == same(held)


def test_a_trial_that_is_refused_is_recorded_and_the_search_goes_on(fake, data, tmp_path, monkeypatch, capsys):
    """By the data, by the memory: neither is known before the trial begins."""
    train = run.train
    refused = [
        UsageError("the run needs about 9 GiB"),
        jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 9 GiB\nat"),
        MemoryError(),
    ]

    def some(config, **options):
        if config.settings["lr"] < 1:
            raise refused.pop(0)
        return train(config, **options)

    monkeypatch.setattr(run, "train", some)
    grid = {"lr": "0.1,0.2,0.3,1", "negatives": "1"}
    lines, status = search.search(CONFIG, grid, tmp_path, data=data)
    assert status == "done" and lines == trials(tmp_path) and len(lines) == 4
    said = sorted(line["error"] for line in lines if "error" in line)
    assert said == ["MemoryError", "RESOURCE_EXHAUSTED: 9 GiB", "the run needs about 9 GiB"]
    assert search.search(CONFIG, grid, tmp_path, data=data) == (lines, "done")  # none is tried again
    table = search.table(CONFIG, lines)
    assert all(f": {error}" in table for error in said) and "--set=lr=1.0" in (tmp_path / "best.flags").read_text()
    assert search.best_of([{"score": 0.0, "error": "late"}, {"score": 0.0}]) == {"score": 0.0}


def test_a_stopped_trial_is_not_recorded(data, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "train", lambda config, **options: {"status": run.STOPPED, "best_round": None})
    lines, status = search.search(CONFIG, GRID, tmp_path, data=data)
    assert (lines, status) == ([], run.STOPPED) and trials(tmp_path) == []


def test_bad_input_is_said_before_anything_runs(fake, data, tmp_path):
    cases = {
        "expected at least one setting": {},
        "did you mean negatives?": {"negative": "1"},
        "--set lr=fast: expected a number": {"lr": "1,fast"},
        "--grid lr=,: expected values": {"lr": ","},
    }
    for said, grid in cases.items():
        with pytest.raises(ValueError, match=said.replace("?", r"\?")):
            search.search(CONFIG, grid, tmp_path, data=data)
    with pytest.raises(ValueError, match="--trials=-1"):
        search.search(CONFIG, GRID, tmp_path, trials=-1, data=data)
    assert not fake
    search.search(CONFIG, GRID, tmp_path, trials=1, data=data)
    with pytest.raises(UsageError, match=r"grid\.lr: '0\.001,1,4' there, '1' given"):
        search.search(CONFIG, {**GRID, "lr": "1"}, tmp_path, data=data)
    with pytest.raises(UsageError, match=r"every trial failed.*loss is nan"):
        search.search(CONFIG, {"lr": "5", "negatives": "1"}, tmp_path / "bad", data=data)
    assert not (tmp_path / "bad" / "best.flags").exists()


def test_values_that_hold_commas_stand_between_semicolons():
    points = search.grid_points("fedncf", {"layers": "16,8;32,16", "dim": "4"})
    assert points == [{"layers": (16, 8), "dim": 4}, {"layers": (32, 16), "dim": 4}]


@pytest.mark.parametrize(
    ("method", "base", "grid"),
    [
        ("mdifffr", {"preset": "proper"}, {"guidance_scale": "1,1.5"}),
        ("ipfedrec", {"eta": 20.0}, {"reg": "5,10"}),
    ],
)
def test_points_are_judged_beside_the_settings_that_all_trials_have(method, base, grid):
    with pytest.raises(ValueError):
        search.grid_points(method, grid)
    points = search.grid_points(method, grid, base)
    assert points == [{name: float(value)} for name, text in grid.items() for value in text.split(",")]


COLD = {"split": "cold_items", "method": "mdifffr", "settings": {"dim": 8}}


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "fedncf", "clients_per_round": 0.5, "select_metric": "HR@5", "settings": {"layers": (16, 8)}},
        {**COLD, "ks": (20, 50, 100), "select_metric": "Recall@20+Recall@50+Recall@100"},
        {**COLD, "ks": (10, 50), "select_metric": "NDCG@10"},
    ],
)
def test_the_flagfile_is_the_configuration(changes, tmp_path):
    program = "import launch, sys; launch.FLAGS(['launch.py', sys.argv[1]]); print(repr(launch.config_from_flags()))"
    config = dataclasses.replace(CONFIG, features={"tags": "here/tags.npz", "image": "image.npz"}, **changes)
    best = {"settings": {"dim": 6}, "score": 0.5, "best_round": 3}
    path = tmp_path / "best.flags"
    path.write_text(search.flagfile(config, best, "HR@5", 9))
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(
        [sys.executable, "-c", program, f"--flagfile={path}"], cwd=root, capture_output=True, text=True
    )
    expected = dataclasses.replace(config, settings={**config.settings, "dim": 6})
    assert done.returncode == 0, done.stderr
    found = eval(done.stdout, {"RunConfig": RunConfig})
    assert found == expected
