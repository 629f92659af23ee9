"""Text, images and sampler order against a folder of golden preprocessing files (tools/check_preprocessing.py)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
from PIL import Image
from safetensors.numpy import load_file
from transformers import AutoTokenizer

from megatron_ross.data.conversation import encode_conversation
from megatron_ross.data.errors import ConversationError
from megatron_ross.data.images import ImageProcessor
from megatron_ross.data.order import grouped_indices
from megatron_ross.data.records import parse_record
from megatron_ross.data.tokenizer import TextTokenizer

Row = tuple[str, int, list[str]]
"""File, number of entries compared, descriptions of differences."""


def check_text(fixture: Path) -> Iterator[Row]:
    """One row per `text_*.json`."""
    records = {r["id"]: r for r in json.loads((fixture / "preprocess/conversations.json").read_text())}
    for file in sorted((fixture / "preprocess").glob("text_*.json")):
        expected = json.loads(file.read_text())
        settings = expected["tokenizer_settings"]
        loaded = AutoTokenizer.from_pretrained(fixture / expected["tokenizer"])
        tokenizer = TextTokenizer(loaded, legacy=settings["legacy"])
        wrong = []
        for result in expected["results"]:
            problem = compare_text(records[result["id"]], result, expected["template"], tokenizer, settings)
            if problem:
                wrong.append(f"{result['id']}: {problem}")
        yield file.name, len(expected["results"]), wrong


def compare_text(raw: Any, result: Any, template: str, tokenizer: TextTokenizer, settings: Any) -> str | None:
    """What differs for one conversation, or None."""
    record = parse_record(raw, "conversations.json")
    length = settings["model_max_length"]
    try:
        encoded = encode_conversation(
            record.turns, template, tokenizer, num_images=len(record.images), max_length=length, reference=True
        )
    except ConversationError as error:
        return None if result["status"] == "error" else f"refused ({error})"
    if result["status"] == "error":
        return "accepted, but the published code raises"
    for name, value in (("input_ids", encoded.input_ids), ("labels", encoded.labels)):
        if value != result[name]:
            return f"{name} differ"
    return None if encoded.mismatch == bool(result["mismatch_warning"]) else "mismatch flag differs"


def check_images(fixture: Path) -> Iterator[Row]:
    """Rows for `images_uint8`, `images_float32` and `images_large/`."""
    metadata = json.loads((fixture / "metadata.json").read_text())
    folder, tolerances = fixture / "preprocess", metadata["tolerances"]
    is_pillow_12 = PIL.__version__.startswith("12.")
    bound = tolerances["image_uint8_pillow_12" if is_pillow_12 else "image_uint8_other_pillow"]

    def processed(name: str, tower: str, size: str, mode: str) -> tuple[ImageProcessor, np.ndarray]:
        settings = metadata["images"][f"{tower}_{size}"]
        mean, std = tuple(settings["image_mean"]), tuple(settings["image_std"])
        processor = ImageProcessor(
            mean, std, int(size), mode, "crop" if tower == "clip" else "stretch", conversion="published"
        )
        return processor, processor.to_uint8(processor.decode((folder / "images" / name).read_bytes(), name))

    def differs(pixels: np.ndarray, expected: np.ndarray) -> str | None:
        gap = np.abs(pixels.astype(int) - expected.astype(int))
        within = gap.max() <= bound["max_abs"] and gap.mean() <= bound.get("mean_abs", 0)
        return None if within else f"off by up to {gap.max()}, {gap.mean():.3f} on average"

    uint8 = load_file(folder / "images_uint8.safetensors")
    results = {k: differs(processed(*k.split("|"))[1], v.transpose(1, 2, 0)) for k, v in uint8.items()}
    yield "images_uint8.safetensors", len(uint8), [f"{k}: {v}" for k, v in results.items() if v]
    wrong = []
    floats = load_file(folder / "images_float32.safetensors")
    for key, value in floats.items():
        processor, pixels = processed(*key.split("|"))
        gap = np.abs(processor.normalise(pixels).numpy() - value).max()
        if gap > tolerances["image_float_abs"]:
            wrong.append(f"{key}: off by up to {gap:.3g}")
    yield "images_float32.safetensors", len(floats), wrong
    for file in sorted((folder / "images_large").glob("*.png")):
        problem = differs(processed(*file.stem.rsplit(".", 3))[1], np.asarray(Image.open(file)))
        yield f"images_large/{file.name}", 1, [problem] if problem else []


def check_sampler(fixture: Path) -> Iterator[Row]:
    """One row for `sampler.json`."""
    data = json.loads((fixture / "preprocess/sampler.json").read_text())
    mixed = data["mixed_lengths"]
    positive, negative = [abs(n) for n in mixed], [-abs(n) for n in mixed]
    kinds = {"mixed": mixed, "one_modality_positive": positive, "one_modality_negative": negative}
    wrong = []
    for number, case in enumerate(data["cases"]):
        generator = torch.Generator().manual_seed(case["seed"])
        got = grouped_indices(kinds[case["lengths"]], case["batch_size"], case["world_size"], generator)
        if got != case["indices"]:
            wrong.append(f"case {number} ({case['lengths']}, seed {case['seed']}): another order")
    yield "sampler.json", len(data["cases"]), wrong


def check_preprocessing(fixture: Path) -> int:
    """Compare everything.

    Args:
        fixture: folder in the golden format.

    Returns:
        Exit status: 1 if anything differs.
    """
    if not (fixture / "metadata.json").is_file():
        raise ValueError(f"{fixture} holds no metadata.json; name a folder of the golden format")
    failed = False
    for check in (check_text, check_images, check_sampler):
        for name, count, wrong in check(fixture):
            print(f"{'DIFFERS' if wrong else 'equal':8} {name:50} {count - len(wrong)}/{count}", flush=True)
            for line in wrong:
                print(f"         {line}")
            failed |= bool(wrong)
    return int(failed)
