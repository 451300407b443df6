"""The files of a run survive a kill, and belong to one configuration."""

from __future__ import annotations

import dataclasses
import json
import os

import numpy as np
import pytest

from fedjax_rec import methods
from fedjax_rec.workdir import (
    MetricsLog,
    UsageError,
    claim,
    flat,
    read_config,
    read_lines,
    with_defaults,
    write_json,
    write_lines,
    write_npz,
)

CONFIG = {"method": "fedmf", "settings": {"dim": 4, "lr": 0.1}, "ks": (10, 50), "data_dir": None, "rounds": 3}


def rounds_of(folder):
    return [json.loads(line)["round"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def write_rounds(folder, count):
    log = MetricsLog(folder, 0)
    for number in range(1, count + 1):
        log.append({"round": number, "loss": 1 / number})
    log.close()


# ---- config.json ---------------------------------------------------------------------------------------------


def test_a_folder_is_claimed_once_and_again_by_the_same_run(tmp_path):
    folder = tmp_path / "a" / "b"
    claim(folder, CONFIG)
    claim(folder, CONFIG)  # tuples have become lists in the file: the same configuration
    assert read_config(folder) == {**CONFIG, "ks": [10, 50]}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rounds": 4}, "rounds: 3 there, 4 given"),
        ({"method": "fcf"}, "method: 'fedmf' there, 'fcf' given"),
        ({"settings": {"dim": 4, "lr": 0.2}}, "0.2"),
        ({"ks": (10,)}, "ks: [10, 50] there, [10] given"),
        ({"added": 1}, "added: None there, 1 given"),
    ],
)
def test_another_configuration_is_refused_naming_the_difference(tmp_path, change, said):
    claim(tmp_path, CONFIG)
    with pytest.raises(UsageError) as error:
        claim(tmp_path, {**CONFIG, **change})
    assert said in str(error.value) and str(tmp_path) in str(error.value) and "--workdir" in str(error.value)
    assert "\n" not in str(error.value)
    assert read_config(tmp_path) == {**CONFIG, "ks": [10, 50]}  # and the folder stays the first run's


def test_all_differences_are_named(tmp_path):
    claim(tmp_path, CONFIG)
    with pytest.raises(UsageError, match=r"method: .*; rounds: "):
        claim(tmp_path, {**CONFIG, "rounds": 9, "method": "fcf"})


def test_only_the_settings_that_differ_are_named(tmp_path):
    claim(tmp_path, CONFIG)
    with pytest.raises(UsageError) as error:
        claim(tmp_path, {**CONFIG, "settings": {"dim": 4, "lr": 0.2}})
    assert "lr: 0.1 there, 0.2 given" in str(error.value)
    assert "dim" not in str(error.value)


def test_a_setting_that_a_method_has_got_since_is_at_its_default_in_earlier_runs(tmp_path):
    """FedMF's l2, say. One that it has lost is named."""
    whole = dataclasses.asdict(methods.make_config("fedmf", CONFIG["settings"]))
    earlier = {name: value for name, value in whole.items() if name != "l2"}
    claim(tmp_path / "a", {**CONFIG, "settings": earlier})
    claim(tmp_path / "a", {**CONFIG, "settings": whole})
    assert read_config(tmp_path / "a")["settings"] == earlier
    with pytest.raises(UsageError, match=r"\(settings\.l2: 0\.0 there, 0\.5 given\)"):
        claim(tmp_path / "a", {**CONFIG, "settings": {**whole, "l2": 0.5}})
    claim(tmp_path / "b", {**CONFIG, "settings": {**earlier, "lost": 2}})
    with pytest.raises(UsageError, match=r"\(settings\.lost: 2 there, None given\)"):
        claim(tmp_path / "b", {**CONFIG, "settings": whole})


def test_a_setting_that_is_missing_has_the_default_of_its_preset():
    default = methods.METHODS["pfedrec"].presets["released"]
    settings = dataclasses.asdict(default)
    name = next(name for name, value in settings.items() if value != getattr(methods.METHODS["pfedrec"].config, name))
    held = {"method": "pfedrec", "settings": {"preset": "released"}}
    assert flat(with_defaults(held))[f"settings.{name}"] == settings[name]


@pytest.mark.parametrize(
    "held", [{"method": "lost", "settings": {"a": 1}}, {"settings": {}}, {"method": "fedmf", "settings": {"dim": "x"}}]
)
def test_what_cannot_be_completed_is_compared_as_it_is(held):
    assert with_defaults(held) == held


def test_other_data_are_another_run_where_they_were_recorded(tmp_path):
    claim(tmp_path / "new", {**CONFIG, "data_hash": "a"})
    claim(tmp_path / "old", CONFIG)
    claim(tmp_path / "old", {**CONFIG, "data_hash": "b"})
    with pytest.raises(UsageError, match="data_hash: 'a' there, 'b' given"):
        claim(tmp_path / "new", {**CONFIG, "data_hash": "b"})


def test_a_folder_without_a_run_says_so(tmp_path):
    with pytest.raises(UsageError, match=r"config\.json does not exist"):
        read_config(tmp_path)


@pytest.mark.parametrize("text", ["", "{", '{"method": '])
def test_a_broken_config_names_file_and_line(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UsageError, match=r"config\.json line 1: not JSON"):
        claim(tmp_path, CONFIG)


@pytest.mark.parametrize("held", [b"null", b"[1]", b'{"method": "\xff"}'], ids=repr)
def test_a_config_of_another_kind_is_named(tmp_path, held):
    (tmp_path / "config.json").write_bytes(held)
    with pytest.raises(UsageError, match=r"config\.json: .*restore or remove it"):
        claim(tmp_path, CONFIG)


def test_a_file_in_the_place_of_the_folder_is_bad_usage(tmp_path):
    path = tmp_path / "taken"
    path.write_text("")
    with pytest.raises(UsageError, match="taken"):
        claim(path, CONFIG)


# ---- metrics.jsonl -------------------------------------------------------------------------------------------


def test_lines_are_on_disk_as_soon_as_they_are_written(tmp_path):
    log = MetricsLog(tmp_path, 0)
    log.append({"round": 1})
    assert rounds_of(tmp_path) == [1]
    log.close()


def test_a_resumed_log_keeps_the_rounds_of_the_checkpoint_and_no_later_ones(tmp_path):
    write_rounds(tmp_path, 5)
    log = MetricsLog(tmp_path, 3)
    assert [line["round"] for line in log.lines] == rounds_of(tmp_path) == [1, 2, 3]
    log.append({"round": 4})
    log.close()
    assert rounds_of(tmp_path) == [1, 2, 3, 4]


def test_a_run_that_starts_anew_drops_all(tmp_path):
    write_rounds(tmp_path, 5)
    MetricsLog(tmp_path, 0).close()
    assert rounds_of(tmp_path) == []


@pytest.mark.parametrize("cut", [1, 2, 5, 20])
def test_a_line_that_a_kill_cut_in_half_is_dropped(tmp_path, cut):
    """`cut` bytes are missing at the end; with 1 it is only the line break."""
    write_rounds(tmp_path, 3)
    path = tmp_path / "metrics.jsonl"
    os.truncate(path, path.stat().st_size - cut)
    kept = [1, 2, 3] if cut == 1 else [1, 2]
    MetricsLog(tmp_path, len(kept)).close()
    assert rounds_of(tmp_path) == kept
    assert path.read_text().endswith("\n")


@pytest.mark.parametrize(
    "spoiled", [b'{"round": 3, "lo', b"null", b'{"round": 3, "loss": "\xff"}', b"", b"[3]"], ids=repr
)
def test_a_damaged_line_is_named_and_nothing_is_rewritten(tmp_path, spoiled):
    write_rounds(tmp_path, 6)
    path = tmp_path / "metrics.jsonl"
    lines = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join([*lines[:2], spoiled, *lines[3:]]))
    before = path.read_bytes()
    for call in (lambda: MetricsLog(tmp_path, 4), lambda: read_lines(path)):
        with pytest.raises(UsageError, match=r"metrics\.jsonl line 3: .*restore or remove it"):
            call()
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("kept", "said"), [([1, 2], "line 3: .*'the end'"), ([1, 2, 4, 5], "line 3: .*4"), ([], "line 1")]
)
def test_a_log_without_a_round_of_the_checkpoint_is_refused(tmp_path, kept, said):
    path = tmp_path / "metrics.jsonl"
    write_lines(path, [{"round": round_} for round_ in kept])
    before = path.read_bytes()
    with pytest.raises(UsageError, match=said):
        MetricsLog(tmp_path, 3)
    assert path.read_bytes() == before


def test_numbers_survive_rewriting_bit_for_bit(tmp_path):
    values = [0.1, 1 / 3, 1e-300, float(np.float32(0.3)), float("nan"), float("inf")]
    log = MetricsLog(tmp_path, 0)
    log.append({"round": 1, "values": values})
    log.close()
    before = (tmp_path / "metrics.jsonl").read_text()
    log = MetricsLog(tmp_path, 1)
    log.close()
    assert (tmp_path / "metrics.jsonl").read_text() == before
    # JSON has no word for the last two
    assert log.lines[0]["values"] == [*values[:-2], None, None]


# ---- whole files or none -------------------------------------------------------------------------------------


def test_a_write_that_fails_leaves_the_file_as_it_was(tmp_path):
    path = tmp_path / "summary.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}


def test_npz_round_trip_without_pickle(tmp_path):
    arrays = {"user_id": np.array(["u1", "ü"]), "rank": np.array([[1.0, np.nan]]), "seen": np.array([True, False])}
    write_npz(tmp_path / "per_client.npz", arrays)
    found = np.load(tmp_path / "per_client.npz", allow_pickle=False)
    assert set(found) == set(arrays)
    for name, value in arrays.items():
        np.testing.assert_array_equal(found[name], value)


def test_nothing_temporary_is_left(tmp_path):
    write_json(tmp_path / "a.json", {})
    write_npz(tmp_path / "b.npz", {})
    write_rounds(tmp_path, 1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.json", "b.npz", "metrics.jsonl"]
