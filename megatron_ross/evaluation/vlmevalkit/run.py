"""Run VLMEvalKit's data sets on an exported checkpoint and read the scores that it leaves in files."""

from __future__ import annotations

import csv
import hashlib
import json
import math
import os
from pathlib import Path
from typing import Any

from megatron_ross.evaluation.errors import FrameworkError, framework_errors
from megatron_ross.evaluation.exports import fingerprint
from megatron_ross.evaluation.vlmevalkit.launcher import INSTALL, find_run_py, launch, register

NAME = "vlmevalkit"
MODEL_NAME = "megatron_ross"
RESULT_FILES = ("_acc.csv", "_score.csv", "_score.json")
JUDGE = "exact_matching"  # as published: no API is called


class VlmEvalKit:
    """VLMEvalKit with the model registered; asks one data set at a time, all with one loaded model.

    Args:
        model: arguments of `VlmEvalKitAdapter`.
        output: folder for its files.
        source: see `find_run_py`.
        reuse: take up the answers of an earlier call for the same files and settings.

    Raises:
        ValueError: VLMEvalKit is missing; FrameworkError: it cannot be imported.
    """

    def __init__(self, model: dict[str, Any], output: Path, *, source: Path | None = None, reuse: bool = True) -> None:
        self._run_py = find_run_py(source)
        self._output, self._reuse = output, reuse
        self._work = output / NAME / _name(model)
        with framework_errors(NAME, "any data set", output, INSTALL):
            register(MODEL_NAME, model)

    def scores(self, dataset: str) -> dict[str, float]:
        """Scores by metric; empty on all ranks but the first.

        Raises:
            FrameworkError: VLMEvalKit failed, or left no score.
        """
        is_first = os.environ.get("RANK", "0") == "0"
        if is_first:
            for file in _score_files(self._work, dataset):  # run.py hides a crash: what is there must be of this call
                file.unlink()
        arguments = [
            "--data",
            dataset,
            "--model",
            MODEL_NAME,
            "--judge",
            JUDGE,
            "--work-dir",
            str(self._work.resolve()),
        ]
        with framework_errors(NAME, dataset, self._output, INSTALL):
            # Without --reuse run.py starts in a new folder. Answers only: scores are always computed again.
            launch(self._run_py, [*arguments, *(["--reuse", "--reuse-aux", "infer"] if self._reuse else [])])
        if not is_first:
            return {}
        scores = read_scores(self._work, dataset)
        if not scores:  # run.py ends with status 0 all the same
            raise FrameworkError(
                f"{NAME} left no score of {dataset} in {self._work}: its messages above say why (an unknown data set, "
                "data that cannot be downloaded, or a crash)"
            )
        return scores


def _name(model: dict[str, Any]) -> str:
    """Of a folder for this model alone: run.py takes what it finds of the same day for this model's own answers."""
    described = json.dumps([model, fingerprint(Path(model["model_path"]))], sort_keys=True)
    return hashlib.sha256(described.encode()).hexdigest()[:12]


def read_scores(work: Path, dataset: str) -> dict[str, float]:
    """Scores of the newest result file of a data set: names of its columns or fields -> numbers.

    A table with a column `split` gives "SPLIT.NAME" for every row; of others the first row counts.
    """
    found = _score_files(work, dataset)
    if not found:
        return {}
    newest = max(found, key=lambda file: file.stat().st_mtime)
    with newest.open(encoding="utf-8-sig", newline="") as file:
        rows = [json.load(file)] if newest.suffix == ".json" else list(csv.DictReader(file))
    if rows and "split" in rows[0]:
        return {f"{row['split']}.{name}": value for row in rows for name, value in _numbers(row).items()}
    return _numbers(rows[0]) if rows else {}


def _score_files(work: Path, dataset: str) -> list[Path]:
    """Of all calls for this model."""
    return [file for file in work.rglob(f"{MODEL_NAME}_{dataset}_*") if file.name.endswith(RESULT_FILES)]


def _numbers(row: dict[str, Any]) -> dict[str, float]:
    """The cells that are numbers."""
    numbers = {}
    for name, value in row.items():
        try:
            number = float(value)
        except (TypeError, ValueError):
            continue
        if not math.isnan(number):
            numbers[name] = number
    return numbers
