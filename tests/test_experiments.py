"""The scripts and flagfiles in experiments/ stay valid. In processes of their own: absl's flags are global."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import quick

ROOT = Path(__file__).resolve().parents[1]

FLAGFILES = """
import pathlib, sys
import launch
for path in sorted(pathlib.Path("experiments").glob("*.flags")):
    for name in launch.FLAGS:
        launch.FLAGS[name].unparse()
    launch.FLAGS(["launch.py", f"--flagfile={path}"])
    config = launch.config_from_flags()
    backbone = config.settings.get("backbone")
    ending = f"{config.method}_{backbone}" if backbone else config.method
    free = path.stem == "demo" or path.stem.startswith("leak_")
    named = free or path.stem.endswith(ending) or f"_cold_items_{config.method}" in path.stem
    assert named, (path, config.method)
    assert path.read_text().startswith("# ") and "Expected" in path.read_text(), path
    assert "=/" not in path.read_text(), path  # a place on somebody's machine
    print(path)
"""

SETTINGS = """
import sys
sys.path.insert(0, "experiments")
import tune
from fedjax_rec.methods import make_config
over = ["fedvlr-fedrap", "mlp_fusion-fedncf", "fedvbpr-pfedrec", "fedrkg-fedmf", "plgc-fedncf", "gpfedrec", "cofedrec"]
for method in [*tune.METHODS, *over, *tune.ALONE]:
    for trial in (0, 1, 2):
        make_config(method.split("-")[0], tune.draw_settings(method, trial))
        assert tune.draw_settings(method, trial) == tune.draw_settings(method, trial)
        print(method, trial)
"""

ABLATIONS = """
import pathlib, re, sys
sys.path.insert(0, "experiments")
import ablations
from fedjax_rec.methods import make_config
for path in sorted(pathlib.Path("experiments").glob("*.flags")):
    said = path.read_text()
    method = re.search(r"^--method=(\\S+)", said, re.MULTILINE)
    if method is None or not {method[1]} & {*ablations.OF_METHOD, "fedvlr", "fedmr", "mlp_fusion"}:
        continue
    read = lambda lines: dict(x.removeprefix("--set=").split("=", 1) for x in lines if x.startswith("--set="))
    given = read(said.splitlines())
    for flag in re.findall(r"^--backbone=(\\S+)", said, re.MULTILINE):
        given["backbone"] = flag
    for group in ablations.groups_of(str(path)):
        for name, changes in ablations.GROUPS[group].items():
            make_config(method[1], {**given, **read(changes)})
            print(path, name)
"""


def test_a_new_method_is_short_and_runs_from_the_command_line(tmp_path):
    """The whole method stands between two rules of the file: under 40 lines, and it beats popularity."""
    path = ROOT / "experiments" / "new_method.py"
    code = path.read_text().split("# ---- ")[1].splitlines()[1:]
    assert 20 < len(code) < 40 and "METHODS[" in code[-1]
    command = [sys.executable, str(path), "--rounds=60", "--set=bias_lr_scale=0.5", f"--workdir={tmp_path}"]
    command += ["--noplots", "--noprogress", "--cpu_devices=1", "--max_buckets=1", "--eval_every=20"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=quick.ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["method"] == "biased_mf" and summary["settings"]["bias_lr_scale"] == 0.5
    assert summary["test"]["HR@10"] > 2 * summary["reference_rankers"]["popularity"]["test"]["HR@10"]
    refused = subprocess.run(
        [*command, "--set=bias_lr=1"], cwd=tmp_path, capture_output=True, text=True, env=quick.ENVIRONMENT
    )
    assert refused.returncode == 2 and "did you mean bias_lr_scale?" in refused.stderr


@pytest.mark.parametrize(
    "code, lines", [(FLAGFILES, 2), (SETTINGS, 27), (ABLATIONS, 99)], ids=["flagfiles", "drawn settings", "ablations"]
)
def test_they_are_valid_configurations(code, lines):
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=quick.ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) >= lines


def call(*command) -> str:
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, text=True, env=quick.ENVIRONMENT
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


QUICK = ("--rounds=4", "--eval_every=2", "--noprogress", "--noplots", "--cpu_devices=1", "--max_buckets=1")


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A multimodal recipe on the embedded data set."""
    path = tmp_path_factory.mktemp("recipes") / "synthetic_fedvlr_fcf.flags"
    flags = ["--method=fedvlr", "--backbone=fcf", "--dataset=synthetic", "--set=dim=8", "--set=id_dim=8", *QUICK]
    path.write_text("\n".join(flags) + "\n")
    return path


@pytest.fixture(scope="module")
def held(base, tmp_path_factory) -> Path:
    """Its workdir of seed 0, as tables.py makes it: one run for the tests that need a finished one."""
    out = tmp_path_factory.mktemp("held")
    said = call("experiments/tables.py", f"--out={out}", "--seeds=1", "--against=fedvlr_fcf", base)
    assert "| fedvlr_fcf |" in said and "| *popularity* |" in said
    return out / base.stem / "seed_0"


def test_ablations_write_markdown_and_plots_and_are_not_run_twice(base, held, tmp_path):
    shutil.copytree(held, tmp_path / "full" / "seed_0")
    command = ("experiments/ablations.py", f"--base={base}", f"--out={tmp_path}", "--seeds=1", "--groups=noise")
    said = call(*command)
    assert (tmp_path / "ablations.md").read_text() in said and (tmp_path / "noise.png").exists()
    rows = {line.split("|")[1].strip(): line for line in said.splitlines() if line.startswith("| ")}
    assert {"full", "variance_0.1", "variance_0.1_on_views", "l2_0.001"} <= rows.keys()
    assert rows["full"].split("|")[2] != rows["variance_0.1"].split("|")[2]
    written = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/seed_*/summary.json")}
    assert len(written) >= 3
    assert call(*command) == said and all(path.stat().st_mtime_ns == time for path, time in written.items())


CURVES = """
import pathlib, sys
sys.path.insert(0, "experiments")
import matplotlib.axes, types
import ablations
ablations.FLAGS(["ablations.py", "--base=none", "--k=5,10"])
for group, label in ablations.CURVES.items():
    names = [ablations.FULL, *ablations.GROUPS[group]]
    test = lambda n, seed: {"Recall@10": 0.1 * n + seed, "NDCG@10": 0.1 * n}
    said = lambda n: [{"test": test(n, seed), "select_metric": "Recall@5+Recall@10"} for seed in (0.0, 0.02)]
    drawn, draw = [], matplotlib.axes.Axes.errorbar
    matplotlib.axes.Axes.errorbar = lambda axis, *a, **k: drawn.append(a) or draw(axis, *a, **k)
    path = pathlib.Path(sys.argv[1]) / f"{group}.png"
    ablations.plot(path, group, {name: types.SimpleNamespace(summaries=said(n)) for n, name in enumerate(names)})
    matplotlib.axes.Axes.errorbar = draw
    (at, mean, std), (_, ndcg, flat) = drawn
    assert len(at) == len(names) - 1 and sorted(at) == at, (group, at)
    assert abs(mean[0] - 0.11) < 1e-9 and abs(std[0] - 0.01 * 2**0.5) < 1e-9
    assert abs(ndcg[1] - 0.2) < 1e-9 and not any(flat)
    assert path.stat().st_size > 5000
    print(group)
"""


def test_values_of_one_setting_are_drawn_as_a_curve(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", CURVES, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, env=quick.ENVIRONMENT
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["sampling", "interval", "beta", "gate", "laplace", "size"]


def test_a_recipe_that_is_refused_is_no_finding(base, held, tmp_path):
    bad = tmp_path / "synthetic_bad.flags"
    bad.write_text(f"--flagfile={base}\n--set=operators=sum,sum\n")
    command = [sys.executable, "experiments/tables.py", f"--out={tmp_path}", "--seeds=1", str(bad)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=quick.ENVIRONMENT)
    assert done.returncode == 2 and "each once" in done.stderr
    good = tmp_path / "synthetic_good.flags"
    good.write_text(f"--flagfile={base}\n")
    shutil.copytree(held, tmp_path / good.stem / "seed_0")
    done = subprocess.run(
        [*command[:-1], "--against=good", "--keep_going", str(bad), str(good)],
        cwd=ROOT, capture_output=True, text=True, env=quick.ENVIRONMENT,
    )  # fmt: skip
    assert done.returncode == 0 and "each once" in done.stderr and "left out" in done.stderr
    assert "| good |" in done.stdout and "| bad |" not in done.stdout


def test_tables_reuse_runs_of_the_same_flags_alone(base, held, tmp_path):
    """More rounds lengthen them; other settings are refused, and what is there stays. More seeds are added."""
    command = ["experiments/tables.py", f"--out={tmp_path}", "--seeds=1", "--against=fedvlr_fcf", str(base)]
    home = Path(shutil.copytree(held, tmp_path / base.stem / "seed_0"))
    written = {path: path.stat().st_mtime_ns for path in home.glob("*.json")}
    assert "| fedvlr_fcf |" in call(*command)
    assert len(written) >= 3 and all(path.stat().st_mtime_ns == time for path, time in written.items())
    said = call(*command, "--seeds=2", "--override=--rounds=6")
    assert "| 2 | " in next(line for line in said.splitlines() if line.startswith("| fedvlr_fcf |"))
    assert json.loads((home / "config.json").read_text())["rounds"] == 6 and (home / "summary_4.json").exists()
    refused = subprocess.run(
        [sys.executable, *command, "--override=--rounds=6", "--override=--set=lr=0.1"],
        cwd=ROOT, capture_output=True, text=True, env=quick.ENVIRONMENT,
    )  # fmt: skip
    assert refused.returncode == 2 and "another configuration (settings.lr" in refused.stderr


TUNED = """
import json, pathlib, sys
sys.path.insert(0, "experiments")
import tune
folder = pathlib.Path(sys.argv[1])
tune.FLAGS(["tune.py", f"--flags_to={folder}", "--finalists=2"])
line = lambda method, trial, **more: {"dataset": "ku", "method": method, "trial": trial, "seed": 1000, **more}
search = {"rounds": 70, "patience": 50, "start_from": "ml-100k"}
good = {"score": 0.2, "settings": {"lr": 1.0}, "best_round": 3, **search}
bad = {"score": 0.0, "settings": {}, "error": "too hot", **search}
lines = [line("fcf", 0, **bad), line("fcf", 1, **good), line("fedmf", 0, **bad)]
(folder / "0.jsonl").write_text("".join(json.dumps(x) + "\\n" for x in lines))
assert tune.finalists(lines[:2]) == [1]
tune.choose(folder)
assert float(tune.recipe_settings("ml-100k", "fedrkg-fedmf")["lr"]) > 0
for more, name in ([], "rounds"), (["--rounds=70"], "start_from"), (["--rounds=70", "--start_from=ml-100k"], ""):
    tune.FLAGS.unparse_flags()
    tune.FLAGS(["tune.py", *more])
    try:
        tune.check_same_search(folder / "0.jsonl")
    except tune.app.UsageError as refused:
        assert name and f"--{name}=" in str(refused), refused
    else:
        assert not name
    tune.FLAGS["rounds"].value, tune.FLAGS["start_from"].value = 300, None
"""


def test_failed_trials_are_not_chosen(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", TUNED, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, env=quick.ENVIRONMENT
    )
    assert done.returncode == 0, done.stderr
    assert "fedmf on ku: no flagfile, every trial failed, the last with: too hot" in done.stdout
    assert [path.name for path in tmp_path.glob("*.flags")] == ["ku_fcf.flags"]
    said = (tmp_path / "ku_fcf.flags").read_text()
    assert "the best on validation of 2 settings, the first ml-100k's (" in said and "--rounds=70\n" in said
    refused = subprocess.run(
        [sys.executable, "experiments/tune.py", "--methods=heater", "--datasets=ku"],
        cwd=ROOT, capture_output=True, text=True, env=quick.ENVIRONMENT,
    )  # fmt: skip
    assert refused.returncode == 1 and "heater have no ranges here" in refused.stdout + refused.stderr
    refused = subprocess.run(
        [sys.executable, "experiments/tune.py", "--methods=pgl", "--datasets=ku", "--start_from=ml-1m"],
        cwd=ROOT, capture_output=True, text=True, env=quick.ENVIRONMENT,
    )  # fmt: skip
    assert refused.returncode == 1 and "ml_1m_pgl.flags; leave pgl out" in refused.stdout + refused.stderr


def test_a_search_ends_with_its_hours_and_goes_on_with_more(tmp_path):
    command = ["experiments/tune.py", f"--out={tmp_path}", "--datasets=synthetic", "--methods=ease", "--trials=2"]
    tried = lambda: [json.loads(line)["trial"] for line in (tmp_path / "0.jsonl").read_text().splitlines()]
    call(*command, "--finalists=0", "--hours=0")
    assert tried() == [0]
    call(*command, "--finalists=0", "--hours=1")
    assert tried() == [0, 1]


def test_kept_rows_are_printed_without_runs(base, held, tmp_path):
    """Flags that only say where and how are no other recipe; another recipe under the same name is refused."""
    recipe = tmp_path / base.name
    shutil.copy(base, recipe)
    home = Path(shutil.copytree(held, tmp_path / "out" / base.stem / "seed_0"))
    command = ["experiments/tables.py", f"--kept={tmp_path / 'kept'}", "--seeds=1", "--against=fedvlr_fcf", "--norun"]
    place = ["--override=--cpu_devices=2", "--override=--data_dir=/elsewhere"]
    said = call(*command, f"--out={tmp_path / 'out'}", "--keep", *place, recipe)
    kept = tmp_path / "kept" / f"{base.stem}.npz"
    assert "| fedvlr_fcf |" in said and kept.stat().st_size < 20_000
    assert "elsewhere" not in np.load(kept)["said"].tobytes().decode()
    assert call(*command, f"--out={tmp_path / 'none'}", recipe) == said

    def refused(*more):
        done = subprocess.run(
            [sys.executable, *command, *more, str(recipe)],
            cwd=ROOT, capture_output=True, text=True, env=quick.ENVIRONMENT,
        )  # fmt: skip
        assert done.returncode == 2 and done.stdout == ""
        return done.stderr.splitlines()

    none = f"--out={tmp_path / 'none'}"
    assert "with other flags (--rounds=6)" in refused(none, "--override=--rounds=6")[-1]
    assert "left out, no finished run" in refused(none, "--kept=none")[0]
    before = kept.read_bytes()
    recipe.write_text(base.read_text() + "--set=lr=0.7\n")
    assert "with other flags (--set=lr=0.7)" in refused(f"--out={tmp_path / 'out'}", "--keep")[-1]
    assert "not made by" in refused(f"--out={tmp_path / 'out'}", "--keep", "--kept=none")[-1]
    (home / "asked.json").unlink()
    assert "does not say by which flags" in refused(f"--out={tmp_path / 'out'}", "--keep", "--kept=none")[-1]
    assert kept.read_bytes() == before and not (ROOT / "none").exists()


KEPT = """
import pathlib, sys
sys.path.insert(0, "experiments")
import numpy as np
import tables
from fedjax_rec import compare
tables.FLAGS(["tables.py"])
for path in sorted(pathlib.Path("experiments/results").glob("*.npz")):
    flagfile = pathlib.Path("experiments") / f"{path.stem}.flags"
    kept = compare.read_kept(path, tables.what_matters(tables.read_flags(flagfile)))
    assert len(kept.configs) >= 2, path
    given = [line.removeprefix("--set=").split("=", 1) for line in tables.read_flags(flagfile) if "--set=" in line]
    for config in kept.configs:
        for name, value in given:
            held = config["settings"][name]
            if isinstance(held, list):
                read = [int(part) for part in value.split(",")]
            else:
                read = type(held)(value.lower() == "true" if isinstance(held, bool) else value)
            assert read == held, (path, name, held)
    for metric in kept.metrics:
        means = np.nanmean(kept.by_client(metric), axis=1)
        np.testing.assert_allclose(means, [said["test"][metric] for said in kept.summaries], rtol=1e-5)
    assert "/" not in np.load(path)["said"].tobytes().decode(), path  # no place on somebody's machine
    print(path)
"""


def test_kept_results_are_those_of_the_recipes():
    done = subprocess.run([sys.executable, "-c", KEPT], cwd=ROOT, capture_output=True, text=True, env=quick.ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) >= 40


def test_a_claim_about_a_row_without_a_result_is_not_passed_over(tmp_path):
    never = tmp_path / "ml_latest_small_never.flags"
    never.write_text("--flagfile=experiments/ml_latest_small_fcf.flags\n--set=lr=0.123\n")
    rows = ["experiments/ml_latest_small_fcf.flags", "experiments/ml_latest_small_fedvlr_fcf.flags", str(never)]
    command = [sys.executable, "experiments/tables.py", "--norun", "--against=fcf", f"--out={tmp_path}"]
    done = subprocess.run(
        [*command, "--claims=fedvlr_fcf>fcf,fcf>never", *rows],
        cwd=ROOT, capture_output=True, text=True, env=quick.ENVIRONMENT,
    )  # fmt: skip
    assert done.returncode == 0 and "* fedvlr_fcf beats fcf, HR@50" in done.stdout
    assert "--claims=fcf>never: not judged, no result of never" in done.stderr


def test_tables_judge_claims(tmp_path):
    good, bad = (tmp_path / f"synthetic_{name}.flags" for name in ("moving", "still"))
    good.write_text("\n".join(["--dataset=synthetic", "--set=dim=8", *QUICK, "--rounds=40", "--eval_every=40"]) + "\n")
    bad.write_text(f"--flagfile={good}\n--set=lr=1e-9\n--set=item_lr_scale=1e-9\n")
    claims = "--claims=moving>still,still>moving"
    said = call("experiments/tables.py", f"--out={tmp_path}", "--seeds=1", "--against=still", claims, good, bad)
    assert "moving beats still, NDCG@50: **true**" in said
    assert "still beats moving, NDCG@50: **false**" in said
    assert "| *popularity* |" in said


def test_tables_of_two_splits_with_the_cut_offs_of_their_recipes(tmp_path):
    """One row name in two splits, whose rounds are selected at different cut-offs; --k adds those shown."""
    warm, cold = (tmp_path / f"synthetic_{name}fedmf.flags" for name in ("", "cold_items_"))
    common = ["--method=fedmf", "--set=dim=8", *QUICK]
    warm.write_text("\n".join([*common, "--select_metric=NDCG@50"]) + "\n")
    cold.write_text("\n".join([*common, "--split=cold_items", "--k=20,100", "--select_metric=Recall@20"]) + "\n")
    command = ("experiments/tables.py", "--seeds=1")
    head = lambda said: [line.split(" | ")[1:4] for line in said.splitlines() if line.startswith("|  | ")]
    said = call(*command, f"--out={tmp_path / 'out'}", warm, cold)
    titles = [line for line in said.splitlines() if line.startswith("synthetic ")]
    assert titles == ["synthetic leave_one_out honest", "synthetic cold_items honest"]
    assert said.count("| fedmf |") == 2
    assert head(said) == [["HR@10", "NDCG@10", "HR@50"], ["Recall@20", "NDCG@20", "Recall@100"]]
    (shown,) = head(call(*command, f"--out={tmp_path / 'out_30'}", "--k=30", cold))
    assert shown[:2] == ["Recall@30", "NDCG@30"]
    config = json.loads((tmp_path / "out_30" / cold.stem / "seed_0" / "config.json").read_text())
    assert config["ks"] == [20, 30]
    again = ("experiments/tables.py", f"--out={tmp_path / 'out'}", "--norun", "--k=30", warm)
    done = subprocess.run(
        [sys.executable, *map(str, again)], cwd=ROOT, capture_output=True, text=True, env=quick.ENVIRONMENT
    )
    assert done.returncode == 2 and "--k=30: expected runs that have them" in done.stderr
    assert done.stderr.count("\n") == 1


TABLES = """
import sys
sys.path.insert(0, "experiments")
import tables
for line in sys.stdin.read().splitlines():
    for name in tables.FLAGS:
        tables.FLAGS[name].unparse()
    left = tables.FLAGS(["tables.py", f"--out={sys.argv[1]}", *line.split()])
    assert tables.main(left) == 2, line
"""
TWO = "experiments/ku_fcf.flags experiments/ku_fedmf.flags"
TABLES_REFUSED = {
    "": "no flagfile given",
    f"--claims=fedmf>fcff {TWO}": "--claims=fedmf>fcff: no row 'fcff'; expected some of fcf, fedmf (did you mean fcf?)",
    f"--claims=fedmf>fcf,fedmf<fcf {TWO}": "--claims=fedmf<fcf: expected better>worse",
    f"--against=fedmff {TWO}": "--against=fedmff: no row 'fedmff'; expected some of fcf, fedmf (did you mean fedmf?)",
    f"--claims=fedmf>mdifffr_proper {TWO} experiments/ku_cold_items_mdifffr_proper.flags": "rows of different tables",
    f"--k=10,x {TWO}": "--k=10,x: expected whole numbers > 0",
    f"{TWO} {TWO}": "are both row fcf of ku given honest",
    "experiments/kuu_fcf.flags": "experiments/kuu_fcf.flags",
}


def test_tables_refuse_what_they_cannot_answer_before_the_first_run(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", TABLES, tmp_path / "out"], cwd=ROOT, capture_output=True, text=True,
        env=quick.ENVIRONMENT, input="\n".join(TABLES_REFUSED),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for line, expected in zip(done.stderr.splitlines(), TABLES_REFUSED.values(), strict=True):
        assert line.startswith("tables.py: ") and expected in line, line
    assert not (tmp_path / "out").exists()


def test_plots_of_a_run_with_a_router(held, tmp_path):
    call("experiments/plots.py", f"--out={tmp_path / 'plots'}", held)
    run = f"{held.parent.name}_seed_0"
    names = {"users.png", "loss.png", "activity.png", f"{run}_router.png", f"{run}_router.csv", f"{run}_items.png"}
    assert {path.name for path in (tmp_path / "plots").iterdir()} == names
    lines = (tmp_path / "plots" / f"{run}_router.csv").read_text().splitlines()
    assert lines[0] == "user_id,train_items,sum,mlp,gate" and len(lines) == 601
    weights = [[float(w) for w in line.split(",")[2:]] for line in lines[1:]]
    assert all(abs(sum(w) - 1) < 1e-5 for w in weights) and len(set(map(tuple, weights))) > 300


def test_tag_features_of_items_with_the_same_tags_are_the_same(tmp_path):
    """Items 1 and 2 have one set of tags, 3 and 4 another, 0 and 5 none; tag 9 has one item and is left out."""
    tags, out = tmp_path / "item-tag.dat", tmp_path / "tags.npz"
    tags.write_text("0\n2 0 1\n3 1 0 9\n2 2 3\n2 3 2\n0\n")
    command = [sys.executable, "experiments/tag_features.py", f"--tags={tags}", f"--out={out}", "--min_items=2"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=quick.ENVIRONMENT)
    assert done.returncode == 0 and "6 items, 3 directions, 2 items without tags" in done.stdout, done
    made = np.load(out)
    like = made["values"] @ made["values"].T
    np.testing.assert_allclose(like[1:5, 1:5], np.kron(np.eye(2), np.ones((2, 2))), atol=1e-5)
    np.testing.assert_array_equal(made["present"], [False, True, True, True, True, False])
    np.testing.assert_array_equal(made["values"][[0, 5]], 0.0)
    for wrong in ("3 1 0", ""):
        tags.write_text(f"2 0 1\n{wrong}\n2 0 1\n")
        refused = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=quick.ENVIRONMENT)
        assert refused.returncode == 2 and "line 2" in refused.stderr and refused.stderr.count("\n") == 1
    tags.unlink()
    refused = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=quick.ENVIRONMENT)
    assert refused.returncode == 2 and str(tags) in refused.stderr and refused.stderr.count("\n") == 1


def test_guidance_before_and_after_for_every_group(tmp_path):
    """The run went on by itself has, after its next guidance round, the metrics that the analysis says."""
    common = ["--method=fedrkg", "--set=interval=3", "--cpu_devices=1", "--max_buckets=1", "--noplots", "--noprogress"]
    common += ["--set=beta=0.2", "--set=gate_lr=2000", "--clients_per_round=0.8"]
    for rounds in (5, 6):
        call("launch.py", *common, f"--rounds={rounds}", f"--workdir={tmp_path / str(rounds)}")
    said = call("experiments/guidance.py", f"--out={tmp_path / 'out'}", tmp_path / "5")
    assert (tmp_path / "out" / "guidance.md").read_text() in said
    assert (tmp_path / "out" / "convergence.png").stat().st_size > 1000
    assert "### Effect of the guidance of round 6" in said and "| cold (180) | 5 |" in said
    line = lambda row: next(line for line in said.splitlines() if line.startswith(f"| {row}")).split(" | ")
    rows = [line(f"{rule}, {who}") for rule in ("KG", "AG") for who in ("100 distinct", "as many followers", "all")]
    assert len({tuple(row[1:]) for row in rows}) > 3  # every group differs, and some under the two rules
    test = json.loads((tmp_path / "6" / "summary.json").read_text())["test"]
    after = [float(cell.split(", ")[1]) for cell in rows[-1][1:5]]
    np.testing.assert_allclose(after, [test[m] for m in ("HR@10", "NDCG@10", "HR@50", "NDCG@50")], atol=6e-5)
    assert "distinct users, followers: popular items" in said
    assert "nan" not in said  # though some gates are shut to the last bit
    command = [sys.executable, "experiments/guidance.py", "--group=0", f"--out={tmp_path / 'no'}", tmp_path / "5"]
    refused = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=quick.ENVIRONMENT)
    assert refused.returncode == 2 and refused.stderr == "guidance.py: --group=0: expected a number > 0\n"


def test_rows_that_are_means_of_others_crowd_together(tmp_path):
    """Random rows have the warm rows' spread, means of 20 neighbours less; halves of the warm rows are alike."""
    common = ["--method=cs_fcf", "--split=cold_items", "--k=10", *QUICK]
    for cold in ("random", "knn"):
        settings = [f"--set=cold={cold}", "--set=neighbours=20", "--set=init_std=0.5"]
        call("launch.py", *common, *settings, f"--workdir={tmp_path / cold}")
    command = ("experiments/alignment.py", f"--out={tmp_path / 'out'}", "--permutations=20")
    said = call(*command, tmp_path / "random", tmp_path / "knn")
    assert (tmp_path / "out" / "alignment.md").read_text() in said and (tmp_path / "out" / "rows.png").exists()
    cells = [line.strip("| ").split(" | ") for line in said.splitlines() if "| 4 |" in line]
    found = {(run, sample): tuple(map(float, rest)) for run, _, sample, *rest in cells}
    assert len(found) == 6
    assert found["knn", "made"][2] < 0.3 < 0.8 < found["random", "made"][2] < 1.25
    assert found["knn", "made"][0] > 2 * found["random", "made"][0]
    assert found["knn", "made"][1] < 0.05 < found["knn", "halves"][1]
    nowhere = [sys.executable, *map(str, command), tmp_path / "nowhere"]
    refused = subprocess.run(nowhere, cwd=ROOT, capture_output=True, text=True, env=quick.ENVIRONMENT)
    assert refused.returncode == 2 and "nowhere" in refused.stderr and refused.stderr.count("\n") == 1


ALIGNMENT = """
import sys
sys.path.insert(0, "experiments")
import alignment
for line in sys.stdin.read().splitlines():
    for name in alignment.FLAGS:
        alignment.FLAGS[name].unparse()
    alignment.main(alignment.FLAGS(["alignment.py", "--permutations=5", *line.split()]))
"""


def test_alignment_over_rounds_ends_with_that_of_the_checkpoint(tmp_path):
    """The run is trained again: a panel and rows for each round, those of the last one as without --at."""
    cold = ["--method=cs_fcf", "--split=cold_items", "--clients_per_round=0.5", "--k=10"]
    call("launch.py", *cold, *QUICK, f"--workdir={tmp_path / 'cold'}")
    call("launch.py", "--method=fedmf", *QUICK, "--rounds=2", f"--workdir={tmp_path / 'warm'}")
    given = {
        f"--out={tmp_path / 'last'} {tmp_path / 'cold'}": "",
        f"--out={tmp_path / 'rounds'} --at=4,1,2 {tmp_path / 'cold'}": "",
        f"--out={tmp_path / 'no'} --at=2,5 {tmp_path / 'cold'}": f"--at=5: expected rounds of the run in {tmp_path}",
        f"--out={tmp_path / 'no'} --at=0,2 {tmp_path / 'cold'}": "--at=0: expected a whole number > 0",
        f"--out={tmp_path / 'no'} --at=2.5 {tmp_path / 'cold'}": "--at=2.5: expected whole numbers, like 10,30,60",
        f"--out={tmp_path / 'no'} --at=2 {tmp_path / 'warm'}": "expected a run with --split=cold_items",
        f"--out={tmp_path / 'no'} --at=2": "no workdir given",
    }
    command = [sys.executable, "-c", ALIGNMENT]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env=quick.ENVIRONMENT, input="\n".join(given)
    )
    assert done.returncode == 0, done.stderr
    for line, expected in zip(done.stderr.splitlines(), filter(None, given.values()), strict=True):
        assert line.startswith("alignment.py: ") and expected in line, line
    assert not (tmp_path / "no").exists()
    last, rounds = ((tmp_path / name / "alignment.md").read_text().splitlines() for name in ("last", "rounds"))
    made = [line.split(" | ") for line in rounds if "| made |" in line]
    assert [row[1] for row in made] == ["1", "2", "4"] and made[0][3] != made[2][3]
    assert rounds[:4] == last[:4] and rounds[-3:] == last[-3:] and len(rounds) == 4 + 3 * 3
    width = lambda name: int.from_bytes((tmp_path / name / "rows.png").read_bytes()[16:20])  # of a PNG's header
    assert width("rounds") == 3 * width("last")


PRIVACY = """
import sys
sys.path.insert(0, "experiments")
import privacy

def parse(*given):
    for name in privacy.FLAGS:
        privacy.FLAGS[name].unparse()
    privacy.FLAGS(["privacy.py", f"--out={sys.argv[1]}", *given])

for maker, (value, of_control), place in [
    ("MSE", (0.0, 2.0), 1.0), ("MAE", (2.0, 2.0), 0.5), ("structure", (9.0, 2.0), 0.0), ("MSE", (0.0, 0.0), 1.0),
    ("cosine", (1.0, 0.3), 1.0), ("Pearson", (0.0, 0.3), 0.5), ("Pearson", (-1.0, 0.3), 0.0),
]:
    assert privacy.outward(maker, value, of_control) == place, maker
for line in sys.stdin.read().splitlines():
    words = line.split()
    parse(*(word for word in words if word.startswith("-")))
    assert privacy.main(["privacy.py", *(word for word in words if not word.startswith("-"))]) == 2, line
"""
PRIVACY_REFUSED = {
    "--parts=attack": "--parts='attack': expected one of utility, paper, probes, inversion",
    "--parts=utility --set=backbone": "--set=backbone: expected key=value",
    "--parts=utility --set=backbon=fedmf": "fedrkg has no such setting (did you mean backbone?)",
    "--parts=utility --epsilon=foo": "--epsilon=foo: expected numbers, like 1,10",
    "--parts=probes --k=": "--k=: expected whole numbers, like 10,50",
    "--parts=probes --upload_noise=0,x": "--upload_noise=0,x: expected numbers",
    "--parts=probes nowhere": "nowhere/config.json does not exist: expected the workdir of a run; train one first",
    "--parts=inversion": "--parts=inversion: expected workdirs of runs on cold items as arguments",
    "--parts=inversion --draws=0": "--parts=inversion: expected workdirs",
    "--parts=probes --draws=1": "--draws=1: expected 2 or more, as noise is what differs between draws",
}


def test_privacy_refuses_bad_settings_before_the_first_run(tmp_path):
    """One line each; the rim of the radar is a full leak."""
    command = [sys.executable, "-c", PRIVACY, tmp_path / "out"]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env=quick.ENVIRONMENT, input="\n".join(PRIVACY_REFUSED)
    )
    assert done.returncode == 0, done.stderr
    said = done.stderr.splitlines()
    for line, expected in zip(said, PRIVACY_REFUSED.values(), strict=True):
        assert line.startswith("privacy.py: ") and expected in line, line
    assert not (tmp_path / "out").exists()


def test_the_same_on_the_cpu_is_told_and_a_difference_seen(tmp_path):
    """Here both are the CPU, and agree in every bit; a loss and a rank that are changed afterwards show."""
    overrides = [f"--override={flag}" for flag in QUICK[2:]]
    command = ("experiments/same_on_cpu.py", f"--out={tmp_path}", "--methods=fedmf", "--rounds=2", *overrides)
    cells = lambda said: (
        next(line for line in said.splitlines() if line.startswith("| fedmf ")).strip("| ").split(" | ")
    )
    _, loss, *apart, ndcg, on_cpu, same, device = cells(call(*command))
    assert apart == ["0.0e+00"] * 2 and (same, device) == ("100.0%", "cpu (cpu)")
    assert ndcg == on_cpu and float(loss) > 0
    held = tmp_path / "cpu" / "fedmf"
    lines = [json.loads(line) for line in (held / "metrics.jsonl").read_text().splitlines()]
    lines[1]["loss"] *= 1.25
    (held / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    arrays = dict(np.load(held / "per_client.npz"))
    arrays["test_rank"][0] += 1
    np.savez(held / "per_client.npz", **arrays)
    _, _, *apart, _, _, same, _ = cells(call(*command))
    assert apart == ["0.0e+00", "2.0e-01"] and same == f"{1 - 1 / len(arrays['test_rank']):.1%}"
    other = [sys.executable, *map(str, command), "--override=--seed=1"]
    refused = subprocess.run(other, cwd=ROOT, capture_output=True, text=True, env=quick.ENVIRONMENT)
    assert refused.returncode == 2 and "fedmf on the device" in refused.stderr and "seed" in refused.stderr
