"""Held-out questions with short answers: greedy answers compared word by word, and how likely the right answer was.

Questions are single-turn LLaVA records with one image; the key "question_type" puts them into categories.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from megatron_ross.data.tokenizer import IMAGE_PLACEHOLDER
from megatron_ross.evaluation.answers import answer_batch
from megatron_ross.evaluation.generate import Decoding, open_image
from megatron_ross.huggingface import RossProcessor

MAX_NEW_TOKENS = 16
OVERALL = "all"
"""Category of all questions together."""


@dataclass(frozen=True)
class HeldOutQuestion:
    """One question, the image's path and the expected answer."""

    category: str
    image: Path
    text: str
    expected: str


@dataclass(frozen=True)
class GivenAnswer:
    """A question's answer: as given, whether it equals the expected one (letter case aside), and the mean negative log
    likelihood of the expected answer's tokens in nats."""

    image: str
    category: str
    question: str
    expected: str
    answer: str
    correct: bool
    loss: float


def read_questions(path: Path, image_folder: Path) -> list[HeldOutQuestion]:
    """Questions of a LLaVA-format JSON file.

    Raises:
        ValueError: the file holds no such records, or one has no category.
    """
    try:
        records = json.loads(path.read_text())
        questions = [
            HeldOutQuestion(
                category=record["question_type"],
                image=image_folder / record["image"],
                text=record["conversations"][0]["value"].replace(IMAGE_PLACEHOLDER, "").strip(),
                expected=record["conversations"][1]["value"],
            )
            for record in records
        ]
    except (ValueError, TypeError, KeyError, IndexError) as error:
        raise ValueError(
            f"{path} holds no held-out questions ({type(error).__name__} {error}): a list of records with image, "
            "question_type and one question and answer in conversations"
        ) from None
    if not questions:
        raise ValueError(f"{path} holds no questions")
    return questions


def answer_questions(
    model: Any, processor: RossProcessor, questions: Sequence[HeldOutQuestion], batch_size: int
) -> list[GivenAnswer]:
    """Answer all questions greedily, with a progress bar."""
    given: list[GivenAnswer] = []
    for start in tqdm(range(0, len(questions), batch_size), desc="answers", unit="batch"):
        batch = questions[start : start + batch_size]
        images = [open_image(question.image) for question in batch]
        texts = [question.text for question in batch]
        expected = [question.expected for question in batch]
        answers = answer_batch(model, processor, texts, images, Decoding(MAX_NEW_TOKENS))
        losses = answer_losses(model, processor, texts, images, expected)
        given += [
            GivenAnswer(q.image.name, q.category, q.text, q.expected, a, a.lower() == q.expected.lower(), loss)
            for q, a, loss in zip(batch, answers, losses, strict=True)
        ]
    return given


@torch.inference_mode()
def answer_losses(
    model: Any,
    processor: RossProcessor,
    questions: Sequence[str],
    images: list[Image.Image],
    answers: Sequence[str],
) -> list[float]:
    """Mean negative log likelihood per token, in nats, of each answer and the token that ends it."""
    turns = [[{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}] for text in questions]
    prompts = [processor.apply_chat_template(turn, add_generation_prompt=True) for turn in turns]
    inputs = processor(text=prompts, images=images).to(model.device)
    ids = []
    for turn, prompt, answer in zip(turns, prompts, answers, strict=True):
        reply = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
        whole = processor.apply_chat_template([*turn, reply])
        ids.append(torch.tensor(processor.text_tokenizer.encode(whole.removeprefix(prompt))))
    answer_ids = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True).to(model.device)
    lengths = torch.tensor([len(row) for row in ids], device=model.device)
    known = torch.arange(answer_ids.shape[1], device=model.device) < lengths[:, None]
    logits = model(
        input_ids=torch.cat([inputs["input_ids"], answer_ids], dim=1),  # prompts are padded on the left
        attention_mask=torch.cat([inputs["attention_mask"], known.long()], dim=1),
        pixel_values=inputs["pixel_values"],
    ).logits[:, -answer_ids.shape[1] - 1 : -1]
    losses: Tensor = F.cross_entropy(logits.float().transpose(1, 2), answer_ids, reduction="none") * known
    return (losses.sum(1) / lengths).tolist()


def category_scores(answers: Sequence[GivenAnswer]) -> dict[str, dict[str, float]]:
    """{"accuracy": percent correct, "loss": mean loss in nats} per category and, under `OVERALL`, over all answers."""
    groups = {name: [a for a in answers if a.category == name] for name in dict.fromkeys(a.category for a in answers)}
    groups[OVERALL] = list(answers)
    return {
        "accuracy": {name: 100 * sum(a.correct for a in group) / len(group) for name, group in groups.items()},
        "loss": {name: sum(a.loss for a in group) / len(group) for name, group in groups.items()},
    }


def write_answers(answers: Sequence[GivenAnswer], path: Path) -> dict[str, dict[str, float]]:
    """Write scores and every answer as JSON; returns the scores."""
    scores = category_scores(answers)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"scores": scores, "answers": [asdict(answer) for answer in answers]}, indent=1) + "\n")
    return scores
