"""The command line: usage errors, lazy imports, whole runs, and a kill in the middle of one."""

from __future__ import annotations

import importlib.util
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from fedjax_rec import encoders
from fedjax_rec.data.features import load_npz
from fedjax_rec.encoders.__main__ import command_line
from fedjax_rec.encoders.items import MISSING_TITLE

ROOT = Path(__file__).resolve().parents[2]
needs_torch = pytest.mark.skipif(
    importlib.util.find_spec("torch") is None, reason="the extra `encoders` is not installed: make test-encoders"
)


@pytest.fixture
def run(capsys):
    """Runs the command line; returns exit code, output and error output."""

    def run(**options) -> tuple[int, str, str]:
        given = {"progress": "false", **options}
        before = signal.getsignal(signal.SIGTERM)
        try:
            code = command_line(["encoders", *(f"--{name}={value}" for name, value in given.items())])
        finally:
            signal.signal(signal.SIGTERM, before)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": ""}, "--model is missing"),
        ({"items": ""}, "--items is missing"),
        ({"out": ""}, "--out is missing"),
        ({"out": "features.npy"}, "--out=features.npy: expected a file name that ends in .npz"),
        ({"model": "brt:x"}, "--model=brt:x: expected clip:ARCHITECTURE/TAG or bert:NAME (did you mean bert?)"),
        ({"model": "bert:"}, "--model=bert:: expected"),
        ({"text_column": ""}, "expected either --text_column=NAME or --images=FOLDER"),
        ({"images": "folder"}, "expected either --text_column=NAME or --images=FOLDER"),
        ({"images": "folder", "text_column": ""}, "--images: expected a clip model"),
        ({"image_column": "path"}, "--image_column: expected --images=FOLDER with it"),
        ({"model": "clip:ViT-B-32/openai", "pooling": "cls"}, "--pooling: expected a bert model"),
        ({"model": "clip:ViT-B-32/openai", "max_tokens": 9}, "--max_tokens: expected a bert model"),
        ({"batch_size": 0}, "--batch_size=0: expected a number > 0"),
        ({"batch_size": "many"}, "batch_size"),
        ({"max_tokens": 0}, "--max_tokens=0: expected a number > 0"),
        ({"modl": "x"}, "Did you mean: model"),
        ({"items": "nowhere.csv"}, "nowhere.csv: cannot be read"),
    ],
)
def test_bad_usage_is_one_line(run, options, message):
    usual = {"model": "bert:x", "items": "items.csv", "text_column": "title", "out": "out.npz"}
    code, out, err = run(**usual | options)
    assert (code, out) == (2, "")
    assert message in err
    assert err.startswith("encoders: ") and err.count("\n") == 1


def test_help_lists_the_flags(capsys):
    assert command_line(["encoders", "--help"]) == 0
    assert "--text_column" in capsys.readouterr().out


@pytest.mark.parametrize("package", ["torch", "open_clip"])
def test_without_the_extra(run, table, monkeypatch, tmp_path, package):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, "fedjax_rec.encoders.clip", raising=False)
    monkeypatch.delattr(encoders, "clip", raising=False)
    if package == "open_clip":
        pytest.importorskip("torch", reason="the extra `encoders` is not installed: make test-encoders")
    options = {"items": table("item,title\n1,a\n"), "text_column": "title", "out": tmp_path / "out.npz"}
    code, _, err = run(model="clip:ViT-B-32/openai", **options)
    assert code == 2
    assert f"import of {package} halted" in err and "install the extra `encoders`" in err
    assert err.count("\n") == 1


def test_neither_the_core_nor_the_command_line_loads_a_model_library():
    program = (
        "import importlib, pkgutil, sys, fedjax_rec\n"
        "names = [m.name for m in pkgutil.walk_packages(fedjax_rec.__path__, 'fedjax_rec.')]\n"
        "for name in names:\n"
        "    if '.encoders' not in name: importlib.import_module(name)\n"
        "print(len(names), [n for n in sys.modules if 'rec.encoders.' in n])\n"
        "for name in ('items', 'extract', '__main__'): importlib.import_module('fedjax_rec.encoders.' + name)\n"
        "print([n for n in ('torch', 'torchvision', 'transformers', 'open_clip', 'PIL') if n in sys.modules])\n"
    )
    found = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    modules, libraries = found.stdout.strip().splitlines()
    count, encoders = modules.split(" ", 1)
    assert int(count) > 20
    assert encoders == "[]"
    assert libraries == "[]"


@needs_torch
def test_titles_to_features(run, table, tiny_bert, tmp_path):
    path = table('asin,title\n0007,red rose\n0012,\n0003,"the song, of the sea"\n')
    options = {"items": path, "id_column": "asin", "text_column": "title", "out": tmp_path / "text.npz"}
    code, out, err = run(model="bert:tiny", weights=tiny_bert, pooling="cls", **options)
    assert code == 0, err
    assert out == f"{tmp_path / 'text.npz'}: 3 items, 1 without title\n"
    assert "item 0012: no title; encoded as 'The title is missing.'" in err

    from fedjax_rec.encoders import bert

    encoder = bert.load("tiny", weights=str(tiny_bert), pooling="cls")
    expected = encoder.encode(["the song, of the sea", "red rose", MISSING_TITLE])
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    loaded = load_npz(tmp_path / "text.npz", np.array(["0003", "0007", "0012"]))
    np.testing.assert_allclose(loaded.values, expected, atol=1e-5)
    assert loaded.present.all()
    assert f"(bert:tiny {encoder.settings['weights_hash']})" in loaded.source
    with np.load(tmp_path / "text.npz") as file:
        settings = json.loads(str(file["settings"]))
    assert settings.items() >= {"pooling": "cls", "max_tokens": 512, "normalise": True, "device": "cpu"}.items()
    assert settings["versions"].keys() == {"torch", "transformers", "tokenizers"}


@needs_torch
def test_images_to_features(run, table, tiny_clip, tmp_path):
    from PIL import Image

    folder = tmp_path / "images"
    folder.mkdir()
    for item in (1, 2, 5):
        Image.new("RGB", (40, 60), (50 * item, 20, 255 - 50 * item)).save(folder / f"{item}.png")
    (folder / "3.jpg").write_bytes(b"\xff\xd8\xff broken")
    options = {"items": table("item\n1\n2\n3\n4\n5\n"), "images": folder, "out": tmp_path / "image.npz"}
    code, out, err = run(model="clip:tiny-test", weights=tiny_clip, batch_size=2, **options)
    assert code == 0, err
    assert out == f"{tmp_path / 'image.npz'}: 5 items, 2 without image\n"
    assert "item 3: 3.jpg cannot be read (" in err
    assert "item 4: no file 4.jpg; the mean of the others stands in" in err

    loaded = load_npz(tmp_path / "image.npz", np.arange(1, 6))
    np.testing.assert_array_equal(loaded.present, [True, True, False, False, True])
    np.testing.assert_allclose(np.linalg.norm(loaded.values[loaded.present], axis=1), 1, rtol=1e-5)
    mean = loaded.values[loaded.present].mean(axis=0)
    np.testing.assert_allclose(loaded.values[~loaded.present], [mean, mean], rtol=1e-5)
    with np.load(tmp_path / "image.npz") as file:
        np.testing.assert_allclose(file["values"], loaded.values, rtol=1e-5)
        np.testing.assert_array_equal(file["missing"], [False, False, True, True, False])


@needs_torch
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"model": "bert:no-such/model"},
            "expected a model that can be fetched from here, or its local weights in --weights",
        ),
        ({"model": "clip:ViT-B-32/openai"}, "Failed to download weights for tag 'openai'"),
        ({"model": "clip:ViT-B-32/opanai"}, "did you mean openai?"),
        ({"model": "bert:x", "device": "gpu"}, "--device=gpu: expected cpu, or cuda"),
    ],
)
def test_models_that_cannot_be_loaded(run, table, tmp_path, options, message):
    usual = {"items": table("item,title\n1,a\n"), "text_column": "title", "out": tmp_path / "out.npz"}
    code, _, err = run(**usual | options)
    assert code == 2
    assert message in err
    assert err.count("\n") == 1


@needs_torch
def test_killed_and_started_again(run, table, tiny_bert, tmp_path):
    """A real SIGTERM in a process of its own; the resumed file equals the uninterrupted one byte for byte."""
    words = ["red", "blue", "sea", "night"]
    rows = [f"{row},{' '.join(words[(row * k) % 4] for k in range(1, 2 + row % 20))}" for row in range(600)]
    path = table("item,title\n" + "\n".join(rows) + "\n")
    program = (
        "import runpy, torchvision_ops\nrunpy.run_module('fedjax_rec.encoders', run_name='__main__', alter_sys=True)\n"
    )

    flags = {"model": "bert:tiny", "weights": tiny_bert, "items": path, "text_column": "title", "batch_size": 2}
    flags |= {"out": tmp_path / "resumed.npz", "progress": "false"}
    command = [sys.executable, "-c", program, *(f"--{name}={value}" for name, value in flags.items())]
    process = subprocess.Popen(command, cwd=Path(__file__).parent, stderr=subprocess.PIPE, text=True)
    third = tmp_path / "resumed.npz.partial" / "0000002.npz"
    while not third.exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
    assert err.endswith("encoders: stopped early by a signal: start again to go on\n")
    assert not (tmp_path / "resumed.npz").exists()
    assert 3 <= len(list(third.parent.glob("*.npz"))) < 300

    assert run(**flags)[0] == 0
    assert not third.parent.exists()
    assert run(**flags | {"out": tmp_path / "whole.npz"})[0] == 0
    assert (tmp_path / "resumed.npz").read_bytes() == (tmp_path / "whole.npz").read_bytes()
