"""Answer the held-out questions by greedy generation, once with the images and once with blank ones.

    python examples/quickstart/answer.py --checkpoint DIR --data DIR --output answers.json

A blank image is as large as the real one and has the tower's mean colour: what can be answered then needs no eyes. An
answer counts if it equals the expected one, letter case aside.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from jsonargparse import auto_cli
from PIL import Image
from tqdm import tqdm

from megatron_ross.data.tokenizer import IMAGE_PLACEHOLDER
from megatron_ross.evaluation.answers import answer_batch
from megatron_ross.evaluation.generate import Decoding, load_for_inference, open_image
from megatron_ross.huggingface import RossProcessor

DECODING = Decoding(max_new_tokens=8)  # greedy


def blank(image: Image.Image, processor: RossProcessor) -> Image.Image:
    """An empty picture of the same size."""
    return Image.new("RGB", image.size, processor.image_transform.pad_colour)


def accuracies(types: Sequence[str], correct: Sequence[bool]) -> dict[str, float]:
    """Percentage of correct answers per question type and, under "all", over all questions."""
    kinds = {kind: [c for t, c in zip(types, correct, strict=True) if t == kind] for kind in dict.fromkeys(types)}
    return {kind: 100 * sum(values) / len(values) for kind, values in {**kinds, "all": list(correct)}.items()}


def answer_all(checkpoint: Path, data: Path, output: Path, batch_size: int = 60) -> None:
    """Write accuracies and every answer.

    Args:
        checkpoint: exported composite checkpoint.
        data: folder that make_data.py wrote; heldout.json is answered.
        output: JSON file: {"accuracy": {"image" | "blank": {type: percent}}, "answers": [...]}.
    """
    model, processor = load_for_inference(str(checkpoint))
    records = json.loads((data / "heldout.json").read_text())
    questions = [r["conversations"][0]["value"].replace(IMAGE_PLACEHOLDER, "").strip() for r in records]
    expected = [r["conversations"][1]["value"] for r in records]
    given: dict[str, list[str]] = {"image": [], "blank": []}
    for start in tqdm(range(0, len(records), batch_size), desc="answers", unit="batch"):
        chosen = slice(start, start + batch_size)
        images = [open_image(data / "images" / r["image"]) for r in records[chosen]]
        given["image"] += answer_batch(model, processor, questions[chosen], images, DECODING)
        empty = [blank(image, processor) for image in images]
        given["blank"] += answer_batch(model, processor, questions[chosen], empty, DECODING)
    types = [r["question_type"] for r in records]
    correct = {k: [a.lower() == e.lower() for a, e in zip(v, expected, strict=True)] for k, v in given.items()}
    accuracy = {kind: accuracies(types, values) for kind, values in correct.items()}
    answers = [
        {"image": r["image"], "question": q, "expected": e, "answer": a, "blank_answer": b}
        for r, q, e, a, b in zip(records, questions, expected, given["image"], given["blank"], strict=True)
    ]
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps({"accuracy": accuracy, "answers": answers}, indent=1))
    with_images, without = accuracy["image"]["all"], accuracy["blank"]["all"]
    print(f"{len(records)} questions: {with_images:.1f} % with images, {without:.1f} % with blank ones")


if __name__ == "__main__":
    auto_cli(answer_all, as_positional=False)
