"""`megatron-ross evaluate`: from a checkpoint and names of tasks to a table of scores."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from megatron_ross.compat import versions
from megatron_ross.evaluation import results as results_module
from megatron_ross.evaluation.benchmarks import Job, benchmarks, job
from megatron_ross.evaluation.builtin import run as builtin
from megatron_ross.evaluation.chat_model import ChatModel
from megatron_ross.evaluation.command_line import parse
from megatron_ross.evaluation.exports import exported_folder, fingerprint
from megatron_ross.evaluation.lmms_eval import run as lmms
from megatron_ross.evaluation.presets import preset
from megatron_ross.evaluation.vlmevalkit import run as vlmevalkit
from megatron_ross.evaluation.vlmevalkit.launcher import find_run_py

_RECORDED_PACKAGES = ("megatron-ross", "torch", "transformers", "lmms_eval", "vlmeval")


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0, or 1 after a one-line error."""
    return report(parse(arguments))


def report(args: Namespace) -> int:
    """Evaluate and print the scores. Exit status: 0, or 1 after a one-line error."""
    try:
        found = evaluate(args)
    except (ValueError, OSError) as error:
        # A framework's progress bar may have left the cursor in the middle of a line.
        print(f"\nerror: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    for entry in found:
        shown = entry.scores if entry.percent is None else {entry.metric: entry.percent}
        print(f"{entry.benchmark} ({entry.framework}): " + "  ".join(f"{n} {v:.1f}" for n, v in shown.items()))
    if found:
        print(args.output / results_module.RESULTS_MD)
    return 0


def evaluate(args: Namespace) -> list[results_module.Result]:
    """Run everything; results on the first rank only.

    Raises:
        ValueError: bad input, or a framework failed.
    """
    jobs = [job(name.strip(), args.framework) for name in args.tasks.split(",") if name.strip()]
    if not jobs:
        raise ValueError("--tasks names no task; known are " + ", ".join(benchmarks()))
    check(args, jobs)
    folder = exported_folder(args.checkpoint, args.export_format, rank=_rank())
    settings = _settings(args, folder)
    earlier = results_module.earlier_results(args.output, settings)
    scores: dict[str, dict[str, float]] = {}
    for framework, run in _RUNNERS.items():
        names = [j for j in jobs if j.framework == framework]
        if names:
            scores |= run(args, str(folder), names)
            gc.collect()  # the model of one framework goes before the next comes
    if _rank():
        return []
    found = [results_module.result(j, scores[j.benchmark.name], settings) for j in jobs]
    results_module.write_results(args.output, [*earlier, *found])
    results_module.check_headlines(found)
    return found


def check(args: Namespace, jobs: Sequence[Job]) -> None:
    """Refuse, before anything is exported or loaded, what cannot work. Raises ValueError."""
    wanted = {j.framework for j in jobs}
    if "lmms-eval" in wanted:
        lmms.check_installed()
    if "vlmevalkit" in wanted:
        find_run_py(args.vlmevalkit)
        if args.limit is not None:
            raise ValueError("VLMEvalKit asks all questions: leave out --limit, or choose --framework lmms-eval")
    for j in jobs:
        if j.framework == "builtin":
            builtin.check_options(j.task.task, _builtin_options(args))
    if "builtin" in wanted and _world_size() > 1:
        raise ValueError("built-in tasks run in one process: leave out torchrun, or choose --framework lmms-eval")


def _run_builtin(args: Namespace, folder: str, jobs: Sequence[Job]) -> dict[str, dict[str, float]]:
    model = ChatModel.load(folder, preset(args.preset, "builtin"), **_loading(args))
    scores = {}
    for j in jobs:
        found = builtin.run_task(j.task.task, model, _builtin_options(args), args.output)
        results_module.write_rows(args.output / "samples" / "builtin" / f"{j.task.task}.jsonl", found.rows)
        scores[j.benchmark.name] = found.scores
    return scores


def _run_lmms(args: Namespace, folder: str, jobs: Sequence[Job]) -> dict[str, dict[str, float]]:
    model = {"pretrained": folder, "settings": args.preset, "batch_size": args.batch_size, **_loading(args)}
    ocr = preset(args.preset, "lmms-eval").ocr_tokens
    found = lmms.run_tasks(
        model,
        [j.task.task for j in jobs],
        args.output,
        overrides=lmms.OCR_TOKENS if ocr else None,
        limit=args.limit,
        include_path=args.include_path,
        interface=args.lmms_interface,
    )
    return {j.benchmark.name: found.get(j.task.task, {}) for j in jobs}


def _run_vlmevalkit(args: Namespace, folder: str, jobs: Sequence[Job]) -> dict[str, dict[str, float]]:
    model = {"model_path": folder, "settings": args.preset, **_loading(args)}
    found = vlmevalkit.run_tasks(model, [j.task.task for j in jobs], args.output, source=args.vlmevalkit)
    return {j.benchmark.name: found.get(j.task.task, {}) for j in jobs}


_RUNNERS = {"builtin": _run_builtin, "lmms-eval": _run_lmms, "vlmevalkit": _run_vlmevalkit}


def _loading(args: Namespace) -> dict[str, Any]:
    return {"device": args.device, "dtype": args.dtype, "template": args.template}


def _builtin_options(args: Namespace) -> builtin.BuiltinOptions:
    return builtin.BuiltinOptions(**{field.name: getattr(args, field.name) for field in fields(builtin.BuiltinOptions)})


def _settings(args: Namespace, folder: Path) -> dict[str, Any]:
    """Command line, what was exported, and versions of what took part."""
    given = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    export = {"export": str(folder.resolve()), "fingerprint": fingerprint(folder)}
    return {**given, **export, "versions": versions(_RECORDED_PACKAGES)}


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))
