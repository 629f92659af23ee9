"""MMVP: 150 pairs of pictures that CLIP confuses, one question with two options about both; both answers must be right.

Data: the folder of the published data set, with Questions.csv and "MMVP Images/1.jpg" ... "300.jpg"; or a folder with
parquet files that have the same columns and the pictures in `image`.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from megatron_ross.data.images import open_decodable
from megatron_ross.evaluation.options import Decoding

QUESTIONS_FILE, IMAGES_FOLDER = "Questions.csv", "MMVP Images"
GREEDY = Decoding(max_new_tokens=16)
PUBLISHED = Decoding(max_new_tokens=16, temperature=0.7, top_p=0.8, top_k=20)  # of Ross's script, with seed 42
CORRECTED = {99: "b", 100: "a", 279: "b", 280: "a"}  # the published labels of these two pairs are swapped

_OPTIONS = re.compile(r"\(a\)(.*)\(b\)(.*)", re.IGNORECASE | re.DOTALL)
_LETTER = re.compile(r"\b([ab])\b")


@dataclass(frozen=True)
class MmvpQuestion:
    """One row of the table. Rows 1 and 2 are a pair, 3 and 4 the next."""

    index: int
    text: str
    options: tuple[str, str]
    label: str  # "a" or "b"
    image: Path | Image.Image

    def prompt(self) -> str:
        """The published wording."""
        first, second = self.options
        instruction = "Answer with the option's letter from the given choices directly."
        return f"{self.text} Options:\nA. {first}\nB. {second}\n{instruction}"


def read_mmvp(folder: Path, corrected_labels: bool = False) -> list[MmvpQuestion]:
    """All questions in the order of their index.

    Args:
        corrected_labels: mend the labels known to be wrong; the published figures are without.

    Raises:
        ValueError: a row or picture is missing or cannot be understood; the message names it.
    """
    table = folder / QUESTIONS_FILE
    parquet = sorted(folder.rglob("*.parquet"))
    if table.is_file():
        with table.open(encoding="utf-8-sig", newline="") as file:
            rows = [_read_row(r, folder, f"{table}, row {n}") for n, r in enumerate(csv.DictReader(file), 2)]
    elif parquet:
        rows = _read_parquet(parquet)
    else:
        raise ValueError(
            f"{table} is missing: --mmvp-data must name the folder with {QUESTIONS_FILE} and '{IMAGES_FOLDER}', or one "
            "with parquet files (the hub has both: MMVP/MMVP and lmms-lab-eval/MMVP)"
        )
    questions = sorted(rows, key=lambda question: question.index)
    if not questions or [question.index for question in questions] != list(range(1, len(questions) + 1)):
        raise ValueError(f"{folder}: indices must be 1, 2, 3, ... without a gap")
    if len(questions) % 2:
        raise ValueError(f"{folder}: {len(questions)} questions are no pairs")
    return [_corrected(question) for question in questions] if corrected_labels else questions


def _read_row(row: dict[str, Any], folder: Path | None, where: str) -> MmvpQuestion:
    """A row of the table; its picture is a file of `folder`, or bytes in the row."""
    fields = {str(name).strip().lower(): value for name, value in row.items()}
    index = str(fields.get("index") or fields.get("lndex") or "")  # the published header begins with a small L
    options = _OPTIONS.search(fields.get("options") or "")
    label = str(fields.get("correct answer") or fields.get("answer") or "").strip().lower().strip("()")
    if not index.isdecimal() or options is None or label not in ("a", "b"):
        shown = {name: value for name, value in row.items() if name != "image"}
        raise ValueError(
            f"{where}: an index, options '(a) ... (b) ...' and an answer '(a)' or '(b)' are needed: {shown}"
        )
    if folder is None:
        image: Path | Image.Image = open_decodable((fields.get("image") or {}).get("bytes") or b"", where)
    else:
        image = folder / IMAGES_FOLDER / f"{int(index)}.jpg"
        if not image.is_file():
            raise ValueError(f"{where}: {image} is missing")
    first, second = (option.strip() for option in options.groups())
    return MmvpQuestion(int(index), str(fields.get("question") or "").strip(), (first, second), label, image)


def _read_parquet(files: Sequence[Path]) -> list[MmvpQuestion]:
    from pyarrow import parquet  # only they need it

    rows = [(file, n, row) for file in files for n, row in enumerate(parquet.read_table(file).to_pylist(), 1)]
    return [_read_row(row, None, f"{file}, row {n}") for file, n, row in rows]


def _corrected(question: MmvpQuestion) -> MmvpQuestion:
    return replace(question, label=CORRECTED.get(question.index, question.label))


def is_correct(answer: str, question: MmvpQuestion, lenient: bool = False) -> bool:
    """Whether an answer counts.

    Args:
        lenient: the first "a" or "b" that is a word counts. The published rule wants the letter or the option's full
            text and nothing else ("A. Open" is wrong).
    """
    given = re.split(r"answer is|answer:", answer.lower())[-1].strip()
    if lenient and (letter := _LETTER.search(given)):
        return letter.group(1) == question.label
    given = given.rstrip(".:,").lstrip("(").rstrip(")").strip()
    return given in (question.label, question.options["ab".index(question.label)].lower())


def mmvp_scores(correct: Sequence[bool]) -> dict[str, float]:
    """Percentages of questions and of pairs; `correct` in the order of the index."""
    pairs = [first and second for first, second in zip(correct[::2], correct[1::2], strict=True)]
    return {"accuracy": 100 * sum(correct) / len(correct), "pair_accuracy": 100 * sum(pairs) / len(pairs)}
