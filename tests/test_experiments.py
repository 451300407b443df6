"""The scripts and flagfiles in experiments/ stay valid. In processes of their own: absl's flags are global."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

FLAGFILES = """
import pathlib, sys
import launch
for path in sorted(pathlib.Path("experiments").glob("*.flags")):
    for name in launch.FLAGS:
        launch.FLAGS[name].unparse()
    launch.FLAGS(["launch.py", f"--flagfile={path}"])
    config = launch.config_from_flags()
    named = path.stem in ("demo", "leak_filmtrust") or path.stem.endswith(config.method)
    assert named, (path, config.method)
    assert path.read_text().startswith("# ") and "Expected" in path.read_text(), path
    print(path)
"""

SETTINGS = """
import sys
sys.path.insert(0, "experiments")
import tune
from fedjax_rec.methods import make_config
for method in tune.METHODS:
    for trial in (0, 1, 2):
        make_config(method, tune.draw_settings(method, trial))
        assert tune.draw_settings(method, trial) == tune.draw_settings(method, trial)
        print(method, trial)
"""


def test_a_new_method_is_short_and_runs_from_the_command_line(tmp_path):
    """The whole method stands between two rules of the file: under 40 lines, and it beats popularity."""
    path = ROOT / "experiments" / "new_method.py"
    code = path.read_text().split("# ---- ")[1].splitlines()[1:]
    assert 20 < len(code) < 40 and "METHODS[" in code[-1]
    command = [sys.executable, str(path), "--rounds=60", "--set=bias_lr_scale=0.5", f"--workdir={tmp_path}"]
    command += ["--noplots", "--noprogress", "--cpu_devices=1", "--eval_every=20"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["method"] == "biased_mf" and summary["settings"]["bias_lr_scale"] == 0.5
    assert summary["test"]["HR@10"] > 2 * summary["reference_rankers"]["popularity"]["test"]["HR@10"]
    refused = subprocess.run([*command, "--set=bias_lr=1"], cwd=tmp_path, capture_output=True, text=True)
    assert refused.returncode == 2 and "did you mean bias_lr_scale?" in refused.stderr


@pytest.mark.parametrize("code, lines", [(FLAGFILES, 2), (SETTINGS, 18)], ids=["flagfiles", "drawn settings"])
def test_they_are_valid_configurations(code, lines):
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) >= lines
