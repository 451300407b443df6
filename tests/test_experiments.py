"""The scripts and flagfiles in experiments/ stay valid. In processes of their own: absl's flags are global."""

from __future__ import annotations

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


@pytest.mark.parametrize("code, lines", [(FLAGFILES, 2), (SETTINGS, 18)], ids=["flagfiles", "drawn settings"])
def test_they_are_valid_configurations(code, lines):
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) >= lines
