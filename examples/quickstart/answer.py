"""Answer the held-out questions by greedy generation, once with the images and once with blank ones.

    python examples/quickstart/answer.py --checkpoint DIR --data DIR --output answers.json

A blank image is as large as the real one and has the tower's mean colour: what can be answered then needs no eyes. An
answer counts if it equals the expected one, letter case aside.
"""

from __future__ import annotations

import json
from pathlib import Path

from jsonargparse import auto_cli
from PIL import Image
from tqdm import tqdm

from megatron_ross.evaluation.answers import Question, answer_questions
from megatron_ross.evaluation.chat_model import ChatModel
from megatron_ross.evaluation.generate import load_for_inference, open_image
from megatron_ross.evaluation.held_out import OVERALL, means_by_category, read_questions
from megatron_ross.evaluation.options import Decoding
from megatron_ross.huggingface import RossProcessor

DECODING = Decoding(max_new_tokens=8)  # greedy


def blank(image: Image.Image, processor: RossProcessor) -> Image.Image:
    """An empty picture of the same size."""
    return Image.new("RGB", image.size, processor.image_transform.pad_colour)


def answer_all(checkpoint: Path, data: Path, output: Path, batch_size: int = 60) -> None:
    """Write accuracies and every answer.

    Args:
        checkpoint: exported composite checkpoint.
        data: folder that make_data.py wrote; heldout.json is answered.
        output: JSON file: {"accuracy": {"image" | "blank": {type: percent}}, "answers": [...]}.
    """
    model, processor = load_for_inference(str(checkpoint))
    folder = data / "images"
    questions = read_questions(data / "heldout.json", folder)
    asked = {
        "image": [Question(q.text, q.image) for q in questions],
        "blank": [Question(q.text, blank(open_image(q.image), processor)) for q in questions],
    }
    given: dict[str, list[str]] = {}
    for kind, about in asked.items():
        answers = answer_questions(ChatModel(model, processor), about, DECODING, batch_size)
        given[kind] = list(tqdm(answers, desc=f"answers, {kind}", total=len(about), unit="question"))
    categories = [q.category for q in questions]
    accuracy = {
        kind: means_by_category(
            categories, [100 * q.is_answered_by(a) for a, q in zip(answers, questions, strict=True)]
        )
        for kind, answers in given.items()
    }
    rows = [
        {
            "image": str(q.image.relative_to(folder)),
            "question": q.text,
            "expected": q.expected,
            "answer": a,
            "blank_answer": b,
        }
        for q, a, b in zip(questions, given["image"], given["blank"], strict=True)
    ]
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps({"accuracy": accuracy, "answers": rows}, indent=1))
    with_images, without = accuracy["image"][OVERALL], accuracy["blank"][OVERALL]
    print(f"{len(questions)} questions: {with_images:.1f} % with images, {without:.1f} % with blank ones")


if __name__ == "__main__":
    auto_cli(answer_all, as_positional=False)
