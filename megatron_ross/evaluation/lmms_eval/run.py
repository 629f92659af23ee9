"""Run lmms-eval's tasks on an exported checkpoint, through its Python API.

Its command line ends with status 0 when an evaluation fails; here every failure raises.
"""

from __future__ import annotations

import difflib
import importlib.util
import json
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_ross.evaluation.errors import FrameworkError, framework_errors

NAME = "lmms-eval"
INSTALL = (
    "pip install -e '.[eval]', then pip install --no-deps lmms_eval==0.7.3 "
    "(without --no-deps it brings torchvision and video libraries)"
)

OCR_TOKENS = {
    "textvqa_val": {
        "lmms_eval_specific_kwargs": {
            "default": {
                "pre_prompt": "",
                "post_prompt": "\nAnswer the question using a single word or phrase.",
                "ocr": True,
            }
        }
    }
}
"""TextVQA as in the published evaluation; lmms-eval 0.7.3 leaves the OCR tokens out."""


def check_installed() -> None:
    """Raises ValueError: lmms-eval cannot be imported."""
    if importlib.util.find_spec("lmms_eval") is None:
        raise ValueError(f"{NAME} is not installed: {INSTALL}")


class LmmsTasks:
    """A loaded model and lmms-eval's index of tasks; asks one task at a time.

    Args:
        model: arguments of `LmmsModel`.
        tasks: names of tasks or groups that will be asked for.
        output: folder for the answers (samples/lmms-eval/TASK.jsonl) and files that tasks write.
        include_path: folder with more task definitions.
        interface: "simple" or "chat".

    Raises:
        ValueError: lmms-eval is missing; FrameworkError: it cannot be imported.
    """

    def __init__(
        self,
        model: dict[str, Any],
        tasks: Sequence[str],
        output: Path,
        *,
        include_path: Path | None = None,
        interface: str = "simple",
    ) -> None:
        check_installed()
        self._output = output
        with framework_errors(NAME, ", ".join(tasks), output, INSTALL):
            from lmms_eval.evaluator import simple_evaluate

            model_class = _model_class(interface)
            self._manager = _task_manager(tasks, include_path)
        self._evaluate = simple_evaluate
        self._lm = model_class(**model)

    def scores(
        self, task: str, *, override: dict[str, Any] | None = None, limit: int | None = None
    ) -> dict[str, float]:
        """Scores by metric, in lmms-eval's order; empty on all ranks but the first.

        Args:
            override: fields of the task's configuration to replace.
            limit: at most so many questions.

        Raises:
            ValueError: there is no such task; FrameworkError: the evaluation failed.
        """
        _check_task(task, self._manager.all_tasks)
        with framework_errors(NAME, task, self._output, INSTALL):
            found = self._evaluate(
                model=self._lm,
                tasks=[{"task": task, **override} if override else task],
                task_manager=self._manager,
                batch_size=self._lm.batch_size,
                limit=limit,
                bootstrap_iters=0,
                verbosity="ERROR",
                cli_args=_arguments(task, self._output),
            )
            if self._lm.accelerator.process_index:
                return {}
            _write_samples(found.get("samples") or {}, self._output / "samples" / NAME)
        scores = task_scores(found["results"].get(task, {}))
        if not scores:
            raise FrameworkError(f"{NAME} ended without a score of {task}: its messages above say why")
        return scores


def task_scores(values: dict[str, Any]) -> dict[str, float]:
    """Metrics as lmms-eval names them, without their filters, standard errors and texts."""
    return {
        name.partition(",")[0]: float(value)
        for name, value in values.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and "stderr" not in name and "," in name
    }


def _task_manager(tasks: Sequence[str], include_path: Path | None) -> Any:
    """lmms-eval's index of tasks; without its own ones, which take long to read, where nothing of them is asked for."""
    from lmms_eval.tasks import TaskManager

    if include_path is not None:
        added = TaskManager("ERROR", include_path=str(include_path), include_defaults=False)
        if set(tasks) <= set(added.all_tasks):
            return added
    return TaskManager("ERROR", include_path=str(include_path) if include_path is not None else None)


def _model_class(interface: str) -> Any:
    if interface == "chat":
        from megatron_ross.evaluation.lmms_eval.chat import MegatronRossChat

        return MegatronRossChat
    from megatron_ross.evaluation.lmms_eval.simple import MegatronRoss

    return MegatronRoss


def _check_task(task: str, known: Sequence[str]) -> None:
    if task not in known:
        near = difflib.get_close_matches(task, known, n=3)
        hint = f"did you mean {' or '.join(near)}" if near else "python -m lmms_eval --tasks list shows them all"
        raise ValueError(f"lmms-eval has no task {task!r}: {hint}")


def _arguments(tasks: str, output: Path) -> Namespace:
    """What tasks read of the command line that is not there."""
    return Namespace(
        output_path=str(output), tasks=tasks, model="megatron_ross", log_samples_suffix="", process_with_media=True
    )


def _write_samples(samples: dict[str, list[dict[str, Any]]], folder: Path) -> None:
    """One file of JSON lines for each task; pictures are left out."""
    folder.mkdir(parents=True, exist_ok=True)
    for task, rows in samples.items():
        text = "".join(json.dumps(row, default=_shown, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{task}.jsonl").write_text(text, encoding="utf-8")


def _shown(value: Any) -> str:
    return str(value) if len(str(value)) < 200 else f"<{type(value).__name__}>"
