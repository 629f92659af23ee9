"""Answers of a loaded model to many questions about one image each, in batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from megatron_ross.evaluation.generate import Decoding, open_image
from megatron_ross.huggingface import RossProcessor


@dataclass(frozen=True)
class Question:
    """Text without image tags, and the picture it is about."""

    text: str
    image: Path


def answer_batch(
    model: Any, processor: RossProcessor, questions: Sequence[str], images: list[Image.Image], decoding: Decoding
) -> list[str]:
    """Answers without special tokens and outer blanks, one for each question and image."""
    prompts = [
        processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}],
            add_generation_prompt=True,
        )
        for question in questions
    ]
    inputs = processor(text=prompts, images=images).to(model.device)
    with torch.inference_mode():
        output = model.generate(**inputs, **decoding.options())
    answers = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [answer.strip() for answer in answers]


def answer_files(
    model: Any, processor: RossProcessor, questions: Sequence[Question], decoding: Decoding, batch_size: int
) -> Iterator[str]:
    """The answers in the order of the questions; a batch is in memory at a time.

    Raises:
        ValueError: a file is no image. OSError: it cannot be read.
    """
    for start in range(0, len(questions), batch_size):
        batch = questions[start : start + batch_size]
        images = [open_image(question.image) for question in batch]
        yield from answer_batch(model, processor, [question.text for question in batch], images, decoding)
