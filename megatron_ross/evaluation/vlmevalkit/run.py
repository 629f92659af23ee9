"""Run VLMEvalKit's data sets on an exported checkpoint and read the scores that it leaves in files."""

from __future__ import annotations

import csv
import hashlib
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_ross.evaluation.errors import FrameworkError, framework_errors
from megatron_ross.evaluation.exports import fingerprint
from megatron_ross.evaluation.vlmevalkit.launcher import INSTALL, find_run_py, launch, register

NAME = "vlmevalkit"
MODEL_NAME = "megatron_ross"
RESULT_FILES = ("_acc.csv", "_score.csv", "_score.json")
JUDGE = "exact_matching"  # as published: no API is called


def run_tasks(
    model: dict[str, Any], datasets: Sequence[str], output: Path, *, source: Path | None = None
) -> dict[str, dict[str, float]]:
    """Scores by data set and metric; empty on all ranks but the first.

    Args:
        model: arguments of `VlmEvalKitAdapter`.
        datasets: VLMEvalKit's names.
        output: folder for its files.
        source: see `find_run_py`.

    Raises:
        ValueError: VLMEvalKit is missing; FrameworkError: it failed, or left no score of a data set.
    """
    run_py = find_run_py(source)
    names = ", ".join(datasets)
    work = output / NAME / _name(model)
    is_first = os.environ.get("RANK", "0") == "0"
    if is_first:
        for dataset in datasets:
            for file in _score_files(work, dataset):  # run.py hides a crash: what is there then must be of this call
                file.unlink()
    with framework_errors(NAME, names, output, INSTALL):
        register(MODEL_NAME, model)
        arguments = ["--data", *datasets, "--model", MODEL_NAME, "--judge", JUDGE, "--work-dir", str(work.resolve())]
        launch(run_py, arguments)
    if not is_first:
        return {}
    scores = {dataset: read_scores(work, dataset) for dataset in datasets}
    missing = [dataset for dataset, values in scores.items() if not values]
    if missing:  # run.py ends with status 0 all the same
        raise FrameworkError(
            f"{NAME} left no score of {', '.join(missing)} in {work}: its messages above say why (an unknown data set, "
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
