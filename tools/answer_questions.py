"""Answer held-out questions with short answers; accuracy and answer likelihood per category.

python tools/answer_questions.py --checkpoint DIR --questions heldout.json --images FOLDER --output answers.json
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from megatron_ross.evaluation.generate import load_for_inference
from megatron_ross.evaluation.held_out import OVERALL, answer_questions, read_questions, write_answers


def parse(arguments: Sequence[str] | None) -> Namespace:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=str, required=True, help="folder or hub id of a composite Ross checkpoint")
    parser.add_argument("--questions", type=Path, required=True, help="single-turn LLaVA records with question_type")
    parser.add_argument("--images", type=Path, required=True, help="folder that the records' images are relative to")
    parser.add_argument("--output", type=Path, required=True, help="JSON file for scores and answers")
    parser.add_argument("--batch-size", type=int, default=60, help="questions at a time")
    parser.add_argument("--device", type=str | None, default=None, help="default: the GPU if there is one")
    parser.add_argument("--dtype", type=str, default="auto", help="of LLM and tower: auto, bf16, fp16 or fp32")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0, or 1 after a one-line error."""
    args = parse(arguments)
    try:
        questions = read_questions(args.questions, args.images)
        model, processor = load_for_inference(args.checkpoint, device=args.device, dtype=args.dtype)
        scores = write_answers(answer_questions(model, processor, questions, args.batch_size), args.output)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    accuracy, loss = scores["accuracy"][OVERALL], scores["loss"][OVERALL]
    print(f"{len(questions)} questions in {args.output}: {accuracy:.1f} % correct, loss {loss:.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
