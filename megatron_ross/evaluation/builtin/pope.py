"""POPE and other yes/no questions about objects in pictures: how often the model sees what is not there.

Data: JSON lines as published, {"question_id", "image", "text", "label": "yes" | "no"}, and a folder of images.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_ross.data.records import ImageRoot

PROMPTS = {
    "short": "{text}\nAnswer the question using a single word or phrase.",  # LLaVA's and lmms-eval's
    "plain": "{text}",
}


@dataclass(frozen=True)
class YesNoQuestion:
    """One line of the file."""

    text: str
    label: bool
    image: Path


def read_yes_no(file: Path, image_folder: Path) -> list[YesNoQuestion]:
    """All questions of a file.

    Raises:
        ValueError: a line cannot be understood, or its image is missing or lies outside the folder.
    """
    if not file.is_file():
        raise ValueError(f"{file} is missing: --pope-data must name a file with one JSON object per line")
    lines = [(n, line) for n, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1) if line.strip()]
    if not lines:
        raise ValueError(f"{file} holds no question")
    root = ImageRoot(image_folder)
    return [_read_line(line, root, f"{file}, line {number}") for number, line in lines]


def _read_line(line: str, root: ImageRoot, where: str) -> YesNoQuestion:
    try:
        record = json.loads(line)
        text, label, name = record["text"], record["label"].strip().lower(), record["image"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{where}: 'text', 'label' and 'image' are needed ({type(error).__name__}: {error})") from None
    if label not in ("yes", "no") or not isinstance(text, str) or not isinstance(name, str):
        raise ValueError(f"{where}: the label must be 'yes' or 'no', text and image must be strings")
    image = Path(root.resolve(name))
    if not image.is_file():
        raise ValueError(f"{where}: {image} is missing")
    return YesNoQuestion(text, label == "yes", image)


def says_yes(answer: str) -> bool:
    """LLaVA's reading of an answer: "no" unless the first sentence has none of the words No, no, not."""
    words = answer.split(".")[0].replace(",", "").split(" ")
    return not any(word in ("No", "no", "not") for word in words)


def yes_no_scores(said: Sequence[bool], labels: Sequence[bool]) -> dict[str, float]:
    """Accuracy, precision, recall, F1 of "yes", and the share of "yes" answers, in percent; 0 where undefined."""
    pairs = list(zip(said, labels, strict=True))
    true_yes = sum(answer and label for answer, label in pairs)
    precision = _percent(true_yes, sum(said))
    recall = _percent(true_yes, sum(labels))
    return {
        "accuracy": _percent(sum(answer == label for answer, label in pairs), len(pairs)),
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / (precision + recall) if precision + recall else 0.0,
        "yes_ratio": _percent(sum(said), len(pairs)),
    }


def _percent(part: int, whole: int) -> float:
    return 100 * part / whole if whole else 0.0
