"""Environment of the clients, and our program's answers for theirs to be compared with."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from megatron_ross.evaluation.options import Decoding

ENVIRONMENT = Path(sys.prefix)
MAX_NEW_TOKENS = 8
QUESTIONS = ("What is it?", "How many dogs are there, and what is behind them?")


def needs(name: str) -> None:
    """Skip a test of a client that could not be installed, with pip's reason."""
    reason = ENVIRONMENT / f"no-{name}.txt"
    if reason.exists():
        pytest.skip(f"{name} could not be installed: {reason.read_text().strip()}")


@dataclass(frozen=True)
class Answer:
    """What our program was asked, with which prompt, and what it said."""

    picture: str
    question: str
    prompt: list[int]
    tokens: list[int]
    text: str


@dataclass(frozen=True)
class Asked:
    """Both exports of a model, and our answers from the `llava` one."""

    exports: dict[str, Path]
    answers: list[Answer]


def our_answer(model: Any, processor: Any, picture: Path, question: str) -> Answer:
    """As tools/generate.py answers."""
    content = [{"type": "image"}, {"type": "text", "text": question}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(text=text, images=[Image.open(picture).convert("RGB")], return_tensors="pt")
    output = model.generate(**inputs, **Decoding(MAX_NEW_TOKENS).options())[0].tolist()
    length = inputs["input_ids"].shape[1]
    answer = processor.decode(output[length:], skip_special_tokens=True)
    return Answer(str(picture), question, output[:length], output[length:], answer)
