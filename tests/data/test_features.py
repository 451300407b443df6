"""Item features: joining by raw id, imputation, error messages, and the real files."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from fedjax_rec.data.features import FEATURES, Features, align, load_features, load_npz
from fedjax_rec.data.interactions import DataError, Interactions


def _catalogue(item_ids) -> Interactions:
    """Interactions whose only content is the item index: all that features look at."""
    item_ids = np.asarray(item_ids)
    rows = np.arange(len(item_ids), dtype=np.int32)
    return Interactions("test", rows * 0, rows, rows, None, np.zeros(1, int), item_ids, {})


def _shuffled(ids) -> np.ndarray:
    return np.random.default_rng(3).permutation(ids)


def _load(folder, item_ids) -> dict[str, Features]:
    return load_features(folder.name, folder.parent, _catalogue(item_ids))


def _movies(path, separator) -> pd.DataFrame:
    lines = path.read_bytes().decode("latin-1").rstrip("\n").split("\n")
    fields = [line.split(separator) for line in lines]
    return pd.DataFrame({"id": [int(f[0]) for f in fields], "title": [f[1] for f in fields], "rest": fields})


def _nearest(features: Features, names, name: str, count: int) -> list[str]:
    """The names of the items most similar to the first item whose name starts with `name`."""
    query = next(i for i, other in enumerate(names) if other.startswith(name))
    similarity = features.values @ features.values[query]
    similarity[query] = -np.inf
    return [names[i] for i in np.argsort(-similarity)[:count]]


# --- align -------------------------------------------------------------------------------------------------


def test_rows_follow_the_raw_ids():
    values = np.arange(8, dtype=np.float16).reshape(4, 2)
    features = align(values, [10, 20, 30, 40], np.array([40, 10, 30]), source="f.npy")
    np.testing.assert_array_equal(features.values, [[6, 7], [0, 1], [4, 5]])
    assert features.values.dtype == np.float32
    assert features.present.dtype == bool
    assert features.present.all()
    assert features.num_missing == 0


@pytest.mark.parametrize("raw_ids", [[1, 2], ["1", "2"], [1.0, 2.0], np.array(["1", 2], dtype=object)])
@pytest.mark.parametrize("item_ids", [[2, 1], ["2", "1"], np.array([2, "1"], dtype=object)])
def test_ids_may_be_typed_differently(raw_ids, item_ids):
    features = align(np.array([[1.0], [2.0]]), raw_ids, item_ids, source="f.npy")
    np.testing.assert_array_equal(features.values, [[2], [1]])


def test_missing_rows_are_the_mean_of_the_present_items():
    # Row "unused" belongs to no item and must not move the mean; row "c" is there but marked as absent.
    values = np.array([[1.0, 2.0], [3.0, 6.0], [np.nan, 9.0], [100.0, 100.0]])
    features = align(
        values,
        ["a", "b", "c", "unused"],
        ["c", "a", "never seen", "b"],
        source="f.npy",
        present=np.array([1, 1, 0, 1]),
    )
    np.testing.assert_array_equal(features.values, [[2, 4], [1, 2], [2, 4], [3, 6]])
    np.testing.assert_array_equal(features.present, [False, True, False, True])
    assert features.num_missing == 2
    assert features.source == "f.npy: by raw item id, 2 of 4 items, 2 filled with the mean"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"values": np.ones((3, 2))},
            r"f\.npy: 3 feature rows but raw item ids of shape \[2\]; expected one",
        ),
        ({"present": np.ones(5)}, r"f\.npy: 2 feature rows but presence flags of shape \[5\]; expected one"),
        ({"raw_ids": ["a", "a"]}, r"f\.npy: raw item id 'a' stands 2 times; expected distinct"),
        (
            {"values": np.array([[0.0], [np.inf]])},
            r"1 rows are not finite, the first is row 1 \(raw item id 'b'\)",
        ),
        ({"item_ids": ["x", "y"]}, r"none of the 2 items has a feature row; .*\['x'\], the file has \['a'\]"),
        ({"present": np.zeros(2)}, r"none of the 2 items has a feature row"),
        ({"values": np.ones(2)}, r"features are float64 \[2\]; expected numbers \[rows, feat\]"),
        ({"values": np.array([["1"], ["2"]])}, r"features are <U1 \[2, 1\]; expected numbers"),
    ],
)
def test_align_errors(change, message):
    arguments = {"values": np.ones((2, 1)), "raw_ids": ["a", "b"], "item_ids": ["a", "b"], **change}
    with pytest.raises(DataError, match=message) as error:
        align(**arguments, source="f.npy")
    assert "\n" not in str(error.value)


# --- files -------------------------------------------------------------------------------------------------


def test_npz_of_an_encoder(tmp_path):
    path = tmp_path / "clip.npz"
    values = np.array([[1.0], [3.0], [0.0]], np.float16)
    present = np.array([True, True, False])
    np.savez(path, values=values, raw_ids=[5, 6, 7], present=present, model="ViT-B-32", weights_hash="ab12")
    features = load_npz(path, ["7", "6", "5"])
    np.testing.assert_array_equal(features.values, [[2], [3], [1]])
    assert "clip.npz (ViT-B-32 ab12): by raw item id, 2 of 3 items" in features.source


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: None, "No such file"),
        (lambda path: path.write_bytes(b"not a zip"), "not a readable feature file"),
        (lambda path: path.write_bytes(b"PK\x03\x04 cut off"), "not a readable feature file"),
        (lambda path: path.write_bytes(b""), "not a readable feature file"),
        (lambda path: np.savez(path, values=np.ones((1, 1))), r"no key 'raw_ids' among \['values'\]"),
        (
            lambda path: np.savez(path, values=np.ones((1, 1)), raw_ids=np.array([{}], dtype=object)),
            "without pickled objects",
        ),
        (lambda path: np.savez(path, values=np.ones((2, 1)), raw_ids=[1]), "2 feature rows but raw item ids"),
    ],
)
def test_npz_errors(tmp_path, write, message):
    path = tmp_path / "features.npz"
    write(path)
    with pytest.raises(DataError, match=message) as error:
        load_npz(path, [1])
    assert "features.npz" in str(error.value)
    assert "\n" not in str(error.value)


def _ml_100k(folder, ids: str = "1|A\n2|B\n", rows: int = 2):
    folder.mkdir()
    (folder / "u.item").write_text(ids, encoding="latin-1")
    np.save(folder / "text_features_minilm.npy", np.eye(rows, dtype=np.float16))
    return folder


def test_absent_features_are_left_out(tmp_path):
    assert load_features("filmtrust", tmp_path, _catalogue([1])) == {}
    assert load_features("ml-100k", tmp_path, _catalogue([1])) == {}
    assert set(_load(_ml_100k(tmp_path / "ml-100k"), [2, 1])) == {"text"}


def test_feature_rows_must_match_the_item_file(tmp_path):
    with pytest.raises(DataError, match=r"text_features_minilm\.npy: 3 feature rows but raw item ids"):
        _load(_ml_100k(tmp_path / "ml-100k", rows=3), [1])


def test_features_without_their_id_file(tmp_path):
    folder = _ml_100k(tmp_path / "ml-100k")
    (folder / "u.item").unlink()
    with pytest.raises(DataError, match=r"ml-100k/u\.item is missing; expected it to name the feature rows"):
        _load(folder, [1])


def test_unreadable_id_and_feature_files(tmp_path):
    folder = _ml_100k(tmp_path / "ml-100k", ids="1|A\nmovie|B\n")
    with pytest.raises(DataError, match=r"u\.item: item ids cannot be read .*'movie'"):
        _load(folder, [1])
    (folder / "text_features_minilm.npy").write_bytes(b"\x93NUMPY")
    with pytest.raises(DataError, match=r"text_features_minilm\.npy: not a readable array"):
        _load(folder, [1])


# --- real data ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "items", "widths"),
    [
        ("ku", 560, {"image": 512, "text": 512}),
        ("ml-100k", 1682, {"text": 384}),
        ("ml-latest-small", 9742, {"image": 256, "text": 384}),
        ("ml-1m", 3883, {"image": 256, "text": 384}),
        ("citeulike-a", 16980, {"text": 384}),
        ("amazon-beauty", 356, {"text": 384}),
    ],
)
def test_a_real_row_is_the_row_of_its_raw_id(real_data, name, items, widths):
    folder = real_data(name)
    if name == "ml-latest-small":
        real_data("ml-1m")
    file = FEATURES[name]["text"]
    raw_ids = file.read_ids(folder.parent / file.ids)
    assert len(raw_ids) == items
    # A subset in another order, and one item that the files do not know.
    item_ids = [*_shuffled(raw_ids)[: items // 2].tolist(), "no such item"]
    loaded = _load(folder, item_ids)
    assert {modality: features.values.shape[1] for modality, features in loaded.items()} == widths

    for modality, features in loaded.items():
        file = FEATURES[name][modality]
        raw = np.load(folder.parent / file.values).astype(np.float32)
        flags = np.load(folder.parent / file.present) if file.present else np.ones(len(raw), bool)
        # Found by searching the id file anew for every id, without the join under test.
        ids = file.read_ids(folder.parent / file.ids).astype(str)
        for index in (0, 1, 2, 7, 31, 100):
            row = np.flatnonzero(ids == str(item_ids[index]))
            assert features.present[index] == (len(row) == 1 and flags[row[0]])
            if features.present[index]:
                np.testing.assert_array_equal(features.values[index], raw[row[0]])
        assert not features.present[-1]
        mean = features.values[features.present].mean(axis=0)
        np.testing.assert_allclose(features.values[~features.present], mean[None].repeat(features.num_missing, 0))
        norms = np.linalg.norm(features.values[features.present], axis=1)
        np.testing.assert_allclose(norms, 1, atol=1e-3)


def test_ml_100k_neighbours_are_sane(real_data):
    folder = real_data("ml-100k")
    movies = _movies(folder / "u.item", "|")
    text = _load(folder, movies["id"])["text"]
    titles = movies["title"].tolist()
    assert set(_nearest(text, titles, "Star Wars (1977)", 2)) == {
        "Return of the Jedi (1983)",
        "Empire Strikes Back, The (1980)",
    }
    assert _nearest(text, titles, "Godfather, The", 1) == ["Godfather: Part II, The (1974)"]
    assert _nearest(text, titles, "Aladdin (1992)", 1) == ["Aladdin and the King of Thieves (1996)"]


def test_movielens_releases_agree_on_shared_titles(real_data):
    """The same encoder saw the same title in two files: any slip of rows in either would show."""
    old, new = real_data("ml-100k"), real_data("ml-latest-small")
    films = {
        "old": _movies(old / "u.item", "|"),
        "new": pd.read_csv(new / "movies.csv").rename(columns={"movieId": "id"}),
    }
    films = {key: frame.drop_duplicates("title", keep=False).set_index("title") for key, frame in films.items()}
    shared = _shuffled(films["old"].index.intersection(films["new"].index).to_numpy())
    a = _load(old, films["old"].loc[shared, "id"])["text"].values
    b = _load(new, films["new"].loc[shared, "id"])["text"].values
    assert len(shared) > 1000
    np.testing.assert_array_equal((a @ b.T).argmax(axis=1), np.arange(len(shared)))


@pytest.mark.parametrize(("modality", "least"), [("text", 0.3), ("image", 0.04)])
def test_ml_1m_neighbours_share_genres(real_data, modality, least):
    folder = real_data("ml-1m")
    movies = _movies(folder / "movies.dat", "::").sample(frac=1, random_state=0)
    features = _load(folder, movies["id"])[modality]
    genres = movies["rest"].str[2].str.get_dummies("|").to_numpy()[features.present]
    values = features.values[features.present]
    similarity = values @ values.T
    np.fill_diagonal(similarity, -np.inf)
    nearest = similarity.argmax(axis=1)
    shares = ((genres * genres[nearest]).sum(axis=1) > 0).mean()
    by_chance = ((genres * genres[_shuffled(nearest)]).sum(axis=1) > 0).mean()
    assert shares > by_chance + least


def test_posters_serve_ml_latest_small_by_movie_id(real_data):
    small, big = real_data("ml-latest-small"), real_data("ml-1m")
    rated = pd.read_csv(small / "ratings.csv", usecols=["movieId"])["movieId"].unique()
    image = _load(small, rated)["image"]
    assert len(rated) == 9724
    assert image.present.sum() == 2859
    toy_story = _load(big, [2, 1])["image"].values[1]
    np.testing.assert_array_equal(image.values[rated.tolist().index(1)], toy_story)


def test_citeulike_titles_and_rows_are_in_step(real_data):
    folder = real_data("citeulike-a")
    titles = (folder / "titles.txt").read_bytes().decode().split("\n")[:16980]
    text = _load(folder, np.arange(16980))["text"]
    assert "Random Graphs" in _nearest(text, titles, "Random graphs with arbitrary degree", 3)
    late = "Exploring the potential for social tagging and folksonomy in art museums"
    assert all("olksonomy" in title for title in _nearest(text, titles, late, 2))


def test_amazon_beauty_neighbours_are_sane(real_data):
    folder = real_data("amazon-beauty")
    meta = pd.read_csv(folder / "item_meta.csv").sample(frac=1, random_state=0)
    text = _load(folder, meta["parent_asin"])["text"]
    titles = meta["title"].tolist()
    assert all("Eyelash" in title for title in _nearest(text, titles, "3D Mink Eyelashes Natural Long", 3))
    assert all("Wig" in title for title in _nearest(text, titles, "NOBLE Wigs for White Women Purple", 3))


def _median_rank(vectors: np.ndarray, train: np.ndarray, user: np.ndarray, item: np.ndarray) -> float:
    """Median rank of held-out items by similarity to the sum of the user's training items."""
    vectors = vectors - vectors.mean(axis=0)
    vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    scores = np.where(train > 0, -np.inf, (train @ vectors) @ vectors.T)[user]
    return np.median((scores > scores[np.arange(len(item)), item][:, None]).sum(axis=1))


@pytest.mark.parametrize("modality", ["image", "text"])
def test_ku_features_predict_held_out_items_better_than_shuffled_rows(real_data, modality):
    folder = real_data("ku")
    rows = pd.read_csv(folder / "inter.csv")
    item_ids = _shuffled(np.arange(560))
    vectors = _load(folder, item_ids)[modality].values
    rows["item"] = np.argsort(item_ids)[rows["itemID"]]
    known, held_out = rows[rows["split_label"] == 0], rows[rows["split_label"] > 0]
    train = np.zeros((204, 560), np.float32)
    train[known["userID"], known["item"]] = 1
    target = held_out["userID"].to_numpy(), held_out["item"].to_numpy()

    rng = np.random.default_rng(0)
    by_chance = [_median_rank(rng.permutation(vectors), train, *target) for _ in range(20)]
    assert _median_rank(vectors, train, *target) < min(by_chance)
