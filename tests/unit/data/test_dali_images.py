"""DALI against Pillow: how far pixels and tower features may differ, and what falls back."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("nvidia.dali")

from transformers import CLIPVisionModel, SiglipVisionModel

from megatron_ross.data.batch import ImageSpan
from megatron_ross.data.dali_images import DaliDecoder, plan_geometry
from megatron_ross.data.dataset import RossDataset
from megatron_ross.data.errors import ImageError
from megatron_ross.data.images import ImageProcessor, decode_image
from tests.helpers.golden import checkpoint_dir, model_config
from tests.helpers.oracle import Oracle

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
PHOTOS = ["portrait.jpg", "landscape.png", "square.png", "gray.png", "exif_orientation6.jpg"]


def _stored(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def _peculiar_files(golden: Path) -> dict[str, tuple[bytes, bool]]:
    """Files with pictures of 200 pixels that `image_conversion` decides about, and whether DALI takes `published`."""
    photo = Image.open(golden / "preprocess/images/landscape.png").convert("RGB").resize((200, 150))
    grey = photo.convert("L")
    exif = Image.Exif()
    exif[274] = 6
    alpha = Image.fromarray(np.tile(np.linspace(0, 255, 200).astype(np.uint8), (150, 1)))
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    behind = _stored(photo, "PNG", exif=exif)
    begin = behind.index(b"eXIf") - 4
    chunk = behind[begin : begin + 12 + int.from_bytes(behind[begin : begin + 4])]
    behind = behind.replace(chunk, b"").replace(behind[-12:], chunk + behind[-12:])
    key = photo.getpixel((3, 3))
    return {
        "jpeg, turned": (_stored(photo, "JPEG", exif=exif), True),
        "png, turned": (_stored(photo, "PNG", exif=exif), True),
        "png, turned behind its pixels": (behind, True),
        "png, colour key": (_stored(photo, "PNG", transparency=key), True),
        "png, grey key": (_stored(grey, "PNG", transparency=grey.getpixel((3, 3))), True),
        "png, alpha": (_stored(Image.merge("RGBA", [*photo.split(), alpha]), "PNG"), False),
        "png, grey and alpha": (_stored(Image.merge("LA", [grey, alpha]), "PNG"), False),
        "png, 16-bit": (_stored(deep, "PNG"), False),
        "tiff, float": (_stored(Image.fromarray(np.asarray(grey) / np.float32(255)), "TIFF"), False),
    }


def _photo_files(golden: Path, longer_side: int) -> list[bytes]:
    """The golden photographs as JPEG and PNG files of a chosen size."""
    files = []
    for i, name in enumerate(PHOTOS):
        image = Image.open(golden / "preprocess/images" / name).convert("L" if name == "gray.png" else "RGB")
        scale = longer_side / max(image.size)
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        image.save(buffer, ("JPEG", "PNG")[i % 2])
        files.append(buffer.getvalue())
    return files


def _span(processor: ImageProcessor, data: bytes, name: str = "a") -> ImageSpan:
    return ImageSpan(0, 0, lambda: processor(decode_image(data, name)), read_bytes=lambda: data)


def _processor(tower: str, size: int, mode: str) -> ImageProcessor:
    if tower == "clip":
        return ImageProcessor(CLIP_MEAN, CLIP_STD, size, mode, "crop")
    return ImageProcessor((0.5,) * 3, (0.5,) * 3, size, mode, "stretch")


def _both(processor: ImageProcessor, spans: list[ImageSpan]) -> tuple[torch.Tensor, torch.Tensor, int]:
    decoder = DaliDecoder(processor, num_threads=1)
    dali = torch.stack(decoder.decode(spans))
    return dali, torch.stack([span.load_pixels() for span in spans]), decoder.num_fallbacks


@pytest.mark.parametrize("mode", ["pad", "square"])
@pytest.mark.parametrize(("tower", "size"), [("siglip", 384), ("clip", 336)])
def test_photographs_differ_by_little(golden, tower, size, mode):
    """The gate: at most 8/255 anywhere, 0.6/255 on average. Measured (DALI 2.4, CPU): 3 and 0.11."""
    processor = _processor(tower, size, mode)
    for longer_side in (640, 1000):
        spans = [_span(processor, data) for data in _photo_files(golden, longer_side)]
        dali, pillow, fallbacks = _both(processor, spans)
        assert fallbacks == 0
        difference = (dali - pillow).abs() * torch.tensor(processor.std)[:, None, None] * 255
        assert difference.max() <= 8
        assert difference.mean() <= 0.6


@pytest.mark.parametrize("conversion", ["viewer", "published"])
def test_pictures_that_are_shown_in_two_ways(golden, conversion):
    """What DALI would show otherwise goes to Pillow, and is counted; the rest differs by no more than photographs."""
    processor = dataclasses.replace(_processor("siglip", 112, "square"), conversion=conversion)
    other = dataclasses.replace(processor, conversion={"viewer": "published"}.get(conversion, "viewer"))
    for name, (data, is_for_dali) in _peculiar_files(golden).items():
        span = ImageSpan(0, 0, lambda data=data: processor(processor.decode(data, "a")), read_bytes=lambda d=data: d)
        dali, pillow, fallbacks = _both(processor, [span])
        assert fallbacks == (conversion == "viewer" or not is_for_dali), name
        difference = (dali - pillow).abs() * 0.5 * 255
        assert difference.max() <= 8, name
        assert difference.mean() <= 0.6, name
        assert (pillow[0] - other(other.decode(data, "a"))).abs().max() > 0.1, name


@pytest.mark.parametrize(("tower", "model_class"), [("siglip", SiglipVisionModel), ("clip", CLIPVisionModel)])
def test_tower_features_change_by_little(golden, tower, model_class):
    """Relative change (L2) of the features the language model sees, on the golden towers. Measured: 0.4 and 0.7 %."""
    processor = _processor(tower, 56, "pad")
    dali, pillow, fallbacks = _both(processor, [_span(processor, data) for data in _photo_files(golden, 200)])
    assert fallbacks == 0
    model = model_class.from_pretrained(golden / f"vision_{tower}")
    with torch.no_grad():
        a, b = (model(pixels, output_hidden_states=True).hidden_states[-2] for pixels in (dali, pillow))
    change = ((a - b).norm() / b.norm()).item()
    assert 0 < change < 1e-2


@pytest.mark.parametrize(
    ("model", "tokenizer", "template"), [("qwen2_siglip", "qwen", "qwen_2"), ("llama_clip", "vicuna", "v1")]
)
def test_losses_change_by_little(golden, tmp_path, request, model, tokenizer, template):
    """Relative change of both losses on the golden models. Measured: at most 0.02 %."""
    config = model_config(model)
    (tmp_path / "images").mkdir()
    records = []
    for i, data in enumerate(_photo_files(golden, 200)):
        (tmp_path / "images" / f"{i}.jpg").write_bytes(data)
        turns = [
            {"from": "human", "value": "<image>\nWhat is it?"},
            {"from": "gpt", "value": "A cup of coffee on a plate."},
        ]
        records.append({"id": i, "image": f"{i}.jpg", "conversations": turns})
    (tmp_path / "data.json").write_text(json.dumps(records))
    processor = ImageProcessor.from_config(config.vision)
    dataset = RossDataset(tmp_path / "data.json", tmp_path / "images", request.getfixturevalue(tokenizer), template,
                          processor, config.vision.num_image_tokens, 512)  # fmt: skip
    pillow = [dataset[i] for i in range(len(dataset))]
    pixels = DaliDecoder(processor, num_threads=1).decode([sample.images[0] for sample in pillow])
    dali = [
        dataclasses.replace(s, images=(dataclasses.replace(s.images[0], load_pixels=lambda p=p: p),))
        for s, p in zip(pillow, pixels, strict=True)
    ]
    oracle = Oracle(checkpoint_dir(model), config)
    a, b = (oracle.run(samples, seed=0) for samples in (dali, pillow))
    for name in ("lm_loss", "recon_loss"):
        change = abs(getattr(a, name) / getattr(b, name) - 1)
        assert 0 < change < 1e-3


def test_enlarged_images_take_pillows_path(golden):
    processor = _processor("siglip", 384, "pad")
    dali, pillow, fallbacks = _both(processor, [_span(processor, data) for data in _photo_files(golden, 300)])
    assert fallbacks == len(PHOTOS)
    assert torch.equal(dali, pillow)


@pytest.mark.parametrize("name", ["rgba.png", "palette.png", "cmyk.jpg"])
def test_other_colour_modes_take_pillows_path(golden, name):
    processor = _processor("siglip", 56, "pad")
    dali, pillow, fallbacks = _both(processor, [_span(processor, (golden / "preprocess/images" / name).read_bytes())])
    assert fallbacks == 1
    assert torch.equal(dali, pillow)


def _jpeg(seed: int, shape=(90, 70, 3)) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)).save(buffer, "JPEG")
    return buffer.getvalue()


def test_broken_files_cost_the_others_nothing():
    processor = _processor("siglip", 56, "pad")
    whole = _jpeg(0)
    no_frame = whole.replace(b"\xff\xc0", b"\xff\xfe", 1)  # the end is intact, so DALI sees it
    files = [_jpeg(1), whole[:900], b"", _jpeg(2), no_frame, _jpeg(3)]
    spans = [_span(processor, data, f"{i}.jpg") for i, data in enumerate(files)]
    decoder = DaliDecoder(processor, num_threads=1)
    for _ in range(2):  # and the decoder works on after a failure
        results = decoder.decode(spans)
        assert [isinstance(r, ImageError) for r in results] == [False, True, True, False, True, False]
        assert "'1.jpg'" in str(results[1])
        for i in (0, 3, 5):
            assert (results[i] - spans[i].load_pixels()).abs().mean() < 0.02


def test_more_images_than_one_batch_keep_their_order():
    processor = _processor("siglip", 56, "square")
    spans = [_span(processor, _jpeg(i, (60 + i, 70, 3))) for i in range(7)]
    results = DaliDecoder(processor, num_threads=1, max_batch_size=3).decode(spans)
    for result, span in zip(results, spans, strict=True):
        assert (result - span.load_pixels()).abs().mean() < 0.02
    assert DaliDecoder(processor, num_threads=1).decode([]) == []


def test_bombs_and_extreme_shapes_are_left_to_pillow():
    processor = _processor("siglip", 56, "pad")
    buffer = io.BytesIO()
    Image.new("RGB", (60_000, 1)).save(buffer, "PNG")
    assert plan_geometry(buffer.getvalue(), processor) is None
    (result,) = DaliDecoder(processor, num_threads=1).decode([_span(processor, buffer.getvalue())])
    assert isinstance(result, ImageError)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_mixed_decoding_on_a_gpu(golden):
    processor = _processor("siglip", 384, "pad")
    spans = [_span(processor, data) for data in _photo_files(golden, 640)]
    results = DaliDecoder(processor, num_threads=2, device_id=0).decode(spans)
    for result, span in zip(results, spans, strict=True):
        assert result.is_cuda
        difference = (result.cpu() - span.load_pixels()).abs() * 0.5 * 255
        assert difference.max() <= 8
        assert difference.mean() <= 0.6


def test_other_filters_go_to_pillow() -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (60, 40)).save(buffer, "PNG")
    processor = _processor("siglip", 28, "pad")
    assert plan_geometry(buffer.getvalue(), processor) is not None
    assert plan_geometry(buffer.getvalue(), dataclasses.replace(processor, resample="bilinear")) is None
