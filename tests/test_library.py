"""Use as a library: a trained run recommends what the evaluation ranked, exports what it holds, and takes in a user."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import fedjax_rec as fr
from fedjax_rec import run as run_module
from fedjax_rec.data import synthetic
from fedjax_rec.data.features import Features, load_npz
from fedjax_rec.workdir import UsageError

ROOT = Path(__file__).resolve().parents[1]
# post_aggregate and post_local, with and without own tables; fast vectors over a slow table, so that tastes show
CASES = {
    "fedmf": {},
    "pfedrec": {"lr": 4.0, "item_lr_scale": 0.1, "server_lr": 2.0},
    "fedrap": {},
}
ROUNDS = 40
TOP = 20


@pytest.fixture(scope="module")
def feedback() -> fr.Interactions:
    """200 users whose raw ids are text, and items with numbers far from their indices."""
    made = synthetic.make(200, 150, min_history=8, median_history=14, max_history=40).interactions
    frame = pd.DataFrame({"user": [f"u{u}" for u in made.user], "item": made.item + 1000, "timestamp": made.time})
    return fr.from_frame(frame, "tiny")


@pytest.fixture(scope="module")
def split(feedback):
    return fr.leave_one_out(feedback)


@pytest.fixture(scope="module", params=CASES)
def case(request, feedback, split, tmp_path_factory):
    """(run that was trained on 2 devices, its workdir)."""
    folder = tmp_path_factory.mktemp(request.param)
    settings = {"dim": 8, "batch_size": 64, **CASES[request.param]}
    config = fr.RunConfig(
        method=request.param, settings=settings, rounds=ROUNDS, eval_every=20, max_buckets=2, devices=2
    )
    return fr.fit(config, feedback, split, workdir=folder), folder


def test_what_a_notebook_shows_is_a_line(case, split):
    engine = case[0].experiment.engine
    assert repr(split).startswith("Split(leave_one_out, 200 users, 150 items, pairs: train ")
    assert repr(engine).startswith(f"Engine({engine.method.name}: 200 clients, 150 items, ") and len(repr(engine)) < 100


def test_the_full_list_is_the_evaluations_ranking(case, feedback, split):
    run, _ = case
    ranks = run.experiment.evaluator.ranks(run.experiment.key, run.state, run.round).test[:, 0]
    places = []
    for u, user in enumerate(feedback.user_ids):
        target = feedback.item_ids[split.test.item[split.test.user == u][0]]
        places.append(1 + run.recommend(user, split.num_items).items.tolist().index(target))
    # one client alone may differ from a block of them in the last bit of a score: a near tie may turn
    assert (np.abs(places - ranks) <= 1).all()
    assert (places == ranks).mean() > 0.98


def test_the_summary_is_that_of_the_model(case, feedback, split):
    """The last round is evaluated by run.train, on two devices: recommend must reproduce its test metrics."""
    run, folder = case
    said = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    hits = [
        feedback.item_ids[split.test.item[split.test.user == u][0]] in run.recommend(user, 10).items
        for u, user in enumerate(feedback.user_ids)
    ]
    assert said["round"] == run.round == ROUNDS
    assert np.mean(hits) == pytest.approx(said["test"]["HR@10"], abs=1.5 / split.num_users)


def test_loaded_from_the_workdir_it_says_the_same(case, feedback, split):
    run, folder = case
    loaded = fr.load_run(folder, feedback, split)
    assert loaded.round == run.round and loaded.summary["test"] == run.summary["test"]
    for user in feedback.user_ids[:3]:
        np.testing.assert_array_equal(loaded.scores(user), run.scores(user))


def test_seen_items_are_left_out_unless_asked_for(case, feedback, split):
    run, _ = case
    held = np.concatenate([split.train.item[split.train.user == 0], split.valid.item[split.valid.user == 0]])
    seen, user = set(feedback.item_ids[held].tolist()), feedback.user_ids[0]
    items, scores = run.recommend(user, split.num_items)
    assert not seen & set(items.tolist()) and len(items) == split.num_items - len(seen)
    assert (np.diff(scores) <= 0).all()
    everything = run.recommend(user, split.num_items, exclude_seen=False)
    assert sorted(everything.items.tolist()) == sorted(feedback.item_ids.tolist())
    assert len(run.recommend(user, 3).items) == 3


def test_embeddings_explain_the_scores(case, feedback, tmp_path):
    """Where nothing is trained between download and score, vectors and tables give the scores back."""
    run, _ = case
    run.export_embeddings(tmp_path / "vectors.npz")
    held = np.load(tmp_path / "vectors.npz")
    assert held["item_ids"].tolist() == feedback.item_ids.tolist()
    assert held["user_ids"].tolist() == feedback.user_ids.tolist()
    assert held["items/item"].shape == (150, 8)
    assert all(held[name].shape[0] == 200 for name in held.files if name.startswith("users/"))
    u = 7
    if run.config.method == "fedmf":
        scores = held["items/item"] @ held["users/user/vector"][u] + held["users/user/bias"][u]
        np.testing.assert_allclose(scores, run.scores(feedback.user_ids[u]), rtol=1e-4, atol=1e-5)
    if run.config.method == "fedrap":
        assert "own_item" not in run.embeddings().users
        own = run.embeddings(client_tables=True).users["own_item"]
        vectors = held["items/item"] + own[u]
        scores = vectors @ held["users/head/weight"][u] + held["users/head/bias"][u]
        np.testing.assert_allclose(scores, run.scores(feedback.user_ids[u]), rtol=1e-4, atol=1e-5)


def overlap(a, b) -> float:
    """Share of two top lists that is common; seen items stay in, since both users have the same."""
    best = [set(x.tolist()) for x in (a, b)]
    return len(best[0] & best[1]) / TOP


def test_a_folded_in_copy_is_served_like_the_user_it_copies(case, feedback, split):
    run, _ = case
    before = [np.array(x) for x in run.embeddings().users.values()]
    top = lambda user: run.recommend(user, TOP, exclude_seen=False).items
    own, others = [], []
    for u in range(0, 200, 20):
        items = feedback.item_ids[split.train.item[split.train.user == u]]
        copy = run.fold_in(items).recommend(TOP, exclude_seen=False).items
        own.append(overlap(copy, top(feedback.user_ids[u])))
        others.append(np.mean([overlap(copy, top(feedback.user_ids[(u + step) % 200])) for step in (3, 57, 111)]))
    assert np.mean(np.array(own) > np.array(others)) >= 0.9
    assert np.mean(own) > np.mean(others) + 0.2
    for held, now in zip(before, run.embeddings().users.values(), strict=True):
        np.testing.assert_array_equal(held, now)  # the run is not touched


def test_folding_in_learns_and_repeats(case, feedback):
    run, _ = case
    items = feedback.item_ids[[3, 14, 15, 92, 65]]
    new = run.fold_in(items, rounds=30)
    assert new.losses.shape == (30,) and new.losses[-1] < new.losses[0]
    assert not set(items.tolist()) & set(new.recommend(150).items.tolist())
    # order and repetition of the items say nothing, and nothing is random between two calls
    again = run.fold_in([*reversed(items.tolist()), items[0]], rounds=30)
    np.testing.assert_array_equal(again.scores(), new.scores())
    # the more items, the wider the padding: beyond the widest bucket too
    assert len(run.fold_in(feedback.item_ids[:60], rounds=2).recommend(150).items) == 90


def test_unknown_ids_are_named_with_what_ids_look_like(case, feedback):
    run, _ = case
    with pytest.raises(
        UsageError, match=r"user 'u99999' is not in the data: expected one of its 200 user ids, like 'u"
    ):
        run.recommend("u99999")
    with pytest.raises(UsageError, match=r"user 5 is not in the data"):
        run.recommend(5)
    with pytest.raises(UsageError, match=r"item 7 is not in the data: expected one of its 150 item ids, like 1\d\d\d"):
        run.fold_in([feedback.item_ids[0], 7])
    with pytest.raises(UsageError, match=r"items '1001': expected a list of item ids, like \['1001'\]"):
        run.fold_in("1001")
    with pytest.raises(UsageError, match="no item given"):
        run.fold_in([])
    with pytest.raises(ValueError, match="k=0"):
        run.recommend(feedback.user_ids[0], 0)
    with pytest.raises(ValueError, match="rounds=-1"):
        run.fold_in(feedback.item_ids[:2], rounds=-1)


def test_other_data_are_refused(case, feedback):
    _, folder = case
    with pytest.raises(UsageError, match=r"its data cannot be read again.*unknown data set 'tiny'"):
        fr.load_run(folder)
    with pytest.raises(UsageError, match="not those the run was trained on"):
        fr.load_run(folder, feedback, fr.cold_items(feedback, seed=1))


def test_a_workdir_is_not_gone_on_with_other_pairs_of_the_same_users(case, feedback, split):
    """Nothing else tells: name, counts and test items are the same."""
    _, folder = case
    train = split.train._replace(item=split.train.item.copy())
    user = np.flatnonzero(split.train.user == 0)
    absent = np.setdiff1d(np.arange(split.num_items), feedback.item[feedback.user == 0])
    train.item[user] = np.sort(absent[: len(user)])
    other = dataclasses.replace(split, train=train)
    with pytest.raises(UsageError, match="data_hash"):
        fr.fit(run_module.config_of(folder), feedback, other, workdir=folder)
    with pytest.raises(UsageError, match="not those the run was trained on"):
        fr.load_run(folder, feedback, other)


def test_data_that_do_not_belong_together_are_refused(feedback, split):
    config, items = fr.RunConfig(method="fedvlr", rounds=1), split.num_items
    part = fr.from_frame(pd.DataFrame({"user": ["a"] * 4, "item": [1, 2, 3, 4]}), "part")
    with pytest.raises(UsageError, match="the split has 1 users and 4 items, expected the 200 and 150"):
        fr.fit(config, feedback, fr.leave_one_out(part))
    with pytest.raises(UsageError, match="features named image: found ndarray, expected Features"):
        fr.train(config, data=(feedback, split, {"image": np.ones((items, 3))}))
    for values in (np.ones((items - 1, 3)), np.full((items, 3), np.nan)):
        with pytest.raises(UsageError, match=rf"image: values of shape .*, expected finite numbers \[{items}, feat\]"):
            fr.fit(config, feedback, split, {"image": Features(values, np.ones(len(values), bool), "made")})


def test_no_run_and_no_checkpoint_are_said(tmp_path):
    with pytest.raises(UsageError, match=r"config\.json does not exist"):
        fr.load_run(tmp_path / "nowhere")
    config = fr.RunConfig(devices=1)
    run_module.claim(tmp_path, dataclasses.asdict(config))
    with pytest.raises(UsageError, match="holds no checkpoint"):
        fr.load_run(tmp_path)
    assert not (tmp_path / "checkpoints").exists()


def test_named_data_are_read_again(tmp_path):
    """A run of the embedded data set needs nothing but its workdir."""
    config = fr.RunConfig(settings={"dim": 4}, rounds=2, eval_every=2, max_buckets=1)
    run = fr.fit(config, fr.load("synthetic"), workdir=tmp_path)
    loaded = fr.load_run(tmp_path)
    user = run.experiment.interactions.user_ids[11]
    np.testing.assert_array_equal(loaded.scores(user), run.scores(user))
    assert loaded.config.dataset == "synthetic"


def test_features_of_a_file_belong_to_the_run(tmp_path):
    """They are read again, may be given where the file has moved, and others are refused."""
    feedback = fr.load("synthetic")
    rng, path = np.random.default_rng(0), tmp_path / "made.npz"
    np.savez(path, values=rng.standard_normal((len(feedback.item_ids), 6)), raw_ids=feedback.item_ids)
    given = {"made": str(path)}
    config = fr.RunConfig(settings={"dim": 4}, features=given, rounds=2, eval_every=2, max_buckets=1)
    run = fr.fit(config, feedback, features=synthetic.make().features, workdir=tmp_path / "run")
    assert set(run.experiment.features) == {"image", "text", "made"}
    user = feedback.user_ids[0]
    np.testing.assert_array_equal(fr.load_run(tmp_path / "run").scores(user), run.scores(user))
    moved = path.rename(tmp_path / "moved.npz")
    with pytest.raises(UsageError, match=r"made\.npz"):
        fr.load_run(tmp_path / "run")
    made = {"made": load_npz(moved, feedback.item_ids)}
    np.testing.assert_array_equal(fr.load_run(tmp_path / "run", features=made).scores(user), run.scores(user))
    made["made"].values[3] += 1.0
    with pytest.raises(UsageError, match="features named made are not those"):
        fr.load_run(tmp_path / "run", features=made)


def test_features_stand_in_for_the_data_sets_own_and_are_part_of_the_run(tmp_path):
    feedback = fr.load("synthetic")
    made = {"text": dataclasses.replace(synthetic.make().features["text"], source="made")}
    made["text"].values[:] = np.random.default_rng(0).standard_normal(made["text"].values.shape)
    settings = {"dim": 4, "id_dim": 4, "backbone": "fedncf"}
    config = fr.RunConfig(method="mlp_fusion", settings=settings, rounds=2, eval_every=2, max_buckets=1)
    run = fr.fit(config, features=made, workdir=tmp_path)
    np.testing.assert_array_equal(run.experiment.features["text"].values, made["text"].values)
    assert set(run.experiment.features) == {"image", "text"}
    with pytest.raises(UsageError, match="the item features are not those"):
        fr.load_run(tmp_path)
    with pytest.raises(UsageError, match="content_hash"):
        fr.fit(dataclasses.replace(config, rounds=4), workdir=tmp_path)
    user = feedback.user_ids[0]
    np.testing.assert_array_equal(fr.load_run(tmp_path, features=made).scores(user), run.scores(user))
    split = fr.leave_one_out(feedback)
    for alone in (lambda: fr.fit(config, split=split), lambda: fr.load_run(tmp_path, split=split)):
        with pytest.raises(UsageError, match="a split without its interactions"):
            alone()


def test_user_vectors_of_server_trained_models_are_exported():
    config = fr.RunConfig(method="mf", settings={"dim": 4}, rounds=2, eval_every=2, max_buckets=1)
    run = fr.fit(config)
    user = run.experiment.interactions.user_ids[5]
    said = run.embeddings()
    (vectors,) = said.users.values()
    np.testing.assert_allclose(said.items["item"] @ vectors[5], run.scores(user), rtol=1e-4, atol=1e-5)
    with pytest.raises(UsageError, match=r"user \['a'\] is not in the data"):
        run.recommend(["a"])
    with pytest.raises(UsageError, match="items 5: expected a list"):
        run.fold_in(5)
    with pytest.raises(UsageError, match="the server trains the users' vectors of mf"):
        run.fold_in(run.experiment.interactions.item_ids[:3])


def test_cold_items_recommends_test_items_only(feedback):
    split = fr.cold_items(feedback, seed=1)
    config = fr.RunConfig(settings={"dim": 4}, rounds=2, eval_every=2, max_buckets=1)
    run = fr.fit(config, feedback, split)
    assert (run.config.ks, run.config.select_metric) == ((20, 50, 100), "Recall@20+Recall@50+Recall@100")
    allowed = set(feedback.item_ids[split.candidates["test"]].tolist())
    taken = feedback.item_ids[split.train.item[:3]]
    assert set(run.recommend(feedback.user_ids[0], 150).items.tolist()) == allowed
    assert set(run.fold_in(taken).recommend(150).items.tolist()) == allowed - set(taken.tolist())


def test_the_short_names_are_those_of_the_modules():
    for name in fr.__all__:
        assert getattr(fr, name) is not None
    assert set(fr.__all__) <= set(dir(fr))
    with pytest.raises(AttributeError, match="'trian'"):
        _ = fr.trian


def test_importing_leaves_the_devices_to_the_program():
    """Every short name is loaded, then the number of devices is chosen: JAX must not have been initialised."""
    program = (
        "import sys, fedjax_rec, jax\n"
        "for name in fedjax_rec.__all__: getattr(fedjax_rec, name)\n"
        "jax.config.update('jax_num_cpu_devices', 3)\n"
        "print(len(jax.devices()), [n for n in ('torch', 'transformers', 'pooch', 'matplotlib') if n in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "3 []"
