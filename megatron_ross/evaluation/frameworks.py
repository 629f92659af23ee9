"""The three ways to ask a benchmark behind one interface: load once, then score one benchmark after the other."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any, Protocol

from megatron_ross.evaluation import results
from megatron_ross.evaluation.benchmarks import Job
from megatron_ross.evaluation.builtin import run as builtin
from megatron_ross.evaluation.chat_model import ChatModel
from megatron_ross.evaluation.errors import framework_errors
from megatron_ross.evaluation.lmms_eval import run as lmms
from megatron_ross.evaluation.presets import Framework, preset
from megatron_ross.evaluation.vlmevalkit.run import VlmEvalKit


class Runner(Protocol):
    """A framework with the model loaded."""

    def __call__(self, job: Job) -> dict[str, float]:
        """Scores of one benchmark by metric; empty on all ranks but the first.

        Raises:
            ValueError: no score; the message is one line.
        """


def builtin_options(args: Namespace) -> builtin.BuiltinOptions:
    """The built-in tasks' part of the command line."""
    return builtin.BuiltinOptions(**{field.name: getattr(args, field.name) for field in fields(builtin.BuiltinOptions)})


def _open_builtin(args: Namespace, folder: str, jobs: Sequence[Job]) -> Runner:
    model = ChatModel.load(folder, preset(args.preset, "builtin"), **_loading(args))

    def run(job: Job) -> dict[str, float]:
        task = job.task.task
        with framework_errors("builtin", task, args.output, "pip install -e .", passes=(ValueError, OSError)):
            found = builtin.run_task(task, model, builtin_options(args), args.output)
        results.write_rows(args.output / "samples" / "builtin" / f"{task}.jsonl", found.rows)
        return found.scores

    return run


def _open_lmms(args: Namespace, folder: str, jobs: Sequence[Job]) -> Runner:
    model = {"pretrained": folder, "settings": args.preset, "batch_size": args.batch_size, **_loading(args)}
    names = [job.task.task for job in jobs]
    tasks = lmms.LmmsTasks(model, names, args.output, include_path=args.include_path, interface=args.lmms_interface)
    overrides = lmms.OCR_TOKENS if preset(args.preset, "lmms-eval").ocr_tokens else {}
    return lambda job: tasks.scores(job.task.task, override=overrides.get(job.task.task), limit=args.limit)


def _open_vlmevalkit(args: Namespace, folder: str, jobs: Sequence[Job]) -> Runner:
    model = {"model_path": folder, "settings": args.preset, **_loading(args)}
    kit = VlmEvalKit(model, args.output, source=args.vlmevalkit, reuse=args.reuse)
    return lambda job: kit.scores(job.task.task)


def _loading(args: Namespace) -> dict[str, Any]:
    return {"device": args.device, "dtype": args.dtype, "template": args.template}


OPENERS: dict[Framework, Callable[[Namespace, str, Sequence[Job]], Runner]] = {
    "builtin": _open_builtin,
    "lmms-eval": _open_lmms,
    "vlmevalkit": _open_vlmevalkit,
}
"""Loads the model at `folder` for the framework's jobs: (command line, folder, jobs)."""
