"""Evaluate a Ross checkpoint on MMVP or on yes/no questions such as POPE, without an evaluation framework.

python tools/evaluate.py --checkpoint DIR --task mmvp --data MMVP --output results
python tools/evaluate.py --checkpoint DIR --task pope --data coco_pope_random.json --images val2014 --output results
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser, Namespace
from tqdm import tqdm

from megatron_ross.evaluation import mmvp, pope
from megatron_ross.evaluation.answers import Question, answer_files
from megatron_ross.evaluation.generate import Decoding, load_for_inference

MMVP_DECODING = {"greedy": mmvp.GREEDY, "published": mmvp.PUBLISHED}
POPE_DECODING = Decoding(max_new_tokens=16)


def parse(arguments: Sequence[str] | None) -> Namespace:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=str, required=True, help="folder or hub id of a composite Ross checkpoint")
    parser.add_argument("--task", choices=("mmvp", "pope"), required=True, help="what to ask")
    parser.add_argument("--data", type=Path, required=True, help="mmvp: the data set's folder; pope: a JSON lines file")
    parser.add_argument("--images", type=Path | None, default=None, help="pope: the folder of the images")
    parser.add_argument("--output", type=Path, required=True, help="folder for TASK.json, TASK.md and TASK.jsonl")
    parser.add_argument("--decoding", choices=tuple(MMVP_DECODING), default="greedy", help="mmvp: published samples")
    parser.add_argument("--corrected-labels", type=bool, default=False, help="mmvp: mend four published labels")
    parser.add_argument("--lenient", type=bool, default=False, help="mmvp: accept a letter anywhere in the answer")
    parser.add_argument("--prompt", choices=tuple(pope.PROMPTS), default="short", help="pope: wording")
    parser.add_argument("--batch-size", type=int, default=8, help="questions at a time")
    parser.add_argument("--seed", type=int, default=42, help="of sampling")
    parser.add_argument("--template", type=str | None, default=None, help="qwen_2, v1, llama3 or plain")
    parser.add_argument("--device", type=str | None, default=None, help="default: the GPU if there is one")
    parser.add_argument("--dtype", type=str, default="auto", help="auto, bf16, fp16 or fp32")
    parser.add_argument("--vision-tower", type=str | None, default=None, help="folder with the tower's config")
    parser.add_argument("--vae", type=str | None, default=None, help="folder with the auto-encoder's config")
    return parser.parse_args(arguments)


def load(args: Namespace) -> tuple[Any, Any]:
    """Model and processor."""
    return load_for_inference(
        args.checkpoint,
        device=args.device,
        dtype=args.dtype,
        template=args.template,
        vision_tower=args.vision_tower,
        vae=args.vae,
    )


def ask(args: Namespace, questions: list[Question], decoding: Decoding) -> list[str]:
    """The model's answers, with a progress bar."""
    model, processor = load(args)
    torch.manual_seed(args.seed)
    answers = answer_files(model, processor, questions, decoding, args.batch_size)
    return list(tqdm(answers, total=len(questions), desc=args.task, unit="question"))


def evaluate_mmvp(args: Namespace) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Scores, and one row per question."""
    questions = mmvp.read_mmvp(args.data, args.corrected_labels)
    answers = ask(args, [Question(q.prompt(), q.image) for q in questions], MMVP_DECODING[args.decoding])
    correct = [mmvp.is_correct(a, q, args.lenient) for a, q in zip(answers, questions, strict=True)]
    rows = [
        {"index": q.index, "question": q.text, "options": q.options, "label": q.label, "answer": a, "correct": c}
        for q, a, c in zip(questions, answers, correct, strict=True)
    ]
    return mmvp.mmvp_scores(correct), rows


def evaluate_pope(args: Namespace) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Scores, and one row per question."""
    if args.images is None:
        raise ValueError("--task pope needs --images, the folder of the pictures that --data names")
    questions = pope.read_yes_no(args.data, args.images)
    wording = pope.PROMPTS[args.prompt]
    answers = ask(args, [Question(wording.format(text=q.text), q.image) for q in questions], POPE_DECODING)
    said = [pope.says_yes(answer) for answer in answers]
    rows = [
        {"image": str(q.image), "question": q.text, "label": q.label, "answer": a, "said_yes": s}
        for q, a, s in zip(questions, answers, said, strict=True)
    ]
    return pope.yes_no_scores(said, [q.label for q in questions]), rows


def write(args: Namespace, scores: dict[str, float], rows: list[dict[str, Any]]) -> None:
    """TASK.jsonl: every answer; TASK.json: scores and settings; TASK.md: the scores as a table."""
    args.output.mkdir(parents=True, exist_ok=True)
    settings = {key: str(value) for key, value in vars(args).items() if value is not None}
    summary = {"task": args.task, "questions": len(rows), "scores": scores, "settings": settings}
    table = ["| metric | percent |", "|---|---|", *(f"| {name} | {value:.1f} |" for name, value in scores.items())]
    (args.output / f"{args.task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (args.output / f"{args.task}.json").write_text(json.dumps(summary, indent=1) + "\n")
    (args.output / f"{args.task}.md").write_text("\n".join(table) + "\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0, or 1 after a one-line error."""
    args = parse(arguments)
    try:
        scores, rows = (evaluate_mmvp if args.task == "mmvp" else evaluate_pope)(args)
        write(args, scores, rows)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print("  ".join(f"{name} {value:.1f} %" for name, value in scores.items()))
    print(args.output / f"{args.task}.json")
    return 0


if __name__ == "__main__":
    sys.exit(main())
