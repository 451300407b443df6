"""Several seeds of one configuration, and runs beside each other."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil

import jax
import numpy as np
import pytest

from fedjax_rec import compare, metrics, run, seeds
from fedjax_rec.data import splits, synthetic
from fedjax_rec.run import RunConfig
from fedjax_rec.workdir import UsageError

CONFIG = RunConfig(
    settings={"dim": 4, "batch_size": 16}, rounds=4, eval_every=2, checkpoint_every=2, ks=(5, 10), max_buckets=1,
    devices=1, seed=3,
)  # fmt: skip


def data(**changes):
    made = synthetic.make(30, 70, min_history=5, median_history=8, max_history=20, **changes)
    return made.interactions, splits.leave_one_out(made.interactions), made.features


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """fcf over seeds 3, 4; fedmf over seeds 3, 4, 5; one run of fedmf alone."""
    home = tmp_path_factory.mktemp("seeds")
    seeds.train_seeds(dataclasses.replace(CONFIG, method="fcf"), home / "fcf", 2, data=data())
    seeds.train_seeds(CONFIG, home / "fedmf", 3, data=data())
    run.train(CONFIG, home / "single", data=data())
    return home


def test_every_seed_is_the_run_of_that_seed(folder):
    alone, among = (json.loads((folder / name / "summary.json").read_text()) for name in ("single", "fedmf/seed_3"))
    assert alone["test"] == among["test"] and alone["valid"] == among["valid"]
    assert sorted(path.name for path in (folder / "fedmf").glob("seed_*")) == ["seed_3", "seed_4", "seed_5"]


def test_seeds_compile_once(tmp_path, caplog):
    """All that is compiled when the second seed starts serves it."""
    starts, train = [], run.train

    def counted(*arguments, **options):
        starts.append(len(compiled()))
        return train(*arguments, **options)

    compiled = lambda: [said.getMessage() for said in caplog.records if said.getMessage().startswith("Compiling")]
    with pytest.MonkeyPatch.context() as patch, jax.log_compiles(), caplog.at_level(logging.WARNING):
        patch.setattr(run, "train", counted)
        seeds.train_seeds(CONFIG, tmp_path, 2, data=data())
    assert len(starts) == 2 and any("_client_round" in said for said in compiled()[: starts[1]])
    assert compiled()[starts[1] :] == []


def test_what_was_prepared_of_another_configuration_is_refused(tmp_path):
    ready = run.prepare(CONFIG, data())
    with pytest.raises(ValueError, match="ready was made of another configuration"):
        run.train(CONFIG, tmp_path, ready=ready.with_seed(CONFIG.seed + 1))
    assert not list(tmp_path.iterdir())


def test_more_rounds_lengthen_all_seeds_and_a_stop_leaves_none_as_it_was(folder, tmp_path, monkeypatch):
    shutil.copytree(folder / "fcf", tmp_path / "fcf")
    longer = dataclasses.replace(CONFIG, method="fcf", rounds=6)
    with pytest.raises(UsageError, match=r"seed_4 holds a run with another configuration .*rounds: 4 there, 6 given"):
        seeds.train_seeds(longer, tmp_path / "fcf", 1, data=data())
    train = run.train
    stopped = lambda config, *more, **named: (
        {"status": run.STOPPED, "rounds": 5} if config.seed == 4 else train(config, *more, **named)
    )
    monkeypatch.setattr(run, "train", stopped)
    said = seeds.train_seeds(longer, tmp_path / "fcf", 2, data=data())
    assert said["status"] == run.STOPPED and said["seeds"] == [3]
    monkeypatch.undo()
    said = seeds.train_seeds(longer, tmp_path / "fcf", 2, data=data())
    at_once = seeds.train_seeds(longer, tmp_path / "at_once", 2, data=data())
    assert said == at_once and said["seeds"] == [3, 4]
    with pytest.raises(UsageError, match="rounds: 6 there, 4 given"):
        seeds.train_seeds(dataclasses.replace(longer, rounds=4), tmp_path / "fcf", 2, data=data())


def test_a_lengthening_that_is_refused_changes_nothing(folder, tmp_path, monkeypatch):
    shutil.copytree(folder / "fcf", tmp_path / "fcf")
    longer = dataclasses.replace(CONFIG, method="fcf", rounds=6)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.json")}
    lengthened = run.lengthened

    def refusing(home, given):
        if given["seed"] == 4:
            raise UsageError("out of turn")
        return lengthened(home, given)

    monkeypatch.setattr(run, "lengthened", refusing)
    with pytest.raises(UsageError, match="out of turn"):
        seeds.train_seeds(longer, tmp_path / "fcf", 2, data=data())
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.json")} == before


def test_what_shorter_runs_said_outlives_longer_ones_that_diverge(folder, tmp_path, monkeypatch):
    shutil.copytree(folder / "fcf", tmp_path / "fcf")
    said = {seed: (tmp_path / "fcf" / f"seed_{seed}" / "summary.json").read_text() for seed in (3, 4)}

    def diverging(*more, **named):
        raise FloatingPointError("the loss is inf")

    monkeypatch.setattr(run, "train", diverging)
    longer = dataclasses.replace(CONFIG, method="fcf", rounds=6)
    told = seeds.train_seeds(longer, tmp_path / "fcf", 2, data=data())
    assert told["seeds"] == [] and set(told["failed"]) == {"3", "4"}
    assert json.loads((tmp_path / "fcf" / "seeds.json").read_text())["seeds"] == []  # not the means of before
    for seed, text in said.items():
        assert (tmp_path / "fcf" / f"seed_{seed}" / "summary_4.json").read_text() == text


def test_damaged_files_and_filters_spelt_out(folder, tmp_path):
    """A filter at its default is no other data; a damaged file is one line."""
    shutil.copytree(folder / "single", tmp_path / "single")
    path = tmp_path / "single" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"filters": {"min_user": 0}}))
    assert "single" in compare.compare([folder / "single", tmp_path / "single"])
    (tmp_path / "single" / "per_client.npz").write_bytes(b"PK")
    with pytest.raises(UsageError, match=r"single/per_client.npz: damaged"):
        compare.compare([folder / "single", tmp_path / "single"])


def test_mean_and_spread_are_those_of_the_summaries(folder):
    said = json.loads((folder / "fedmf" / "seeds.json").read_text())
    values = [
        json.loads((folder / "fedmf" / f"seed_{n}" / "summary.json").read_text())["test"]["MRR"] for n in (3, 4, 5)
    ]
    assert said["seeds"] == [3, 4, 5] and said["status"] == "done" and said["failed"] == {}
    assert said["test"]["MRR"]["values"] == values and len(set(values)) == 3
    assert said["test"]["MRR"]["mean"] == pytest.approx(np.mean(values))
    assert said["test"]["MRR"]["std"] == pytest.approx(np.std(values, ddof=1))
    assert f"{np.mean(values):.4f} ± {np.std(values, ddof=1):.4f}" in seeds.table(said)
    assert said["select_metric"] == "NDCG@10" and "Recall@5" not in seeds.table(said)
    assert "Recall@5" in seeds.table({**said, "select_metric": "Recall@5+MRR"})


def test_finished_seeds_are_not_run_again_and_a_missing_one_is(folder, tmp_path, monkeypatch):
    home = tmp_path / "again"
    shutil.copytree(folder / "fedmf", home)
    before = json.loads((home / "seeds.json").read_text())
    shutil.rmtree(home / "seed_4")
    asked, train = [], run.train

    def counted(config, *arguments, **options):
        asked.append(config.seed)
        return train(config, *arguments, **options)

    monkeypatch.setattr(run, "train", counted)
    assert seeds.train_seeds(CONFIG, home, 3, data=data())["test"]["MRR"] == before["test"]["MRR"]
    assert asked == [4]


def test_more_seeds_may_be_asked_for_and_fewer_are_summed_up(folder, tmp_path):
    home = tmp_path / "fewer"
    shutil.copytree(folder / "fedmf", home)
    assert seeds.train_seeds(CONFIG, home, 2, data=data())["seeds"] == [3, 4]


def test_another_configuration_is_refused(folder):
    with pytest.raises(UsageError, match=r"settings\.lr: 2\.0 there, 0\.5 given"):
        seeds.train_seeds(
            dataclasses.replace(CONFIG, settings={**CONFIG.settings, "lr": 0.5}), folder / "fedmf", 3, data=data()
        )


def test_a_folder_of_other_runs_is_refused_before_any_seed_is_run(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "train", None)
    with pytest.raises(UsageError, match=r"single holds a single run or a search .*use another --workdir"):
        seeds.train_seeds(CONFIG, folder / "single", 2, data=data())
    shutil.copytree(folder / "fcf" / "seed_3", tmp_path / "seed_3")
    with pytest.raises(UsageError, match=r"seed_3 holds .*method: 'fcf' there, 'fedmf' given"):
        seeds.train_seeds(dataclasses.replace(CONFIG, seed=7), tmp_path, 2, data=data())  # seed 3 is not asked for


def test_a_seed_that_diverges_is_named_and_the_others_are_kept(tmp_path, monkeypatch):
    train = run.train

    def some(config, *arguments, **options):
        if config.seed == 4:
            raise FloatingPointError("the loss is nan after round 1")
        return train(config, *arguments, **options)

    monkeypatch.setattr(run, "train", some)
    said = seeds.train_seeds(CONFIG, tmp_path, 3, data=data())
    assert said["seeds"] == [3, 5] and said["failed"] == {"4": "the loss is nan after round 1"}
    assert len(said["test"]["MRR"]["values"]) == 2


def test_a_stopped_seed_stops_the_rest(tmp_path, monkeypatch):
    asked = []

    def stopped(config, *arguments, **options):
        asked.append(config.seed)
        return {"status": run.STOPPED, "rounds": 1}

    monkeypatch.setattr(run, "train", stopped)
    said = seeds.train_seeds(CONFIG, tmp_path, 3, data=data())
    assert said["status"] == run.STOPPED and asked == [3] and said["seeds"] == []
    with pytest.raises(ValueError, match="seeds=0"):
        seeds.train_seeds(CONFIG, tmp_path, 0)


# ---- comparison ----------------------------------------------------------------------------------------------


def test_differences_are_paired_by_client_over_seed_means(folder):
    said = compare.compare([folder / "fcf", folder / "fedmf"], ["NDCG@10"])
    row = next(line for line in said.splitlines() if "(fedmf)" in line)
    held = {
        name: [np.load(path / "per_client.npz")["NDCG@10"] for path in sorted((folder / name).glob("seed_*"))]
        for name in ("fcf", "fedmf")
    }
    mean, low, high = metrics.paired_difference(np.stack(held["fedmf"]), np.stack(held["fcf"]))
    assert f"{mean:+.4f} [{low:+.4f}, {high:+.4f}]" in row and " 3 " in row
    assert mean == pytest.approx(np.mean(held["fedmf"]) - np.mean(held["fcf"]))
    assert "[" not in next(line for line in said.splitlines() if "(fcf)" in line)


def test_single_runs_and_seed_folders_mix(folder, capsys):
    assert compare.main([str(folder / "fedmf"), str(folder / "single"), str(folder / "fcf")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].split()[:5] == ["seeds", "HR@5", "NDCG@5", "HR@10", "NDCG@10"]
    assert sum("fedmf)" in line or "fcf)" in line for line in lines) == 3
    alone = compare.compare([folder / "single", folder / "single"], ["MRR"])
    against_itself = alone.splitlines()[-1]
    assert "±" not in alone.split("interval", 1)[1]  # one seed has no spread
    assert "+0.0000 [+0.0000, +0.0000]" in against_itself


def test_what_cannot_be_compared_is_refused(folder, tmp_path, capsys):
    other = tmp_path / "other"
    run.train(CONFIG, other, data=data(seed=1))
    assert compare.main([str(folder / "single"), str(other)]) == 2
    assert "their users or test items differ" in capsys.readouterr().err
    sampled = tmp_path / "sampled"
    run.train(dataclasses.replace(CONFIG, ranking="sampled_99"), sampled, data=data())
    with pytest.raises(UsageError, match="ranking is 'sampled_99' there and 'full' here"):
        compare.compare([folder / "single", sampled])
    with pytest.raises(UsageError, match="1 workdirs given, expected two or more"):
        compare.compare([folder / "single"])
    with pytest.raises(UsageError, match="holds no finished run"):
        compare.compare([folder / "single", tmp_path])
    with pytest.raises(ValueError, match=r"metric='NDCG@7'.*did you mean NDCG@"):
        compare.compare([folder / "single", folder / "fcf"], ["NDCG@7"])


def change_config(folder, **values):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


def test_runs_of_several_configurations_are_not_averaged(folder, tmp_path, capsys):
    home = tmp_path / "mixed"
    shutil.copytree(folder / "fedmf", home)
    change_config(home / "seed_4", devices=2, block_sizes=[7], max_buckets=3, data_dir="/elsewhere", checkpoint_every=9)
    assert len(compare.read_runs(home).folders) == 3  # none of these is another experiment
    settings = json.loads((home / "seed_4" / "config.json").read_text())["settings"]
    change_config(home / "seed_4", protocol="published", settings=settings | {"lr": 9.0}, eval_clients=7)
    said = (
        "eval_clients: 0 seed_3, 7 seed_4; protocol: 'honest' seed_3, 'published' seed_4; settings.lr: 2.0 seed_3, 9.0"
    )
    with pytest.raises(UsageError, match="seed_3 and seed_4 are not seeds of one") as refused:
        compare.read_runs(home)
    assert said in str(refused.value)
    beside = tmp_path / "beside"
    shutil.copytree(folder / "single", beside)
    shutil.copytree(folder / "fcf" / "seed_3", beside / "seed_3")
    assert compare.main([str(beside), str(folder / "fcf")]) == 2
    error = capsys.readouterr().err
    assert f"{beside} holds a run and beside it seed_3; expected one run or" in error and error.count("\n") == 1


def test_seeds_are_judged_on_the_same_clients(tmp_path):
    """The clients of --eval_clients do not depend on the seed; those of fewer are among those of more."""
    users = []
    for seed, count in ((0, 5), (1, 5), (2, 7)):
        config = dataclasses.replace(CONFIG, seed=seed, eval_clients=count, rounds=1)
        run.train(config, tmp_path / str(seed), data=data())
        users.append(set(np.flatnonzero(np.isfinite(np.load(tmp_path / str(seed) / "per_client.npz")["MRR"]))))
    assert len(users[0]) == 5 and users[0] == users[1] and users[0] < users[2]
    assert "nan" not in compare.compare([tmp_path / "0", tmp_path / "1", tmp_path / "2"], ["MRR"])


def test_runs_judged_on_different_clients_are_refused(folder, tmp_path):
    for name, chosen in (("some", range(10)), ("others", range(10, 30))):
        home = tmp_path / name
        shutil.copytree(folder / "single", home)
        held = dict(np.load(home / "per_client.npz"))
        for column in held:
            if column == "test_rank" or column == "MRR" or "@" in column:
                held[column][np.setdiff1d(np.arange(30), chosen)] = np.nan
        np.savez(home / "per_client.npz", **held)
    assert "nan" not in compare.compare([folder / "single", tmp_path / "some"], ["MRR"])
    with pytest.raises(UsageError, match=r"others cannot be compared .*no evaluated client in common"):
        compare.compare([folder / "single", tmp_path / "some", tmp_path / "others"], ["MRR"])


# ---- kept results --------------------------------------------------------------------------------------------


def test_kept_results_tell_what_the_runs_tell(folder, tmp_path):
    runs = compare.read_runs(folder / "fcf")
    path = tmp_path / "some" / "fcf.npz"
    compare.keep(runs, path, ["--method=fcf"])
    kept = compare.read_kept(path, ["--method=fcf"])
    assert kept.metrics == compare.shown("leave_one_out", [5, 10]) == ["HR@5", "NDCG@5", "HR@10", "NDCG@10"]
    for name in kept.metrics:
        np.testing.assert_allclose(kept.by_client(name), runs.by_client(name), rtol=1e-6)
    for said, of in zip(kept.summaries, runs.summaries, strict=True):
        assert said["test"] == of["test"] and said["best_round"] == of["best_round"]
    assert kept.summaries[0]["reference_rankers"] == runs.summaries[0]["reference_rankers"]
    beside, apart = (
        [line.split()[1:] for line in compare.compare([first, folder / "fedmf"]).splitlines()]
        for first in (path, folder / "fcf")
    )
    assert beside == apart and len(beside) == 6
    with pytest.raises(ValueError, match="metric='MRR'"):
        compare.compare([path, folder / "fedmf"], ["MRR"])
    again = tmp_path / "again.npz"
    compare.keep(runs, again, ["--method=fcf"])
    assert again.read_bytes() == path.read_bytes()


def test_nothing_kept_names_a_user_or_an_item(folder, tmp_path):
    compare.keep(compare.read_runs(folder / "fcf"), tmp_path / "fcf.npz", [])
    with np.load(tmp_path / "fcf.npz") as held:
        assert {held[name].dtype.kind for name in held.files} == {"f", "u"}
        text = held["said"].tobytes().decode()
    interactions = data()[0]
    ids = [*interactions.user_ids.astype(str), *interactions.item_ids.astype(str)]
    assert not any(f'"{id_}"' in text for id_ in ids)


def test_seeds_that_are_kept_already_stay(folder, tmp_path):
    path, few = tmp_path / "fedmf.npz", tmp_path / "few"
    for seed in (4, 5):
        shutil.copytree(folder / "fedmf" / f"seed_{seed}", few / f"seed_{seed}")
    compare.keep(compare.read_runs(few), path, ["--method=fedmf"])
    shutil.rmtree(few / "seed_5")
    shutil.copytree(folder / "fedmf" / "seed_3", few / "seed_3")
    compare.keep(compare.read_runs(few), path, ["--method=fedmf"])
    kept, runs = compare.read_kept(path), compare.read_runs(folder / "fedmf")
    assert [config["seed"] for config in kept.configs] == [3, 4, 5]
    assert [said["test"] for said in kept.summaries] == [said["test"] for said in runs.summaries]
    np.testing.assert_allclose(kept.by_client("NDCG@10"), runs.by_client("NDCG@10"), rtol=1e-6)


def test_kept_results_of_other_flags_or_data_are_refused(folder, tmp_path):
    path, runs = tmp_path / "fcf.npz", compare.read_runs(folder / "fcf")
    compare.keep(runs, path, ["--method=fcf", "--rounds=4"])
    with pytest.raises(UsageError, match=r"with other flags \(--rounds=4, --rounds=5\)"):
        compare.read_kept(path, ["--method=fcf", "--rounds=5"])
    with pytest.raises(UsageError, match="with other flags"):
        compare.keep(runs, path, ["--method=fcf", "--rounds=5"])
    other = tmp_path / "other"
    run.train(dataclasses.replace(CONFIG, rounds=2), other, data=data(seed=1))
    with pytest.raises(UsageError, match="their users or test items differ"):
        compare.compare([path, other])
    with pytest.raises(UsageError, match=r"with another configuration .*data_hash"):
        compare.keep(compare.read_runs(other), path, ["--method=fcf", "--rounds=4"])
    assert len(compare.read_kept(path).configs) == 2
    np.savez(tmp_path / "foreign.npz", values=np.zeros(3))
    with pytest.raises(UsageError, match=r"foreign\.npz: holds no kept results"):
        compare.read_kept(tmp_path / "foreign.npz")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UsageError, match=r"fcf\.npz: expected a workdir, or a file of"):
        compare.compare([path, folder / "fcf"])


@pytest.mark.parametrize("said", ["[]", "{}", '{"asked": [], "configs": [], "summaries": []}'])
def test_foreign_files_are_no_kept_results(tmp_path, said):
    np.savez(tmp_path / "foreign.npz", said=np.frombuffer(said.encode(), np.uint8))
    with pytest.raises(UsageError, match="holds no kept results"):
        compare.read_runs(tmp_path / "foreign.npz")


def test_seeds_of_another_configuration_do_not_join(folder, tmp_path):
    path, other = tmp_path / "fedmf.npz", tmp_path / "other"
    compare.keep(compare.read_runs(folder / "fedmf"), path, [])
    shutil.copytree(folder / "fedmf" / "seed_5", other / "seed_6")
    config = json.loads((other / "seed_6" / "config.json").read_text())
    change_config(other / "seed_6", seed=6, max_buckets=3)
    compare.keep(compare.read_runs(other), path, [])
    assert [config["seed"] for config in compare.read_kept(path).configs] == [3, 4, 5, 6]
    for change, differs in (({"settings": config["settings"] | {"lr": 9.0}}, "lr"), ({"data_hash": "x"}, "data_hash")):
        change_config(other / "seed_6", **{**config, "max_buckets": 3, "seed": 7, **change})
        with pytest.raises(UsageError, match=rf"of runs with another configuration .*{differs}"):
            compare.keep(compare.read_runs(other), path, [])


def test_cut_offs_are_those_that_all_kept_seeds_have(folder, tmp_path):
    path, few = tmp_path / "fedmf.npz", tmp_path / "few"
    runs = compare.read_runs(folder / "fedmf")
    with_ks = lambda ks, runs: dataclasses.replace(runs, configs=[{**config, "ks": ks} for config in runs.configs])
    compare.keep(with_ks([5], runs), path, [])
    compare.keep(runs, path, [])  # all of its seeds again: nothing of the old stays
    assert compare.cut_offs([compare.read_kept(path)]) == [5, 10]
    shutil.copytree(folder / "fedmf" / "seed_4", few / "seed_4")
    compare.keep(with_ks([10], compare.read_runs(few)), path, [])
    assert compare.cut_offs([compare.read_kept(path)]) == [10]
    assert compare.read_kept(path).metrics == ["HR@10", "NDCG@10"]
    with pytest.raises(UsageError, match=r"has the cut-offs \[10\], none of which"):
        compare.keep(with_ks([5], compare.read_runs(few)), path, [])


def test_rankers_are_those_of_the_first_seed(folder, tmp_path):
    path, few = tmp_path / "fedmf.npz", tmp_path / "few"
    shutil.copytree(folder / "fedmf" / "seed_5", few / "seed_5")
    compare.keep(compare.read_runs(few), path, [])
    shutil.copytree(folder / "fedmf" / "seed_3", few / "seed_3")
    shutil.rmtree(few / "seed_5")
    compare.keep(compare.read_runs(few), path, [])
    shutil.copytree(folder / "fedmf" / "seed_4", few / "seed_4")
    shutil.rmtree(few / "seed_3")
    compare.keep(compare.read_runs(few), path, [])
    summaries = compare.read_kept(path).summaries
    rankers = json.loads((folder / "fedmf" / "seed_3" / "summary.json").read_text())["reference_rankers"]
    assert summaries[0]["reference_rankers"] == rankers
    assert not any("reference_rankers" in said for said in summaries[1:])
