"""Text features of BERT-family encoders, through transformers."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from transformers import AutoModel, AutoTokenizer

from fedjax_rec.encoders.extract import Encoder
from fedjax_rec.encoders.store import weights_hash
from fedjax_rec.validate import one_of

POOLINGS = ("mean", "cls")
MAX_TOKENS = 512
UNUSED = "pooler."
"""BERT's head for sentence pairs: no pooling uses it, and a checkpoint without one gets random numbers."""


def load(
    name: str,
    *,
    weights: str | None = None,
    pooling: str = "mean",
    max_tokens: int | None = None,
    device: str = "cpu",
) -> Encoder:
    """Loads a BERT-family encoder of texts, in float32.

    Args:
        name: model on the Hugging Face hub, or what to call `weights`.
        weights: local folder with config, tokenizer and weights, instead of the hub.
        pooling: `cls`: the vector of the first token; `mean`: the mean over all tokens, [CLS] and [SEP] included.
        max_tokens: longer texts are cut; None: 512, or the model's limit where that is less.
        device: torch device.

    Raises:
        ValueError: an unknown pooling, more tokens than the model takes, no such folder, or one without a
            tokenizer or with weights that do not fill the encoder.
        OSError: the model cannot be found.
    """
    one_of("pooling", pooling, POOLINGS)
    if weights and not Path(weights).is_dir():
        raise ValueError(f"{weights}: there is no such folder, expected config, tokenizer and weights; check --weights")
    origin = weights or name
    tokenizer = AutoTokenizer.from_pretrained(origin)
    model, info = AutoModel.from_pretrained(origin, dtype=torch.float32, output_loading_info=True)
    model = model.to(device)  # in evaluation mode, as from_pretrained returns it
    absent = sorted(key for key in info["missing_keys"] if not key.startswith(UNUSED))
    if absent:
        raise ValueError(
            f"{origin}: the weights lack {len(absent)} tensors of the encoder, the first is {absent[0]}, which would "
            "stay random; expected a whole encoder; give --weights"
        )
    if len(tokenizer) < 0.9 * model.config.vocab_size:  # embeddings may be padded; a tokenizer without files knows none
        raise ValueError(
            f"{origin}: the tokenizer knows {len(tokenizer)} of the model's {model.config.vocab_size} tokens; expected "
            "the tokenizer's files beside the weights; get the whole folder"
        )
    limit = min(tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", MAX_TOKENS))
    max_tokens = max_tokens or min(MAX_TOKENS, limit)
    if max_tokens > limit:
        raise ValueError(f"--max_tokens={max_tokens}: {origin} takes at most {limit}; give a smaller number")

    def encode(texts: list[str]) -> np.ndarray:
        tokens = tokenizer(texts, padding=True, truncation=True, max_length=max_tokens, return_tensors="pt").to(device)
        with torch.inference_mode():
            pooled = pool(model(**tokens).last_hidden_state, tokens["attention_mask"], pooling)
        return pooled.cpu().numpy()

    used = {key: value for key, value in model.state_dict().items() if not key.startswith(UNUSED)}
    settings = {
        "model": f"bert:{name}",
        "weights_hash": weights_hash(used),
        "pooling": pooling,
        "max_tokens": max_tokens,
        "device": device,
        "versions": {package: version(package) for package in ("torch", "transformers", "tokenizers")},
    }
    return Encoder(settings, read=lambda text: text, encode=encode)


def pool(
    hidden: Float[torch.Tensor, "batch tokens feat"], mask: Int[torch.Tensor, "batch tokens"], pooling: str
) -> Float[torch.Tensor, "batch feat"]:
    """One vector per text; `mask` is 0 at padding."""
    if pooling == "cls":
        return hidden[:, 0]
    weight = mask.to(hidden.dtype)[..., None]
    return (hidden * weight).sum(dim=1) / weight.sum(dim=1)
