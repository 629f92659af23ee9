"""Functions of the local tasks beside this file, in lmms-eval's conventions."""

from __future__ import annotations

from typing import Any

from PIL import Image


def pictures(doc: dict[str, Any]) -> list[Image.Image]:
    """A record's picture."""
    return [Image.open(doc["image"]).convert("RGB")]


def question(doc: dict[str, Any], lmms_eval_specific_kwargs: dict[str, str]) -> str:
    """Its question, as the task words it."""
    return doc["question"] + lmms_eval_specific_kwargs["post_prompt"]


def plain_question(doc: dict[str, Any]) -> str:
    """Its question alone."""
    return doc["question"]


def candidates(doc: dict[str, Any]) -> list[str]:
    """Its candidate answers."""
    return doc["candidates"]


def first_candidate(doc: dict[str, Any]) -> str:
    """The text whose likelihood is asked for."""
    return doc["candidates"][0]


def loss(doc: dict[str, Any], results: list[Any]) -> dict[str, float]:
    """What the model returned for it."""
    return {"loss": results[0][0]}


def exact(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Whether the answer is the expected one."""
    return {"right": float(results[0] == doc["answer"])}


def crash(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Fails as a task with a bug does."""
    raise KeyError("no such field in the record")


def rounds(
    doc: dict[str, Any],
    lmms_eval_specific_kwargs: dict[str, str] | None = None,
    previous_output: list[str] | None = None,
    round_idx: int | None = None,
    previous_round_info: int | None = None,
) -> Any:
    """First the question, then "Are you sure?" with the picture again, then enough."""
    if round_idx is None:
        return doc["question"]
    return pictures(doc), "Are you sure?", round_idx == 2, previous_output, (previous_round_info or 0) + 1


def last_round(doc: dict[str, Any], results: list[Any]) -> dict[str, float]:
    """Number of answers given."""
    answers = results[0]
    return {"num_answers": float(len(answers))}
