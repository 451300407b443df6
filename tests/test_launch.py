"""The command line: what people type, and what they are told when it is wrong."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from fedjax_rec.data import synthetic

ROOT = Path(__file__).resolve().parents[1]
TINY = ("--set=dim=4", "--set=batch_size=16", "--max_buckets=1", "--cpu_devices=1", "--noprogress", "--noplots")


@pytest.fixture(scope="module")
def launch():
    """launch.py as a module; its flags are defined once."""
    spec = importlib.util.spec_from_file_location("launch", ROOT / "launch.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def typed(launch, monkeypatch, capsys):
    """typed(*arguments): (exit code, standard output, standard error) without a process of its own."""
    monkeypatch.setattr(launch, "use_cores", lambda: None)  # the devices of this process are chosen already

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["launch.py", *map(str, arguments)])
        code = launch.command_line()
        return code, *capsys.readouterr()

    yield call
    for name in launch.FLAGS:
        launch.FLAGS[name].unparse()
    launch.FLAGS.unparse_flags()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A data set as a file, tiny.csv; also the folder of compiled programs."""
    path = tmp_path_factory.mktemp("launch")
    rows = synthetic.make(30, 60, min_history=5, median_history=8, max_history=20).interactions
    with (path / "tiny.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["user", "item", "timestamp"])
        writer.writerows(zip(rows.user, rows.item, rows.time, strict=True))
    return path


def start(folder: Path, *arguments) -> subprocess.Popen:
    return subprocess.Popen(
        [
            *(sys.executable, str(ROOT / "launch.py"), f"--dataset={folder / 'tiny.csv'}", f"--data_dir={folder}"),
            *(*TINY, f"--compile_cache={folder / 'cache'}", *arguments),
        ],
        env={**os.environ, "JAX_PLATFORMS": "cpu", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


# ---- bad usage -----------------------------------------------------------------------------------------------

BAD = {
    "unknown flag": (["--metod=fedmf"], "method"),
    "no flag": (["fedmf"], "expected flags only"),
    "unknown method": (["--method=pfedreq"], "did you mean pfedrec?"),
    "unknown data set": (["--dataset=filmtrsut"], "did you mean 'filmtrust'?"),
    "unknown setting": (["--set=item_lr=1"], "did you mean item_lr_scale?"),
    "unknown split": (["--split=leaveoneout"], "did you mean leave_one_out?"),
    "unknown protocol": (["--protocol=honst"], "did you mean honest?"),
    "unknown ranking": (["--ranking=ful"], "did you mean full?"),
    "unknown mode": (["--mode=test"], "mode"),
    "unknown filter": (["--filter=min_users=3"], "did you mean min_user?"),
    "unknown metric": (["--select_metric=MAP@10"], "MAP@10"),
    "metric without its cut-off": (["--k=10", "--select_metric=NDCG@7"], "NDCG@7"),
    "setting of another type": (["--set=dim=wide"], "--set dim=wide: expected an integer"),
    "setting without value": (["--set=dim"], "--set=dim: expected key=value"),
    "setting out of range": (["--set=lr=-1"], "lr=-1"),
    "filter of another type": (["--filter=min_user=few"], "--filter=min_user=few: expected a whole number"),
    "number": (["--rounds=many"], "rounds"),
    "no rounds": (["--rounds=0"], "rounds=0"),
    "no cut-off": (["--k="], "ks=(): expected one cut-off or more"),
    "cohort in words": (["--clients_per_round=most"], "--clients_per_round=most: expected a whole number, or a share"),
    "endless cohort": (["--clients_per_round=inf"], "clients_per_round=inf: expected a finite number"),
    "cut-off": (["--k=ten"], "--k=ten: expected whole numbers"),
    "too many clients": (["--clients_per_round=9999", *TINY], "600 users"),
    "missing data folder": (["--dataset=ku", "--data_dir=nowhere"], "nowhere"),
    "missing file": (["--dataset=nowhere/a.csv"], "nowhere/a.csv"),
    "missing flagfile": (["--flagfile=nowhere.flags"], "nowhere.flags"),
    "evaluate nothing": (["--mode=evaluate"], "--workdir"),
    "seeds without a workdir": (["--seeds=3"], "--seeds=3: expected --workdir"),
    "negative seeds": (["--seeds=-1", "--workdir=nowhere"], "seeds=-1"),
    "search without a workdir": (["--mode=search", "--grid=lr=1,2"], "expected --workdir"),
    "search without a grid": (["--mode=search", "--workdir=nowhere"], "--grid: expected at least one setting"),
    "grid of a run": (["--grid=lr=1,2"], "--grid does nothing in --mode=train; give --mode=search"),
    "trials of a run": (["--trials=3"], "--trials does nothing in --mode=train; give --mode=search"),
    "search over seeds": (
        ["--mode=search", "--grid=lr=1,2", "--workdir=nowhere", "--seeds=3"],
        "--seeds does nothing in --mode=search; give --mode=train",
    ),
    "a setting searched twice": (
        ["--mode=search", "--grid=lr=1,2", "--grid=lr=3", "--workdir=nowhere"],
        "--grid lr=1,2 --grid lr=3: expected each setting once",
    ),
    "two backbones": (
        ["--method=fedrkg", "--backbone=fedmf", "--set=backbone=pfedrec"],
        "--backbone=fedmf and --set=backbone=pfedrec: leave one of both out",
    ),
    "timed rounds of a run": (["--benchmark_rounds=5"], "--benchmark_rounds does nothing in --mode=train"),
    "a cohort of a graph": (
        ["--method=bm3", "--clients_per_round=0.5", *TINY],
        "--clients_per_round=0.5: bm3 knows the histories of a round's clients alone",
    ),
    "grid without values": (["--mode=search", "--workdir=nowhere", "--grid=lr"], "--grid=lr: expected key=value"),
    "grid of another setting": (["--mode=search", "--workdir=nowhere", "--grid=lrr=1"], "did you mean lr?"),
    "evaluate nowhere": (["--mode=evaluate", "--workdir=nowhere"], "config.json does not exist"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_usage_is_one_line_and_code_2(typed, case):
    arguments, said = BAD[case]
    code, _, error = typed(*arguments)
    assert code == 2
    assert said in error
    assert error.count("\n") == 1 and error.startswith("launch.py: ")


def test_a_broken_file_is_named_with_its_line(typed, tmp_path):
    path = tmp_path / "broken.csv"
    path.write_text("user,item,timestamp\n1,2,3\n1,,4\n")
    code, _, error = typed(f"--dataset={path}")
    assert code == 2 and error.count("\n") == 1
    assert str(path) in error and "3" in error.split(str(path))[1]


def test_a_file_as_workdir_is_bad_usage(typed, tmp_path):
    path = tmp_path / "taken"
    path.write_text("")
    code, _, error = typed(*TINY, "--rounds=1", "--devices=1", f"--workdir={path}")
    assert code == 2 and error.count("\n") == 1 and str(path) in error


@pytest.mark.parametrize("taken", ["config.json.part", "metrics.jsonl", "checkpoints"])
def test_what_the_system_refuses_is_one_line(typed, folder, tmp_path, taken):
    """A folder where a file is expected, and a file in the place of the checkpoints."""
    path = tmp_path / "run" / taken
    path.parent.mkdir()
    path.write_text("") if taken == "checkpoints" else path.mkdir()
    code, _, error = typed(
        f"--dataset={folder / 'tiny.csv'}", *TINY, "--rounds=1", "--devices=1", f"--workdir={path.parent}"
    )
    assert code == 2 and error.count("\n") == 1
    assert error.startswith("launch.py: ") and taken in error


def test_help_is_no_error(typed):
    code, _, error = typed("--help")
    assert (code, error) == (0, "")


# ---- flags become a configuration ----------------------------------------------------------------------------


def configured(launch, *arguments):
    launch.FLAGS(["launch.py", *arguments])
    return launch.config_from_flags()


@pytest.mark.usefixtures("typed")
def test_settings_take_the_types_of_their_defaults(launch):
    given = ("dim=8", "lr=1", "layers=16,8", "optimizer=adam")
    config = configured(launch, "--method=fedncf", *(f"--set={pair}" for pair in given), "--set=dim=6")
    assert config.settings == {"dim": 6, "lr": 1.0, "layers": (16, 8), "optimizer": "adam"}
    assert [type(v) for v in config.settings.values()] == [int, float, tuple, str]


@pytest.mark.usefixtures("typed")
@pytest.mark.parametrize(("text", "value"), [("true", True), ("False", False), ("1", True), ("0", False)])
def test_truth_values(launch, text, value):
    assert configured(launch, f"--set=user_bias={text}").settings == {"user_bias": value}


@pytest.mark.usefixtures("typed")
def test_flags_reach_the_configuration(launch):
    config = configured(
        launch, "--k=1,20", "--select_metric=HR@20", "--filter=min_user=5", "--filter=min_rating=3.5", "--seed=4",
        "--clients_per_round=0.25", "--rounds=7", "--features=tags=tags.npz", "--features=image=here/image.npz",
    )  # fmt: skip
    assert config.features == {"tags": "tags.npz", "image": "here/image.npz"}
    assert (config.ks, config.select_metric, config.seed, config.rounds) == ((1, 20), "HR@20", 4, 7)
    assert config.filters == {"min_user": 5, "min_rating": 3.5}
    assert config.clients_per_round == 0.25


@pytest.mark.usefixtures("typed")
@pytest.mark.parametrize(("text", "size"), [("1", 1), ("1.0", 40), ("0", 40), ("7", 7), ("7.0", 7), ("0.25", 10)])
def test_one_client_and_the_share_of_all_are_told_apart(launch, text, size):
    from fedjax_rec.run import cohort_size

    assert cohort_size(configured(launch, f"--clients_per_round={text}").clients_per_round, 40) == size


@pytest.mark.usefixtures("typed")
@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--features=text=a.npz", "--features=text=b.npz"], "expected one file for each modality"),
        (["--features=id=a.npz"], "a modality named 'id'"),
        (["--features==a.npz"], "a modality named ''"),
        (["--features=a.npz"], "expected key=value"),
    ],
)
def test_a_feature_file_belongs_to_one_named_modality(launch, flags, said):
    with pytest.raises(ValueError, match=said):
        configured(launch, *flags)


@pytest.mark.usefixtures("typed")
def test_flags_and_configuration_have_the_same_defaults(launch):
    from fedjax_rec.run import RunConfig

    assert configured(launch) == RunConfig()


@pytest.mark.usefixtures("typed")
def test_a_flagfile_is_read_and_overridden(launch, tmp_path):
    path = tmp_path / "recipe.flags"
    path.write_text("# a comment\n--method=fcf\n--rounds=3\n--set=dim=5\n--set=lr=0.5\n")
    config = configured(launch, f"--flagfile={path}", "--rounds=9")
    assert (config.method, config.rounds, config.settings) == ("fcf", 9, {"dim": 5, "lr": 0.5})


@pytest.mark.usefixtures("typed")
@pytest.mark.parametrize("recipe", sorted((ROOT / "experiments").glob("*.flags")), ids=lambda p: p.stem)
def test_every_recipe_is_a_valid_configuration(launch, recipe):
    assert recipe.read_text().startswith("#")
    configured(launch, f"--flagfile={recipe}")


# ---- processes -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stopped(folder):
    """A run that got SIGTERM in its middle, and was started again: (first, second) as (code, output, error)."""
    command = ("--rounds=300", "--eval_every=50", "--checkpoint_every=0", "--k=5,10", f"--workdir={folder / 'run'}")
    process = start(folder, *command)
    log = folder / "run" / "metrics.jsonl"
    while process.poll() is None and not (log.exists() and log.read_text().count("\n") >= 3):
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    first = (*process.communicate(timeout=300), process.returncode)
    logged = log.read_text().count("\n")
    saved = (folder / "run" / "summary.json").exists()
    process = start(folder, *command)
    return first, logged, saved, (*process.communicate(timeout=300), process.returncode)


def test_sigterm_saves_a_checkpoint_and_exits_with_75(stopped):
    (_, error, code), logged, finished, _ = stopped
    assert code == 75, error
    assert f"after round {logged}: start again to go on" in error and "Traceback" not in error
    assert 3 <= logged < 300 and not finished


def test_starting_again_goes_on_and_finishes(stopped, folder):
    _, logged, _, (output, error, code) = stopped
    assert code == 0, error
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["round"] for line in lines] == list(range(1, 301))
    # it went on from the checkpoint: the first round of a process, which compiles, is marked
    assert [line["round"] for line in lines if line["seconds"].get("first")] == [1, logged + 1]
    assert "popularity" in output and "fedmf (round" in output
    assert json.loads((folder / "run" / "summary.json").read_text())["status"] == "done"


def test_evaluation_takes_from_the_run_what_the_command_line_does_not_give(stopped, typed, folder):
    summary = json.loads((folder / "run" / "summary.json").read_text())
    code, output, error = typed("--mode=evaluate", f"--workdir={folder / 'run'}", "--ndcg=released")
    assert code == 0, error
    assert "NDCG_released@5" in output
    said = json.loads((folder / "run" / "evaluation.json").read_text())
    assert "HR@50" not in said["test"] and "HR@5" in output
    assert said["judged_round"] == summary["best_round"] and said["test"]["HR@5"] == summary["test"]["HR@5"]


def test_evaluation_refuses_what_the_run_was_not_trained_with(stopped, typed, folder):
    """Neither a method nor a split of the command line would be judged; those of the run may be repeated."""
    evaluate = ("--mode=evaluate", f"--workdir={folder / 'run'}", "--method=fedmf")
    assert typed(*evaluate)[0] == 0
    code, output, error = typed(*evaluate, "--split=given")
    assert (code, output) == (2, "") and "--split=given does nothing in --mode=evaluate: the run in" in error
    assert "has leave_one_out; leave it out" in error


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--set=lr=1e-3"], "--set lr=0.001 does nothing in --mode=evaluate: the run in {} has 0.5; leave it out"),
        (["--set=no=1"], "--set no: fedrkg has no such setting"),
        (["--backbone=pfedrec"], "--set backbone=pfedrec does nothing in --mode=evaluate: the run in {} has fedncf"),
        (["--filter=min_user=3"], "--filter min_user=3 does nothing in --mode=evaluate: the run in {} has 10; leave"),
        (["--filter=min_rating=2"], "--filter min_rating=2.0 does nothing in --mode=evaluate: the run in {} has 4.0"),
        (["--set=lr=0.50", "--set=layers=16,8", "--backbone=fedncf", "--filter=min_user=10"], "set --data_dir to"),
    ],
    ids=str,
)
def test_evaluation_refuses_settings_and_filters_that_the_run_does_not_have(typed, tmp_path, given, said):
    """Those that it has may be given, in any spelling, also a filter that is the data set's own."""
    from fedjax_rec.run import RunConfig

    settings = {"backbone": "fedncf", "lr": 0.5, "layers": (16, 8)}
    config = RunConfig(method="fedrkg", settings=settings, dataset="filmtrust", filters={"min_rating": 4.0})
    (tmp_path / "config.json").write_text(json.dumps(config.recorded()))
    code, output, error = typed("--mode=evaluate", f"--workdir={tmp_path}", *given)
    assert (code, output) == (2, "") and error.count("\n") == 1
    assert said.format(tmp_path) in error


QUICK = ("--rounds=4", "--eval_every=2", "--k=5,10", "--devices=1")


def test_a_workdir_that_cannot_be_written_still_shows_its_evaluation(typed, folder, tmp_path):
    command = (f"--dataset={folder / 'tiny.csv'}", *TINY, *QUICK, f"--workdir={tmp_path}")
    assert typed(*command)[0] == 0
    (tmp_path / "evaluation.json.part").mkdir()
    code, output, error = typed("--mode=evaluate")
    assert code == 2 and error.count("\n") == 1 and "evaluation.json.part: Is a directory" in error
    assert "popularity" in output


def test_a_file_that_has_moved_is_evaluated_and_trained_on_where_it_is(launch, typed, folder, tmp_path):
    place, moved, home = tmp_path / "a.csv", tmp_path / "b.csv", f"--workdir={tmp_path / 'run'}"
    shutil.copy(folder / "tiny.csv", place)
    command = [f"--dataset={place}", *TINY, *QUICK, home]
    assert typed(*command)[0] == 0
    place.rename(moved)
    code, _, error = typed("--mode=evaluate", home, f"--dataset={moved}")
    assert code == 0, error
    launch.FLAGS["mode"].unparse()
    code, _, error = typed(f"--dataset={moved}", *TINY, *QUICK, home, "--rounds=6")
    assert code == 0 and json.loads((tmp_path / "run" / "summary.json").read_text())["rounds"] == 6, error
    moved.write_text(moved.read_text() + "999,1,5\n999,2,6\n999,3,7\n")
    code, _, error = typed("--mode=evaluate", home, f"--dataset={moved}")
    assert code == 2 and "are not those the run was trained on" in error


def test_a_signal_before_the_first_round_is_one_line(launch, typed, folder, tmp_path, monkeypatch):
    def interrupted(*given):
        raise KeyboardInterrupt

    monkeypatch.setattr(launch, "train", interrupted)
    code, _, error = typed(f"--workdir={tmp_path}")
    assert (code, error) == (75, "stopped: start again to go on\n")
    launch.FLAGS["workdir"].unparse()
    code, _, error = typed()
    assert code == 1 and "stopped: nothing was saved; give --workdir to go on" in error


def test_data_and_features_that_have_moved_are_evaluated_where_they_are(launch, typed, tmp_path):
    home, away = tmp_path / "data", tmp_path / "moved"
    (home / "filmtrust").mkdir(parents=True)
    rows = synthetic.make(30, 60, min_history=5, median_history=8, max_history=20).interactions
    lines = [f"{u} {i} 4\n" for u, i in zip(rows.user, rows.item, strict=True)]
    (home / "filmtrust" / "ratings.txt").write_text("".join(lines))
    np.savez(home / "tags.npz", values=np.eye(60), raw_ids=np.arange(60))
    command = (
        "--dataset=filmtrust",
        "--filter=min_user=0",
        f"--data_dir={home}",
        f"--features=tags={home / 'tags.npz'}",
    )
    code, _, error = typed(*command, *TINY, *QUICK, f"--workdir={tmp_path / 'run'}")
    assert code == 0, error
    home.rename(away)
    for name in ("data_dir", "features"):
        launch.FLAGS[name].unparse()
    evaluate = ("--mode=evaluate", f"--workdir={tmp_path / 'run'}")
    code, _, error = typed(*evaluate)
    assert code == 2 and "set --data_dir" in error
    code, _, error = typed(*evaluate, f"--data_dir={away}", f"--features=tags={away / 'tags.npz'}")
    assert code == 0, error
    np.savez(away / "tags.npz", values=2 * np.eye(60), raw_ids=np.arange(60))
    code, _, error = typed()
    assert code == 2 and "features named tags are not those the run was trained on" in error


def test_a_stopped_run_without_a_workdir_does_not_promise_to_go_on(typed, folder, monkeypatch):
    from fedjax_rec import run

    class Stop:
        received = True
        __enter__ = __exit__ = lambda self, *exc: self

    monkeypatch.setattr(run, "StopSignal", Stop)
    code, _, error = typed(f"--dataset={folder / 'tiny.csv'}", *TINY, *QUICK)
    assert code == 1
    assert error == "launch.py: stopped early by a signal after round 1: nothing was saved; give --workdir to go on\n"


def test_seeds_are_run_once_and_summed_up(typed, folder, tmp_path):
    command = (f"--dataset={folder / 'tiny.csv'}", *TINY, *QUICK, f"--workdir={tmp_path}", "--seed=7")
    code, output, error = typed(*command, "--seeds=2")
    assert code == 0, error
    assert output.count("fedmf (round") == 2 and "over 2 seeds (7, 8)" in output and " ± " in output
    assert json.loads((tmp_path / "seeds.json").read_text())["seeds"] == [7, 8]
    code, output, error = typed("--seeds=3")
    assert code == 0 and output.count("fedmf (round") == 1 and "over 3 seeds (7, 8, 9)" in output


def test_search_prints_the_best_and_its_flagfile_runs(launch, typed, folder, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    base = (f"--dataset={folder / 'tiny.csv'}", *TINY, *QUICK)
    code, output, error = typed(*base, "--mode=search", "--grid=lr=0.001,2", f"--workdir={tmp_path}")
    assert code == 0, error
    assert "best of 2 trials first" in output and "HR@" not in output
    best = tmp_path / "best.flags"
    launch.FLAGS["grid"].unparse()  # as in a process of its own
    code, output, error = typed(f"--flagfile={best}", "--mode=train", "--workdir=", "--noprogress", "--noplots")
    assert code == 0, error
    assert "fedmf (round" in output
    assert not list((tmp_path / "here").iterdir())  # an empty --workdir is none, not the current folder


def test_benchmark_mode_writes_what_it_promises(folder):
    process = start(folder, "--mode=benchmark", "--benchmark_rounds=3", f"--workdir={folder / 'speed'}")
    output, error = process.communicate(timeout=300)
    assert process.returncode == 0, error
    assert "clients/s" in output
    result = json.loads((folder / "speed" / "benchmark.json").read_text())
    promised = (
        "method dataset clients samples_per_round compile_s first_round_s round_s clients_per_s interactions_per_s "
        "samples_per_s bytes_per_round memory_bandwidth_bytes_per_s roofline_share numpy_loop_round_s "
        "peak_memory_bytes versions device"
    )
    assert set(promised.split()) <= result.keys()
    assert result["round_s"].keys() >= {"median", "min", "max", "n"}
    assert (result["clients"], result["round_s"]["n"]) == (30, 3)
    # 30 users' training items, each with the default four negatives
    rows = (folder / "tiny.csv").read_text().count("\n") - 1
    assert result["samples_per_round"] == 5 * (rows - 2 * 30)
    assert np.isclose(result["samples_per_s"], 5 * result["interactions_per_s"])
    assert result["round_s"]["min"] <= result["round_s"]["median"] <= result["round_s"]["max"]


def test_importing_loads_no_heavy_library():
    program = (
        "import sys, pkgutil, importlib, fedjax_rec, launch\n"
        "for name in ('run', 'report', 'benchmark', 'evaluate', 'reference', 'methods'):\n"
        "    importlib.import_module('fedjax_rec.' + name)\n"
        "print([n for n in ('torch', 'transformers', 'open_clip', 'matplotlib') if n in sys.modules])\n"
    )
    found = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
