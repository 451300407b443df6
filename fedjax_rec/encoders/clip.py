"""Image and text features of CLIP models, through open_clip."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import numpy as np
import open_clip
import torch
from PIL import Image

from fedjax_rec.encoders.extract import Encoder, Unreadable
from fedjax_rec.encoders.store import weights_hash
from fedjax_rec.validate import nearest, one_of

MODALITIES = ("image", "text")


def load(name: str, modality: str, *, weights: str | None = None, device: str = "cpu") -> Encoder:
    """Loads one side of a CLIP model, in float32.

    Args:
        name: `architecture/tag` of open_clip, e.g. ViT-B-32/openai; the tag may be left out beside `weights`.
        modality: `image`: encodes image files; `text`: encodes texts, cut at the model's context (77 tokens).
        weights: local checkpoint instead of the tag's download. The tag still decides activation and preprocessing.
        device: torch device.

    Raises:
        ValueError: an unknown architecture or tag, or no such weights file.
        RuntimeError: the weights cannot be fetched, or do not fit the architecture.
    """
    one_of("modality", modality, MODALITIES)
    architecture, _, tag = name.partition("/")
    one_of("model", architecture, open_clip.list_models())
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    if (tag or not weights) and tag not in tags:
        raise ValueError(
            f"model={name!r}: expected {architecture}/ and one of {', '.join(tags) or 'no tag'}{nearest(tag, tags)}, "
            "or --weights=FILE without a tag"
        )
    if weights and not Path(weights).is_file():
        raise ValueError(f"{weights}: there is no such file, expected a checkpoint of {architecture}; check --weights")
    tagged = open_clip.get_pretrained_cfg(architecture, tag) if tag else {}
    model, preprocess = open_clip.create_model_from_pretrained(
        architecture,
        pretrained=weights or tag,
        device=device,
        # open_clip only warns where the tag's activation is not the architecture's, as for ViT-B-32/openai.
        force_quick_gelu=tagged.get("quick_gelu", False),
        image_mean=tagged.get("mean"),
        image_std=tagged.get("std"),
        image_interpolation=tagged.get("interpolation"),
        image_resize_mode=tagged.get("resize_mode"),
    )
    model.eval()
    tokenizer = open_clip.get_tokenizer(architecture) if modality == "text" else None

    def encode(batch: list) -> np.ndarray:
        with torch.inference_mode():
            if modality == "text":
                features = model.encode_text(tokenizer(batch).to(device))
            else:
                features = model.encode_image(torch.stack(batch).to(device))
        return features.cpu().numpy()

    settings = {
        "model": f"clip:{name}",
        "weights_hash": weights_hash(model.state_dict()),
        "modality": modality,
        "device": device,
        "versions": {package: version(package) for package in ("torch", "open_clip_torch", "torchvision", "pillow")},
    }
    read = (lambda path: preprocess(read_image(path))) if modality == "image" else (lambda text: text)
    return Encoder(settings, read=read, encode=encode)


def read_image(path: Path) -> Image.Image:
    """The image in RGB.

    Raises:
        Unreadable: whatever is wrong with the file, in one line.
    """
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except Exception as error:  # a decoder may raise anything at a broken file
        why = " ".join(str(error).split()).replace(str(path.parent) + "/", "") or type(error).__name__
        raise Unreadable(f"{path.name} cannot be read ({why})") from None
