"""What one finished run leaves behind, in result.json: settings, scores, figures of its pictures, loss curves."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_ross.checkpoint.manifest import CHECKPOINTS_NAME, Manifest, resolve_checkpoint
from megatron_ross.evaluation.ablation.conditions import read_record, refuse_changes
from megatron_ross.evaluation.ablation.plan import Run
from megatron_ross.evaluation.reconstruct import FIGURES_FILE

RESULT_NAME = "result.json"
BEGUN_NAME = "begun.json"
"""Settings and conditions of a run, from before its training."""
CURVES = ("lm_loss", "recon_loss")


@dataclass(frozen=True)
class Result:
    """A run's result.

    Attributes:
        conditions: see `conditions_of`.
        samples: digest of all samples that the training consumed, in their order.
        scores: {"accuracy" (percent) | "loss" (nats): {category: value}}.
        figures: means over the reconstructed images; empty without reconstruction.
        curves: "iteration" and the `CURVES`.
        minutes: wall time of the command that finished the run.
    """

    settings: dict[str, Any]
    conditions: dict[str, str]
    samples: str
    scores: dict[str, dict[str, float]]
    figures: dict[str, float]
    curves: dict[str, list[float]]
    seconds_per_iteration: float
    minutes: float


def collect_result(run: Run, settings: dict[str, Any], conditions: dict[str, str], minutes: float) -> dict[str, Any]:
    """Read what the steps of a run wrote; they took `minutes`."""
    rows = [json.loads(line) for line in (run.folder / "run" / "metrics.jsonl").read_text().splitlines()]
    scores = json.loads((run.folder / "answers.json").read_text())["scores"]
    manifest = Manifest.read(resolve_checkpoint(run.folder / "run" / CHECKPOINTS_NAME))
    return {
        "settings": settings,
        "conditions": conditions,
        "samples": manifest.training["data"]["digest"],
        "scores": scores,
        "figures": mean_csv(run.folder / "reconstructions" / FIGURES_FILE) if run.arm.reconstructs else {},
        "curves": {name: [float(row[name]) for row in rows] for name in ("iteration", *CURVES)},
        "seconds_per_iteration": float(np.median([row["seconds_per_iteration"] for row in rows])),
        "minutes": minutes,
    }


def mean_csv(path: Path) -> dict[str, float]:
    """Mean of every column of numbers."""
    with path.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    return {name: math.fsum(float(row[name]) for row in rows) / len(rows) for name in rows[0] if name != "file"}


def read_result(run: Run) -> Result:
    """Read result.json.

    Raises:
        ValueError: it is missing or damaged.
    """
    path = run.folder / RESULT_NAME
    try:
        return Result(**json.loads(path.read_text()))
    except FileNotFoundError:
        raise ValueError(f"{path} is missing: {run.name} has not finished") from None
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}); delete it, and the run is evaluated again") from None


def is_finished(run: Run, settings: dict[str, Any], conditions: dict[str, str]) -> bool:
    """The run has a result, with these settings and under these conditions.

    Raises:
        ValueError: it has one with others, or has begun with others.
    """
    finished = (run.folder / RESULT_NAME).exists()
    if finished:
        result = read_result(run)
        refuse_changes(run.folder, {**result.settings, **result.conditions}, {**settings, **conditions})
    elif run.folder.exists():
        refuse_changes(run.folder, read_record(run.folder / BEGUN_NAME), {**settings, **conditions})
    return finished
