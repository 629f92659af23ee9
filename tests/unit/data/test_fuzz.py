"""Mutated files and records: a loader skips them, whatever is wrong with them, and never crashes."""

from __future__ import annotations

import copy
import io
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_ross.data.batch import ImageSpan
from megatron_ross.data.dataset import RossDataset
from megatron_ross.data.decoders import PillowDecoder, PixelDecoder
from megatron_ross.data.errors import ImageError, RecordError
from megatron_ross.data.images import ImageProcessor, decode_image
from megatron_ross.data.loader import RossLoader
from megatron_ross.data.order import SampleOrder
from megatron_ross.data.quarantine import BadSamplePolicy
from megatron_ross.data.records import parse_record

LENIENT = BadSamplePolicy(max_bad_share=1.0, max_mismatch_share=1.0)
NUM_FILES = 500


def _mutate(data: bytes, rng: random.Random) -> bytes:
    """Cut, overwrite, insert, repeat or remove random pieces."""
    out = bytearray(data)
    for _ in range(rng.randint(1, 8)):
        place, size = rng.randrange(len(out) + 1), rng.randint(1, 60)
        kind = rng.randrange(5)
        if kind == 0:
            out = out[:place]
        elif kind == 1:
            out[place : place + size] = rng.randbytes(size)
        elif kind == 2:
            out[place:place] = rng.randbytes(size)
        elif kind == 3:
            del out[place : place + size]
        elif out:
            out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
    return bytes(out)


def _mutated_files(kind: str) -> list[bytes]:
    rng = random.Random(kind)
    buffer = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (72, 60, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, kind)
    return [_mutate(buffer.getvalue(), rng) for _ in range(NUM_FILES)]


def _decoder(name: str, processor: ImageProcessor) -> PixelDecoder:
    if name == "pillow":
        return PillowDecoder(2)
    pytest.importorskip("nvidia.dali")
    from megatron_ross.data.dali_images import DaliDecoder

    return DaliDecoder(processor, num_threads=1)


@pytest.mark.parametrize("decoder", ["pillow", "dali"])
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_500_mutated_images_never_crash_a_loader(kind, decoder, tmp_path, qwen, processor):
    records = []
    for i, data in enumerate(_mutated_files(kind)):
        (tmp_path / f"{i}.img").write_bytes(data)
        turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cup."}]
        records.append({"id": i, "image": f"{i}.img", "conversations": turns})
    (tmp_path / "data.json").write_text(json.dumps(records))
    dataset = RossDataset(tmp_path / "data.json", tmp_path, qwen, "qwen_2", processor, 16, 512)
    loader = RossLoader(dataset, SampleOrder(NUM_FILES, seed=1), global_batch_size=NUM_FILES, micro_batch_size=20,
                        decoder=_decoder(decoder, processor), bad_samples=LENIENT)  # fmt: skip
    step = loader.next_step()
    loader.close()
    good = sum(int((batch.recon_weight > 0).sum()) for batch in step)
    bad = loader.bad_sample_counts["bad"]
    assert good + bad == NUM_FILES
    assert all(torch.isfinite(batch.pixels).all() for batch in step)
    assert bad > 0
    assert good > 0 or kind == "PNG", "every PNG chunk has a checksum, so that all of them may be refused"


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_what_dali_makes_of_a_file_does_not_depend_on_its_neighbours(kind, processor):
    """Else the skipped samples would depend on the layout, because DALI takes some files that Pillow refuses."""
    decoder = _decoder("dali", processor)
    spans = [_span(processor, data) for data in _mutated_files(kind)]
    together = decoder.decode(spans)
    for span, result in zip(spans, together, strict=True):
        (alone,) = decoder.decode([span])
        assert isinstance(alone, ImageError) == isinstance(result, ImageError)
        if not isinstance(alone, ImageError):
            assert torch.equal(alone, result)
    decoder.close()


def _span(processor: ImageProcessor, data: bytes) -> ImageSpan:
    return ImageSpan(0, 0, lambda: processor(decode_image(data, "a")), read_bytes=lambda: data)


def _mutate_json(value, rng: random.Random):
    """Replace one random node of a JSON value by something of another kind."""
    junk = [None, True, -3, 1.5, "", "x" * 9, [], {}, [[]], {"a": 1}, "\ud800", "../../etc/passwd", "<image>" * 3]
    if rng.random() < 0.25 or not isinstance(value, dict | list) or not value:
        return copy.deepcopy(rng.choice(junk))
    key = rng.choice(list(value)) if isinstance(value, dict) else rng.randrange(len(value))
    if rng.random() < 0.2:
        del value[key]
    else:
        value[key] = _mutate_json(value[key], rng)
    return value


def test_500_mutated_records_never_crash_a_loader(toy: Path, qwen, processor):
    rng = random.Random(0)
    originals = json.loads((toy / "data.json").read_text())
    records = [_mutate_json(copy.deepcopy(rng.choice(originals)), rng) for _ in range(500)]
    (toy / "data.json").write_text(json.dumps(records))
    dataset = RossDataset(toy / "data.json", toy / "images", qwen, "qwen_2", processor, 16, 512)
    loader = RossLoader(dataset, SampleOrder(500, seed=1), global_batch_size=500, micro_batch_size=10,
                        bad_samples=LENIENT)  # fmt: skip
    step = loader.next_step()
    loader.close()
    assert sum(len(batch.sample_ids) for batch in step) == 500
    assert 100 < loader.bad_sample_counts["bad"] < 500
    good = 0
    for number, record in enumerate(records):
        try:
            good += bool(parse_record(record, str(number)).turns)
        except RecordError:
            continue
    assert good >= 500 - loader.bad_sample_counts["bad"]
    assert all(dataset.modality_length(i) != 0 for i in range(500))
