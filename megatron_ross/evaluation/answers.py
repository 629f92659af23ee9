"""Answers of a loaded model to many questions about one image each, in batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from megatron_ross.evaluation.chat_model import ChatModel
from megatron_ross.evaluation.generate import open_image
from megatron_ross.evaluation.options import Decoding
from megatron_ross.evaluation.prompts import user_turn


@dataclass(frozen=True)
class Question:
    """Text without image tags, and the picture it is about: a file, or already opened."""

    text: str
    image: Path | Image.Image


def answer_questions(
    model: ChatModel, questions: Sequence[Question], decoding: Decoding, batch_size: int
) -> Iterator[str]:
    """Answers without special tokens and outer blanks, in the order of the questions; a batch is in memory at a time.

    Raises:
        ValueError: a file is no image. OSError: it cannot be read.
    """
    for start in range(0, len(questions), batch_size):
        batch = questions[start : start + batch_size]
        images = [q.image if isinstance(q.image, Image.Image) else open_image(q.image) for q in batch]
        yield from model.answer([[user_turn(q.text, [i])] for q, i in zip(batch, images, strict=True)], decoding)
