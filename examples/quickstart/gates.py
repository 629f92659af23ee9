"""What the quickstart must reach, and the reading of its results."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MIN_ACCURACY_GAP = 30.0  # points, images against blank images
MAX_RECON_LOSS = 0.6  # of the last tenth of stage 2
TAIL_FRACTION = 0.1


@dataclass(frozen=True)
class Gate:
    """One requirement: its value, the bound, and whether it holds. NaN never holds."""

    name: str
    value: float
    bound: str
    passed: bool


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The objects of a metrics.jsonl, one per log interval.

    Raises:
        ValueError: the file has no entry, or a line is no JSON.
    """
    try:
        rows = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    if not rows:
        raise ValueError(f"{path} has no entry: the run logged nothing")
    return rows


def final_loss(metrics: list[dict[str, Any]], name: str) -> float:
    """Mean of `name` over the last tenth of the logged intervals (at least one)."""
    tail = metrics[-math.ceil(TAIL_FRACTION * len(metrics)) :]
    return sum(float(row[name]) for row in tail) / len(tail)


def check_gates(accuracy: dict[str, dict[str, float]], stage2_metrics: list[dict[str, Any]]) -> list[Gate]:
    """The quickstart's gates.

    Args:
        accuracy: percentages as `answer.py` writes them.
        stage2_metrics: see `read_metrics`.
    """
    gap = accuracy["image"]["all"] - accuracy["blank"]["all"]
    loss = final_loss(stage2_metrics, "recon_loss")
    return [
        Gate("accuracy gap, images against blank", gap, f">= {MIN_ACCURACY_GAP:g} points", gap >= MIN_ACCURACY_GAP),
        Gate("final reconstruction loss", loss, f"< {MAX_RECON_LOSS:g}", loss < MAX_RECON_LOSS),
    ]
