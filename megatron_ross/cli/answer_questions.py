"""Answer held-out questions with short answers; accuracy and answer likelihood per category.

megatron-ross answer-questions --checkpoint DIR --questions heldout.json --images FOLDER --output answers.json
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from megatron_ross.cli.command import at_least_one, parse_options, run_command
from megatron_ross.cli.inference import add_model_options, check_model_options, load


def add_options(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("--questions", type=Path, required=True, help="single-turn LLaVA records with question_type")
    add("--images", type=Path, required=True, help="folder that the records' images are relative to")
    add("--output", type=Path, required=True, help="JSON file for scores and answers")
    add("--batch-size", type=int, default=60, help="questions at a time")
    add_model_options(parser, everything=False)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0, or 1 after a one-line error."""
    return run_command(lambda: answer(parse_options(__doc__.splitlines()[0], add_options, arguments)))


def answer(options: Namespace) -> int:
    """Answer all questions. Raises ValueError, OSError."""
    at_least_one(options, "batch_size")
    if not options.questions.is_file():
        raise ValueError(f"questions={options.questions}: no such file")
    check_model_options(options)
    from megatron_ross.evaluation.held_out import OVERALL, answer_questions, read_questions, write_answers

    questions = read_questions(options.questions, options.images)
    model, processor = load(options)
    scores = write_answers(answer_questions(model, processor, questions, options.batch_size), options.output)
    accuracy, loss = scores["accuracy"][OVERALL], scores["loss"][OVERALL]
    print(f"{len(questions)} questions in {options.output}: {accuracy:.1f} % correct, loss {loss:.3f}")
    return 0
