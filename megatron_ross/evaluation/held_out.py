"""Held-out questions with short answers: greedy answers compared word by word, and how likely the right answer was.

Questions are single-turn LLaVA records with one image; the key "question_type" puts them into categories.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron_ross.data.tokenizer import IMAGE_PLACEHOLDER
from megatron_ross.evaluation.chat_model import ChatModel
from megatron_ross.evaluation.generate import open_image
from megatron_ross.evaluation.options import Decoding
from megatron_ross.evaluation.prompts import user_turn
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

    def is_answered_by(self, answer: str) -> bool:
        """It equals the expected one, letter case aside."""
        return answer.lower() == self.expected.lower()


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
    """Answer all questions greedily and score the expected answers, with a progress bar."""
    chat = ChatModel(model, processor)
    given: list[GivenAnswer] = []
    for start in tqdm(range(0, len(questions), batch_size), desc="answers", unit="batch"):
        batch = questions[start : start + batch_size]
        asked = [[user_turn(question.text, [open_image(question.image)])] for question in batch]
        answers = chat.answer(asked, Decoding(MAX_NEW_TOKENS))
        scores = chat.score(asked, [question.expected for question in batch])
        given += [
            GivenAnswer(q.image.name, q.category, q.text, q.expected, a, q.is_answered_by(a), loss)
            for q, a, (loss, _) in zip(batch, answers, scores, strict=True)
        ]
    return given


def means_by_category(categories: Sequence[str], values: Sequence[float]) -> dict[str, float]:
    """Mean of the values of every category and, under `OVERALL`, of all."""
    groups = {
        name: [v for c, v in zip(categories, values, strict=True) if c == name] for name in dict.fromkeys(categories)
    }
    return {name: sum(group) / len(group) for name, group in {**groups, OVERALL: list(values)}.items()}


def category_scores(answers: Sequence[GivenAnswer]) -> dict[str, dict[str, float]]:
    """{"accuracy": percent correct, "loss": mean loss in nats} per category and, under `OVERALL`, over all answers."""
    categories = [a.category for a in answers]
    return {
        "accuracy": means_by_category(categories, [100 * a.correct for a in answers]),
        "loss": means_by_category(categories, [a.loss for a in answers]),
    }


def write_answers(answers: Sequence[GivenAnswer], path: Path) -> dict[str, dict[str, float]]:
    """Write scores and every answer as JSON; returns the scores."""
    scores = category_scores(answers)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"scores": scores, "answers": [asdict(answer) for answer in answers]}, indent=1) + "\n")
    return scores
