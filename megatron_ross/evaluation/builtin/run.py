"""Run the built-in evaluators on a loaded checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from megatron_ross.evaluation.answers import Question, answer_questions
from megatron_ross.evaluation.builtin import mmvp, pope
from megatron_ross.evaluation.chat_model import ChatModel
from megatron_ross.evaluation.options import Decoding
from megatron_ross.evaluation.reconstruct import mean_figures, reconstruct_folder

TASKS = ("mmvp", "pope", "reconstruction")
POPE_DECODING = Decoding(max_new_tokens=16)
MMVP_DECODING = {"greedy": mmvp.GREEDY, "published": mmvp.PUBLISHED}


@dataclass(frozen=True)
class BuiltinOptions:
    """Where the data of the built-in tasks is, and how answers are taken."""

    mmvp_data: Path | None = None
    """MMVP's folder."""
    decoding: str | None = None
    """MMVP: greedy, or published sampling; default: the preset's."""
    corrected_labels: bool = False
    """MMVP: mend four published labels."""
    lenient: bool = False
    """MMVP: accept a letter anywhere in the answer."""
    pope_data: Path | None = None
    """POPE: JSON lines."""
    pope_images: Path | None = None
    """POPE: the folder of the pictures they name."""
    pope_prompt: str = "short"
    """POPE: one of `pope.PROMPTS`."""
    reconstruction_images: Path | None = None
    """Reconstruction: folder of pictures."""
    reconstruction_steps: str = "250"
    """Reconstruction: sampling steps."""
    batch_size: int = 8
    seed: int = 42
    limit: int | None = None
    """At most so many questions or pictures (of MMVP an even number)."""


@dataclass(frozen=True)
class BuiltinResult:
    """Scores, and one row for each question."""

    scores: dict[str, float]
    rows: list[dict[str, Any]]


def check_options(task: str, options: BuiltinOptions) -> None:
    """Refuse, before a model is loaded, what cannot work.

    Raises:
        ValueError: unknown task, missing or wrong data, or an impossible setting.
    """
    needed: dict[str, tuple[str, ...]] = {
        "mmvp": ("mmvp_data",),
        "pope": ("pope_data", "pope_images"),
        "reconstruction": ("reconstruction_images",),
    }
    if task not in needed:
        raise ValueError(f"there is no built-in evaluator for {task!r}, only for {', '.join(TASKS)}")
    for name in needed[task]:
        if getattr(options, name) is None:
            raise ValueError(
                f"the built-in {task} needs --{name.replace('_', '-')}: docs/evaluation.md says what it is"
            )
    if options.decoding is not None and options.decoding not in MMVP_DECODING:
        raise ValueError(f"decoding {options.decoding!r} is unknown; use {' or '.join(MMVP_DECODING)}")
    if options.pope_prompt not in pope.PROMPTS:
        raise ValueError(f"pope-prompt {options.pope_prompt!r} is unknown; use {' or '.join(pope.PROMPTS)}")
    if options.batch_size < 1:
        raise ValueError(f"batch-size is {options.batch_size}, it must be at least 1")
    if options.limit is not None and options.limit < 1:
        raise ValueError(f"limit is {options.limit}, it must be at least 1")
    if task == "mmvp":
        _mmvp_questions(options)
    if task == "pope":
        _pope_questions(options)


def run_task(task: str, model: ChatModel, options: BuiltinOptions, output: Path) -> BuiltinResult:
    """Ask and score.

    Raises:
        ValueError: data is missing or wrong, or the checkpoint cannot do the task.
    """
    check_options(task, options)
    if task == "mmvp":
        return _mmvp(model, options)
    return _pope(model, options) if task == "pope" else _reconstruction(model, options, output)


def _mmvp_questions(options: BuiltinOptions) -> list[mmvp.MmvpQuestion]:
    assert options.mmvp_data is not None
    questions = mmvp.read_mmvp(options.mmvp_data, options.corrected_labels)[: options.limit]
    if len(questions) % 2:
        raise ValueError(f"limit is {options.limit}, MMVP goes in pairs: give an even number")
    return questions


def _mmvp(model: ChatModel, options: BuiltinOptions) -> BuiltinResult:
    questions = _mmvp_questions(options)
    decoding = MMVP_DECODING[options.decoding or ("published" if model.preset.sample_mmvp else "greedy")]
    answers = _ask(model, [Question(q.prompt(), q.image) for q in questions], decoding, options, "mmvp")
    correct = [mmvp.is_correct(a, q, options.lenient) for a, q in zip(answers, questions, strict=True)]
    rows = [
        {"index": q.index, "question": q.text, "options": q.options, "label": q.label, "answer": a, "correct": c}
        for q, a, c in zip(questions, answers, correct, strict=True)
    ]
    return BuiltinResult(mmvp.mmvp_scores(correct), rows)


def _pope_questions(options: BuiltinOptions) -> list[pope.YesNoQuestion]:
    assert options.pope_data is not None
    assert options.pope_images is not None
    return pope.read_yes_no(options.pope_data, options.pope_images)[: options.limit]


def _pope(model: ChatModel, options: BuiltinOptions) -> BuiltinResult:
    questions = _pope_questions(options)
    wording = pope.PROMPTS[options.pope_prompt]
    asked = [Question(wording.format(text=q.text), q.image) for q in questions]
    answers = _ask(model, asked, POPE_DECODING, options, "pope")
    said = [pope.says_yes(answer) for answer in answers]
    rows = [
        {"image": str(q.image), "question": q.text, "label": q.label, "answer": a, "said_yes": s}
        for q, a, s in zip(questions, answers, said, strict=True)
    ]
    return BuiltinResult(pope.yes_no_scores(said, [q.label for q in questions]), rows)


def _reconstruction(model: ChatModel, options: BuiltinOptions, output: Path) -> BuiltinResult:
    assert options.reconstruction_images is not None
    if getattr(model.model.config, "denoiser", None) is None:
        raise ValueError(
            "the checkpoint has no denoiser and auto-encoder, so nothing can be reconstructed: leave out the task "
            "reconstruction, or name a Ross checkpoint (in the ross format; llava exports leave them out)"
        )
    figures = reconstruct_folder(
        model.model,
        model.processor,
        options.reconstruction_images,
        output / "reconstructions",
        steps=options.reconstruction_steps,
        seed=options.seed,
        batch_size=options.batch_size,
        limit=options.limit,
    )
    return BuiltinResult(mean_figures(figures), [vars(figure) for figure in figures])


def _ask(
    model: ChatModel, questions: Sequence[Question], decoding: Decoding, options: BuiltinOptions, task: str
) -> list[str]:
    """The answers, with a progress bar."""
    torch.manual_seed(options.seed)
    answers = answer_questions(model, questions, decoding, options.batch_size)
    return list(tqdm(answers, total=len(questions), desc=task, unit="question"))
