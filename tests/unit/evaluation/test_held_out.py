"""Held-out questions: scores by category, the likelihood of right answers, and files that hold none."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ross.evaluation.chat_model import ChatModel
from megatron_ross.evaluation.generate import load_for_inference, open_image
from megatron_ross.evaluation.held_out import (
    GivenAnswer,
    answer_questions,
    category_scores,
    means_by_category,
    read_questions,
    write_answers,
)
from megatron_ross.evaluation.prompts import user_turn
from tests.helpers import golden

IMAGES = golden.GOLDEN / "preprocess" / "images"
ANSWERS = ("two red dogs", "a")


@functools.cache
def loaded() -> tuple[Any, Any]:
    return load_for_inference(str(golden.checkpoint_dir("qwen2_siglip")), device="cpu")


def given(category: str, correct: bool, loss: float) -> GivenAnswer:
    return GivenAnswer("a.jpg", category, "?", "x", "y", correct, loss)


def test_scores_by_category_and_over_all() -> None:
    answers = [given("digit", True, 1.0), given("count", False, 2.0), given("digit", False, 3.0)]
    assert category_scores(answers) == {
        "accuracy": {"digit": 50, "count": 0, "all": pytest.approx(100 / 3)},
        "loss": {"digit": 2, "count": 2, "all": 2},
    }


def test_accuracies_per_type_and_over_all_questions() -> None:
    result = means_by_category(["a", "b", "a", "a"], [100, 0, 0, 100])
    assert result == pytest.approx({"a": 200 / 3, "b": 0.0, "all": 50.0})


def test_losses_are_those_of_training_labels() -> None:
    """A batch of answers of different lengths against each alone, scored at the labels that training would set."""
    from megatron_ross.data.conversation import encode_conversation
    from megatron_ross.data.records import Turn
    from megatron_ross.huggingface.processing_ross import expand_image_tokens

    model, processor = loaded()
    questions = ["What is it?", "Which of the many things in this picture is the largest?"]
    pictures = [open_image(IMAGES / name) for name in ("square.png", "landscape.png")]
    asked = [[user_turn(question, [picture])] for question, picture in zip(questions, pictures, strict=True)]
    together = ChatModel(model, processor).score(asked, ANSWERS)
    for question, picture, answer, (loss, _) in zip(questions, pictures, ANSWERS, together, strict=True):
        turns = [Turn("human", f"<image>\n{question}"), Turn("gpt", answer)]
        one = encode_conversation(turns, "qwen_2", processor.text_tokenizer, num_images=1, max_length=500)
        ids = torch.tensor([expand_image_tokens(one.input_ids, processor.num_image_tokens)])
        num_supervised = sum(label >= 0 for label in one.labels)
        with torch.no_grad():
            logits = model(input_ids=ids, pixel_values=processor.pixels([picture])).logits[0, -num_supervised - 1 : -1]
        expected = torch.nn.functional.cross_entropy(logits, ids[0, -num_supervised:])
        assert loss == pytest.approx(float(expected), rel=1e-4)


def test_questions_are_read_answered_and_written(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A Dog"}]
    record = {"image": "square.png", "question_type": "thing", "conversations": turns}
    (tmp_path / "q.json").write_text(json.dumps([record, record]))
    questions = read_questions(tmp_path / "q.json", IMAGES)
    assert (questions[0].text, questions[0].expected, questions[0].category) == ("What is it?", "A Dog", "thing")
    answers = answer_questions(*loaded(), questions, batch_size=1)
    write_answers(answers, tmp_path / "out" / "a.json")
    written = json.loads((tmp_path / "out" / "a.json").read_text())
    assert [a["answer"] for a in written["answers"]] == [a.answer for a in answers]
    assert set(written["scores"]["accuracy"]) == {"thing", "all"}


@pytest.mark.parametrize("text", ["{", "[]", "3", '[{"image": "a"}]'])
def test_files_without_questions_are_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "q.json").write_text(text)
    with pytest.raises(ValueError, match="holds no"):
        read_questions(tmp_path / "q.json", tmp_path)
