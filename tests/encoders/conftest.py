"""Small models with random weights, saved where the real loading code finds them. No test reaches a model hub."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported: a look-up fails at once

if importlib.util.find_spec("torch"):
    import torchvision_ops  # noqa: F401

WORDS = [
    "red",
    "blue",
    "green",
    "rose",
    "song",
    "of",
    "the",
    "sea",
    "night",
    "train",
    "to",
    "a",
    "far",
    "city",
    ".",
    "##s",
]
# patch_dropout acts in training mode only: it shows a model that was left in it
CLIP_CONFIG = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "patch_size": 16, "patch_dropout": 0.5},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory) -> Path:
    """A folder with a two-layer BERT of 512 positions, its WordPiece vocabulary and random weights."""
    import torch
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = tmp_path_factory.mktemp("tiny_bert")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    BertTokenizerFast(vocab=str(folder / "vocab.txt"), model_max_length=512).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    BertModel(BertConfig(vocab_size=len(vocabulary), initializer_range=0.5, **sizes)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory) -> Path:
    """A checkpoint of the architecture `tiny-test`, which is made known to open_clip; random weights."""
    import open_clip
    import torch

    folder = tmp_path_factory.mktemp("tiny_clip")
    (folder / "tiny-test.json").write_text(json.dumps(CLIP_CONFIG))
    open_clip.add_model_config(folder / "tiny-test.json")
    torch.manual_seed(0)
    torch.save(open_clip.create_model("tiny-test").state_dict(), folder / "tiny.pt")
    return folder / "tiny.pt"


@pytest.fixture
def table(tmp_path):
    """Writes a csv of items and returns its path."""

    def write(text: str) -> Path:
        path = tmp_path / "items.csv"
        path.write_text(text)
        return path

    return write
