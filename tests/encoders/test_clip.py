"""CLIP features: a small model made on the spot, real loading code, real and broken image files."""

from __future__ import annotations

import io

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the extra `encoders` is not installed: make test-encoders")

import open_clip
from PIL import Image
from safetensors.torch import save_file

from fedjax_rec.encoders import clip
from fedjax_rec.encoders.extract import Unreadable

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of OpenAI's CLIP


def picture(seed: int, size=(32, 32), mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def as_file(image: Image.Image, kind: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def reference(checkpoint, **overrides):
    """The model, filled without the code under test."""
    model = open_clip.create_model("tiny-test", **overrides)
    model.load_state_dict(torch.load(checkpoint, weights_only=True))
    return model.eval()


def encode_files(encoder, *paths) -> np.ndarray:
    return encoder.encode([encoder.read(path) for path in paths])


def test_images_are_preprocessed_and_encoded(tiny_clip, tmp_path):
    """A picture of the model's own size needs no resizing, so its preprocessing is three lines."""
    paths = [tmp_path / f"{seed}.png" for seed in range(3)]
    for seed, path in enumerate(paths):
        picture(seed).save(path)
    encoder = clip.load("tiny-test", "image", weights=str(tiny_clip))
    found = encode_files(encoder, *paths)
    pixels = np.stack([np.asarray(picture(seed), np.float32) / 255 for seed in range(3)])
    normed = torch.tensor((pixels - np.float32(MEAN)) / np.float32(STD)).permute(0, 3, 1, 2)
    with torch.no_grad():
        expected = reference(tiny_clip).encode_image(normed).numpy()
    assert found.shape == (3, 16) and found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.abs(found[0] - found[1]).max() > 1e-3


def test_texts_are_encoded(tiny_clip):
    texts = ["a photo of a cat", "a photo of a dog", "word " * 300]
    encoder = clip.load("tiny-test", "text", weights=str(tiny_clip))
    found = encoder.encode([encoder.read(text) for text in texts])
    with torch.no_grad():
        expected = reference(tiny_clip).encode_text(open_clip.tokenize(texts)).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.abs(found[0] - found[1]).max() > 1e-3
    assert encoder.settings["modality"] == "text"


@pytest.mark.parametrize(
    ("mode", "kind"),
    [("L", "png"), ("1", "png"), ("P", "png"), ("RGBA", "webp"), ("CMYK", "jpeg"), ("LA", "png"), ("I;16", "png")],
)
def test_any_kind_of_picture_is_read(tiny_clip, tmp_path, mode, kind):
    path = tmp_path / f"7.{kind}"
    path.write_bytes(
        as_file(picture(0, (50, 21), "L").convert("I;16") if mode == "I;16" else picture(0, (50, 21), mode), kind)
    )
    values = encode_files(clip.load("tiny-test", "image", weights=str(tiny_clip)), path)
    assert values.shape == (1, 16) and np.isfinite(values).all()


WHOLE = as_file(picture(0, (200, 200)), "jpeg")


@pytest.mark.parametrize(
    "content",
    [b"", b"not an image", WHOLE[: len(WHOLE) // 2], WHOLE[:30], as_file(picture(0), "png")[:60], b"RIFF\x00\x00WEBP"],
)
def test_a_broken_file_is_unreadable(tmp_path, content):
    path = tmp_path / "7.jpg"
    path.write_bytes(content)
    with pytest.raises(Unreadable, match=r"^7\.jpg cannot be read \(.+\)$") as error:
        clip.read_image(path)
    assert "\n" not in str(error.value)
    assert str(tmp_path) not in str(error.value)


def test_a_folder_and_a_huge_picture_are_unreadable(tmp_path, monkeypatch):
    (tmp_path / "1.png").mkdir()
    picture(0, (300, 300)).save(tmp_path / "2.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 300)
    for name in ("1.png", "2.png"):
        with pytest.raises(Unreadable, match=name):
            clip.read_image(tmp_path / name)


@pytest.fixture
def openai_tag(tiny_clip, monkeypatch):
    """Gives the small architecture the tag `openai` of ViT-B-32, whose download is the local checkpoint."""
    real = open_clip.pretrained._PRETRAINED["ViT-B-32"]["openai"]
    assert real["quick_gelu"]
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "tiny-test", {"openai": real})
    monkeypatch.setattr(open_clip.factory, "download_pretrained", lambda *args, **kwargs: str(tiny_clip))


@pytest.mark.parametrize("local", [False, True])
def test_the_tag_decides_the_activation(tiny_clip, openai_tag, tmp_path, local):
    """OpenAI's weights need QuickGELU; open_clip builds ViT-B-32 without it, and only warns."""
    picture(1).save(tmp_path / "1.png")
    encoder = clip.load("tiny-test/openai", "image", weights=str(tiny_clip) if local else None)
    found = encode_files(encoder, tmp_path / "1.png")
    image = encoder.read(tmp_path / "1.png")[None]
    with torch.no_grad():
        quick, plain = (
            reference(tiny_clip, force_quick_gelu=force).encode_image(image).numpy() for force in (True, False)
        )
    np.testing.assert_allclose(found, quick, atol=1e-5)
    assert np.abs(found - plain).max() > 1e-4
    assert encoder.settings["model"] == "clip:tiny-test/openai"


def test_the_tag_decides_the_preprocessing(tiny_clip, openai_tag, monkeypatch, tmp_path):
    other = {**open_clip.pretrained._PRETRAINED["ViT-B-32"]["openai"], "mean": (0.5,) * 3, "std": (0.5,) * 3}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "tiny-test", {"other": other})
    picture(1).save(tmp_path / "1.png")
    read = clip.load("tiny-test/other", "image", weights=str(tiny_clip)).read(tmp_path / "1.png")
    np.testing.assert_allclose(read.permute(1, 2, 0), np.asarray(picture(1)) / 127.5 - 1, atol=1e-6)


def test_the_hash_is_of_the_weights_not_of_the_file(tiny_clip, tmp_path):
    state = torch.load(tiny_clip, weights_only=True)
    save_file(state, tmp_path / "same.safetensors")
    changed = {**state, "logit_scale": state["logit_scale"] + 1}
    torch.save(changed, tmp_path / "other.pt")
    hashes = [
        clip.load("tiny-test", "text", weights=str(path)).settings["weights_hash"]
        for path in (tiny_clip, tmp_path / "same.safetensors", tmp_path / "other.pt")
    ]
    assert hashes[0] == hashes[1] != hashes[2]
    assert len(hashes[0]) == 64


@pytest.mark.parametrize(
    ("name", "weights", "message"),
    [
        ("ViT-B-33/openai", None, r"model='ViT-B-33': expected one of .* \(did you mean ViT-B-32\?\)"),
        ("ViT-B-32/opnai", None, r"model='ViT-B-32/opnai': expected ViT-B-32/ and one of .*did you mean openai"),
        ("ViT-B-32", None, r"model='ViT-B-32': expected ViT-B-32/ and one of openai, .* or --weights=FILE"),
        ("tiny-test", "nowhere.pt", r"nowhere\.pt: there is no such file"),
    ],
)
def test_unknown_models(tiny_clip, name, weights, message):
    with pytest.raises(ValueError, match=message):
        clip.load(name, "image", weights=weights)


def test_weights_of_another_architecture_are_refused(tiny_clip, tmp_path):
    state = torch.load(tiny_clip, weights_only=True)
    state.pop("visual.proj")
    torch.save(state, tmp_path / "cut.pt")
    with pytest.raises(RuntimeError, match=r"visual\.proj"):
        clip.load("tiny-test", "image", weights=str(tmp_path / "cut.pt"))
