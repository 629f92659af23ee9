"""What an evaluation found, as JSON and as a Markdown table beside the published figures."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_ross.evaluation.benchmarks import Job, benchmarks

PUBLISHED = Path(__file__).with_name("published.json")
RESULTS_JSON, RESULTS_MD = "results.json", "results.md"


@dataclass(frozen=True)
class Result:
    """Scores of one benchmark."""

    benchmark: str
    framework: str
    task: str
    scores: dict[str, float]
    """All metrics, as the framework names them."""
    metric: str | None
    """The one in the table."""
    percent: float | None
    """Its value; None if it is unknown which metric that is, or the framework did not give it."""
    as_published: bool
    """Whether the framework is the one whose figures were published."""


def result(job: Job, scores: dict[str, float]) -> Result:
    """Scores of a job with its headline."""
    task = job.task
    value = scores.get(task.metric) if task.metric is not None else None
    same = job.framework == job.benchmark.published_with
    percent = None if value is None else value * task.scale
    return Result(job.benchmark.name, job.framework, task.task, scores, task.metric, percent, same)


@functools.cache
def published() -> dict[str, dict[str, float]]:
    """Published figures in percent: model -> benchmark -> figure. Benchmarks without one are left out."""
    figures: dict[str, dict[str, float]] = json.loads(PUBLISHED.read_text(encoding="utf-8"))["figures"]
    return figures


def published_source() -> str:
    """Where the published figures were read."""
    return str(json.loads(PUBLISHED.read_text(encoding="utf-8"))["source"])


def write_results(output: Path, settings: dict[str, Any], results: Sequence[Result]) -> None:
    """Write RESULTS_JSON and RESULTS_MD.

    Args:
        output: folder, made if it does not exist.
        settings: what was evaluated, and how.
        results: one entry for each benchmark.
    """
    output.mkdir(parents=True, exist_ok=True)
    summary = {"settings": settings, "results": [asdict(entry) for entry in results]}
    (output / RESULTS_JSON).write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    (output / RESULTS_MD).write_text(markdown(settings, results), encoding="utf-8")


def write_rows(file: Path, rows: Sequence[dict[str, Any]]) -> None:
    """One JSON object per line."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def markdown(settings: dict[str, Any], results: Sequence[Result]) -> str:
    """The table, one line for each benchmark, and notes below."""
    models = list(published())
    lines = [
        "| benchmark | framework | metric | this checkpoint | " + " | ".join(models) + " |",
        "|---" * (len(models) + 4) + "|",
    ]
    for entry in results:
        known = benchmarks().get(entry.benchmark)
        figures = [published()[model].get(entry.benchmark) for model in models]
        cells = [
            known.label if known else entry.benchmark,
            _framework(entry),
            entry.metric or "",
            _shown(entry.percent),
        ]
        lines.append("| " + " | ".join([*cells, *map(_shown, figures)]) + " |")
    notes = [
        "",
        f"Checkpoint `{settings.get('checkpoint')}`, preset `{settings.get('preset')}`. Percent. Published figures: "
        f"{published_source()}; empty where it has none.",
    ]
    if not all(entry.as_published for entry in results):
        notes.append("* not the framework of the published figures: prompts and scoring differ.")
    if settings.get("limit"):
        notes.append(f"Only the first {settings['limit']} questions of each benchmark were asked.")
    return "\n".join([*lines, *notes]) + "\n"


def _framework(entry: Result) -> str:
    return entry.framework + ("" if entry.as_published else " *")


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"
