"""Answer held-out questions with short answers; accuracy and answer likelihood per category.

megatron-ross answer-questions --checkpoint DIR --questions heldout.json --images FOLDER --output answers.json
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from megatron_ross.cli.command import MODEL_HELP, parse_options, run_command


def add_options(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("--checkpoint", type=str, required=True, help=MODEL_HELP)
    add("--questions", type=Path, required=True, help="single-turn LLaVA records with question_type")
    add("--images", type=Path, required=True, help="folder that the records' images are relative to")
    add("--output", type=Path, required=True, help="JSON file for scores and answers")
    add("--batch-size", type=int, default=60, help="questions at a time")
    add("--device", type=str | None, default=None, help="default: the GPU if there is one")
    add("--dtype", type=str, default="auto", help="of LLM and tower: auto, bf16, fp16 or fp32")


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0, or 1 after a one-line error."""
    return run_command(lambda: answer(parse_options(__doc__.splitlines()[0], add_options, arguments)))


def answer(options: Namespace) -> int:
    """Answer all questions. Raises ValueError, OSError."""
    from megatron_ross.evaluation.exports import check_model, exported_folder

    check_model(options.checkpoint)  # refused before the libraries below are imported
    from megatron_ross.evaluation.generate import load_for_inference
    from megatron_ross.evaluation.held_out import OVERALL, answer_questions, read_questions, write_answers

    questions = read_questions(options.questions, options.images)
    model, processor = load_for_inference(
        str(exported_folder(options.checkpoint)), device=options.device, dtype=options.dtype
    )
    scores = write_answers(answer_questions(model, processor, questions, options.batch_size), options.output)
    accuracy, loss = scores["accuracy"][OVERALL], scores["loss"][OVERALL]
    print(f"{len(questions)} questions in {options.output}: {accuracy:.1f} % correct, loss {loss:.3f}")
    return 0
