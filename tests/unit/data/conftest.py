"""Golden data, tokenizers and a small data set on disk for the data engine's tests."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers import AutoTokenizer

from megatron_ross.data.images import ImageProcessor

GOLDEN = Path(__file__).parents[2] / "golden"
IMAGE_TOKENS = 16


@pytest.fixture(scope="session")
def golden() -> Path:
    return GOLDEN


@pytest.fixture(scope="session")
def qwen():
    return AutoTokenizer.from_pretrained(GOLDEN / "llm_qwen2")


@pytest.fixture(scope="session")
def vicuna():
    return AutoTokenizer.from_pretrained(GOLDEN / "llm_vicuna")


@pytest.fixture(scope="session")
def processor() -> ImageProcessor:
    return ImageProcessor((0.5, 0.5, 0.5), (0.5, 0.5, 0.5), 56)


def chat(question: str, answer: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    """data.json with 23 samples of different length: one image, two images, none; and images/."""
    folder = tmp_path / "images"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(8):
        pixels = rng.integers(0, 256, (30 + 5 * i, 60 - 4 * i, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    records = []
    for i in range(23):
        answer = "It is a picture. " * (1 + i * 7 % 5)
        if i % 5 == 3:
            records.append({"id": i, "conversations": chat("What is it?", answer)})
        elif i % 7 == 2:
            question = "<image>\n<image>\nWhich one?"
            records.append({"id": i, "image": [f"{i % 8}.png", "1.png"], "conversations": chat(question, answer)})
        else:
            records.append({"id": str(i), "image": f"{i % 8}.png", "conversations": chat("<image>\nWhat?", answer)})
    (tmp_path / "data.json").write_text(json.dumps(records))
    return tmp_path
