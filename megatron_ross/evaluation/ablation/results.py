"""What one finished run leaves behind, in result.json: settings, scores, figures of its pictures, loss curves."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_ross.evaluation.ablation.plan import Run
from megatron_ross.evaluation.reconstruct import FIGURES_FILE

RESULT_NAME = "result.json"
CURVES = ("lm_loss", "recon_loss")


@dataclass(frozen=True)
class Result:
    """A run's result.

    Attributes:
        scores: {"accuracy" (percent) | "loss" (nats): {category: value}}.
        figures: means over the reconstructed images; empty without reconstruction.
        curves: "iteration" and the `CURVES`.
        minutes: wall time of the command that finished the run.
    """

    settings: dict[str, Any]
    scores: dict[str, dict[str, float]]
    figures: dict[str, float]
    curves: dict[str, list[float]]
    seconds_per_iteration: float
    minutes: float


def collect_result(run: Run, settings: dict[str, Any], minutes: float) -> dict[str, Any]:
    """Read what the steps of a run wrote; they took `minutes`."""
    rows = [json.loads(line) for line in (run.folder / "run" / "metrics.jsonl").read_text().splitlines()]
    scores = json.loads((run.folder / "answers.json").read_text())["scores"]
    return {
        "settings": settings,
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


def is_finished(run: Run, settings: dict[str, Any]) -> bool:
    """The run has a result, with these settings.

    Raises:
        ValueError: it has one with other settings.
    """
    if not (run.folder / RESULT_NAME).exists():
        return False
    found = read_result(run).settings
    changed = sorted(name for name in found.keys() | settings.keys() if found.get(name) != settings.get(name))
    if changed:
        raise ValueError(
            f"{run.folder} was run with other settings ({', '.join(changed)}); delete it or choose another output"
        )
    return True
