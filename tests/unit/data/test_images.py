"""Pixels against the golden files, and images that must be refused."""

from __future__ import annotations

import io
import json

import numpy as np
import PIL
import pytest
from PIL import Image
from safetensors.numpy import load_file

from megatron_ross.config.model import VisionConfig
from megatron_ross.data.errors import ImageError
from megatron_ross.data.images import ImageProcessor, decode_image


@pytest.fixture(scope="module")
def metadata(golden):
    return json.loads((golden / "metadata.json").read_text())


def _processor(metadata, tower: str, size: int, mode: str) -> ImageProcessor:
    settings = metadata["images"][f"{tower}_{size}"]
    vision = VisionConfig(
        hf_config={"model_type": f"{tower}_vision_model", "image_size": size},
        image_mean=tuple(settings["image_mean"]),
        image_std=tuple(settings["image_std"]),
        image_aspect_ratio=mode,
        image_conversion="published",
    )
    processor = ImageProcessor.from_config(vision)
    assert list(processor.pad_colour) == settings["pad_colour"]
    return processor


def _decode(golden, name: str) -> Image.Image:
    return decode_image((golden / "preprocess/images" / name).read_bytes(), name, "published")


def _assert_close(pixels: np.ndarray, expected: np.ndarray, metadata, name: str) -> None:
    is_pillow_12 = PIL.__version__.startswith("12.")
    bound = metadata["tolerances"]["image_uint8_pillow_12" if is_pillow_12 else "image_uint8_other_pillow"]
    difference = np.abs(pixels.astype(int) - expected.astype(int))
    assert difference.max() <= bound["max_abs"], name
    assert difference.mean() <= bound.get("mean_abs", 0), name


def test_uint8_equals_golden(golden, metadata):
    expected = load_file(golden / "preprocess/images_uint8.safetensors")
    assert len(expected) == 40
    identical = 0
    for key, value in expected.items():
        name, tower, size, mode = key.split("|")
        pixels = _processor(metadata, tower, int(size), mode).to_uint8(_decode(golden, name))
        _assert_close(pixels, value.transpose(1, 2, 0), metadata, key)
        identical += np.array_equal(pixels, value.transpose(1, 2, 0))
    assert identical >= 35  # Pillow 13 differs in a few entries only


def test_large_images_equal_golden(golden, metadata):
    files = sorted((golden / "preprocess/images_large").iterdir())
    assert files
    for file in files:
        name, tower, size, mode = file.stem.rsplit(".", 3)
        pixels = _processor(metadata, tower, int(size), mode).to_uint8(_decode(golden, name))
        _assert_close(pixels, np.asarray(Image.open(file)), metadata, file.name)


def test_normalised_values_equal_golden(golden, metadata):
    for key, value in load_file(golden / "preprocess/images_float32.safetensors").items():
        name, tower, size, mode = key.split("|")
        pixels = _processor(metadata, tower, int(size), mode)(_decode(golden, name))
        assert pixels.dtype.is_floating_point
        assert np.abs(pixels.numpy() - value).max() <= metadata["tolerances"]["image_float_abs"], key


def _bytes(image: Image.Image, kind: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


PHOTO = Image.fromarray(np.random.default_rng(0).integers(0, 256, (80, 90, 3), dtype=np.uint8))


@pytest.mark.parametrize(
    "data",
    [b"", b"no image", _bytes(PHOTO, "JPEG")[:1500], _bytes(PHOTO, "PNG")[:1500]],
    ids=["0", "text", "jpg", "png"],
)
def test_broken_files_name_the_file(data):
    with pytest.raises(ImageError, match=r"dir/a\.jpg"):
        decode_image(data, "dir/a.jpg")


def test_decompression_bomb_is_refused_before_decoding():
    bomb = _bytes(Image.new("1", (20_000, 20_000)), "PNG")
    assert len(bomb) < 100_000
    with pytest.raises(ImageError, match=r"bomb\.png"):
        decode_image(bomb, "bomb.png")


@pytest.mark.parametrize(("mode", "resize"), [("pad", "stretch"), ("square", "crop")])
def test_extreme_aspect_ratio_is_refused(mode, resize):
    line = Image.new("RGB", (10_000_000, 1))
    with pytest.raises(ImageError, match="pixels, more than"):
        ImageProcessor((0.5,) * 3, (0.5,) * 3, 56, mode, resize)(line)


def test_unknown_settings():
    with pytest.raises(ValueError, match="anyres"):
        ImageProcessor((0.5,) * 3, (0.5,) * 3, 56, "anyres")
