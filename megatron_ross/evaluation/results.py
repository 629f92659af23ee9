"""What an evaluation found, as JSON and as a Markdown table beside the published figures.

One folder holds the results of one checkpoint, asked by one preset; several calls add to it.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_ross.config.json_files import read_json
from megatron_ross.evaluation.benchmarks import Job, benchmarks
from megatron_ross.evaluation.errors import FrameworkError
from megatron_ross.text_files import replace_text

PUBLISHED = Path(__file__).with_name("published.json")
RESULTS_JSON, RESULTS_MD, MISSING_JSON = "results.json", "results.md", "missing.json"
_SHARED = ("export", "fingerprint", "preset")
"""Settings that all results of a folder have in common."""
AS_PUBLISHED: dict[str, dict[str, tuple[Any, ...]]] = {
    "all": {"limit": (None,), "template": (None,), "dtype": (None, "fp16")},
    "lmms-eval": {"include_path": (None,), "lmms_interface": ("simple",)},
    "builtin mmvp": {
        "decoding": (None, "published"),
        "corrected_labels": (False,),
        "lenient": (False,),
        "seed": (42,),
    },
    "builtin pope": {"pope_prompt": ("short",)},
    "builtin reconstruction": {"reconstruction_steps": ("250",), "seed": (42,)},
}
"""Options that change how questions are put or scored, by what they apply to (all, a framework, a framework's task),
with the values that do not depart from the preset `published`; the first is the default."""


_ASKED_BY: dict[str, tuple[str, ...]] = {
    "all": ("fingerprint", "preset", "limit", "template", "dtype", "versions"),
    "lmms-eval": ("include_path", "lmms_interface"),
    "vlmevalkit": ("vlmevalkit",),
    "builtin mmvp": ("mmvp_data", "decoding", "corrected_labels", "lenient", "seed"),
    "builtin pope": ("pope_data", "pope_images", "pope_prompt", "seed"),
    "builtin reconstruction": ("reconstruction_images", "reconstruction_steps", "seed"),
}
"""Settings on which scores depend, by what they apply to; the groups of AS_PUBLISHED with data and versions."""


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
    """Its value, as the framework scales it for tasks that are not in benchmarks.yaml; None if it was not given."""
    as_published: bool
    """Whether framework, preset and all options are those of the published figures."""
    settings: dict[str, Any]
    """What was evaluated, and how: command line, exported folder, versions."""


def result(job: Job, scores: dict[str, float], settings: dict[str, Any]) -> Result:
    """Scores of a job with its headline."""
    task = job.task
    metric = task.metric or _headline(scores)
    value = None if metric is None else scores.get(metric)
    percent = None if value is None else value * task.scale
    same = _is_published_with(job.benchmark.name, job.framework) and settings["preset"] == "published"
    same = same and not _departures(job.framework, task.task, settings)
    return Result(job.benchmark.name, job.framework, task.task, scores, metric, percent, same, settings)


def _headline(scores: dict[str, float]) -> str | None:
    """The metric for the table of a task that benchmarks.yaml does not know: an overall one, else the first."""
    overall = (name for name in scores if name.rpartition(".")[2].lower() in ("overall", "final score", "average"))
    return next(overall, next(iter(scores), None))


def is_finished(entry: Result, job: Job, settings: dict[str, Any]) -> bool:
    """Whether an earlier result is the score that asking `job` with `settings` again would give."""
    if (entry.benchmark, entry.framework) != (job.benchmark.name, job.framework) or entry.percent is None:
        return False
    groups = ("all", job.framework, f"{job.framework} {job.task.task}")
    names = [name for group in groups for name in _ASKED_BY.get(group, ())]
    return all(entry.settings.get(name) == settings.get(name) for name in names)


def _departures(framework: str, task: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Options, as given, by which a task was not asked or scored as published, whatever the preset."""
    groups = ("all", framework, f"{framework} {task}")
    options = {name: values for group in groups for name, values in AS_PUBLISHED.get(group, {}).items()}
    given = {name: settings.get(name, values[0]) for name, values in options.items()}
    return {name: value for name, value in given.items() if value not in options[name]}


def check_headlines(results: Sequence[Result]) -> None:
    """Refuse an empty cell in the table.

    Raises:
        FrameworkError: a framework gave scores of a benchmark, but not the one that is compared.
    """
    for entry in results:
        if entry.metric is not None and entry.percent is None:
            raise FrameworkError(
                f"{entry.framework} gave no {entry.metric} of {entry.benchmark}, only {', '.join(entry.scores)}: other "
                f"versions name it otherwise, use the one in docs/evaluation.md; its scores are kept in {RESULTS_JSON}"
            )


@functools.cache
def published() -> dict[str, dict[str, float]]:
    """Published figures in percent: model -> benchmark -> figure. Benchmarks without one are left out."""
    figures: dict[str, dict[str, float]] = json.loads(PUBLISHED.read_text(encoding="utf-8"))["figures"]
    return figures


def published_source() -> str:
    """Where the published figures were read."""
    return str(json.loads(PUBLISHED.read_text(encoding="utf-8"))["source"])


def earlier_results(output: Path, settings: dict[str, Any]) -> list[Result]:
    """What earlier calls left in a folder, to be added to.

    Args:
        output: the folder; it need not exist.
        settings: of the coming results.

    Raises:
        ValueError: its results are of another checkpoint or preset, or cannot be read.
    """
    file = output / RESULTS_JSON
    if not file.is_file():
        return []
    try:
        results = [Result(**entry) for entry in read_json(file)["results"]]
        stored = {name: results[0].settings[name] for name in _SHARED}
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(
            f"{file} holds no results that can be added to ({error}): remove it, or name another folder with --output"
        ) from None
    wanted = {name: settings[name] for name in _SHARED}
    if stored != wanted:
        changed = stored["export"] == wanted["export"] and stored["fingerprint"] != wanted["fingerprint"]
        raise ValueError(
            f"{file} holds results of {stored['export']} with preset {stored['preset']}, not of {wanted['export']} "
            f"{'as it is now ' if changed else ''}with preset {wanted['preset']}: name another folder with --output"
        )
    return results


Missing = dict[str, str]
"""Why there is no score: "FRAMEWORK BENCHMARK" -> reason."""


def missing_key(job: Job) -> str:
    """Its key in `Missing`."""
    return f"{job.framework} {job.benchmark.name}"


def read_missing(output: Path) -> Missing:
    """What earlier calls could not score, or were asking when they ended."""
    file = output / MISSING_JSON
    if not file.is_file():
        return {}
    try:
        return {str(name): str(reason) for name, reason in read_json(file).items()}
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{file} cannot be read ({error}): remove it") from None


def write_results(output: Path, results: Sequence[Result], missing: Missing | None = None) -> None:
    """Write RESULTS_JSON and RESULTS_MD if there are results, and MISSING_JSON if there is something missing.

    Args:
        output: folder, made if it does not exist.
        results: in their order; of two for the same benchmark and framework, the later one counts.
        missing: what has no score.
    """
    newest = list({(entry.benchmark, entry.framework): entry for entry in results}.values())
    output.mkdir(parents=True, exist_ok=True)
    if missing:
        replace_text(output / MISSING_JSON, json.dumps(missing, indent=1) + "\n")
    else:
        (output / MISSING_JSON).unlink(missing_ok=True)
    if newest:
        replace_text(
            output / RESULTS_JSON, json.dumps({"results": [asdict(entry) for entry in newest]}, indent=1) + "\n"
        )
        replace_text(output / RESULTS_MD, markdown(newest, missing))


def write_rows(file: Path, rows: Sequence[dict[str, Any]]) -> None:
    """One JSON object per line."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def markdown(results: Sequence[Result], missing: Missing | None = None) -> str:
    """The table, one line for each benchmark, and notes below."""
    models = list(published())
    mark = "" if results[0].settings["preset"] == "published" else " †"
    lines = [
        f"| benchmark | framework | metric | this checkpoint{mark} | " + " | ".join(models) + " |",
        "|---" * (len(models) + 4) + "|",
    ]
    for entry in results:
        figures = [published()[model].get(entry.benchmark) for model in models]
        cells = [_label(entry), _framework(entry), entry.metric or "", _shown(entry.percent)]
        lines.append("| " + " | ".join([*cells, *map(_shown, figures)]) + " |")
    without = [f"No score: {name}: {reason}" for name, reason in (missing or {}).items()]
    return "\n".join([*lines, "", *_notes(results), *without]) + "\n"


def _notes(results: Sequence[Result]) -> list[str]:
    """What a reader must know to compare the figures."""
    settings = results[0].settings
    notes = [
        f"Checkpoint `{settings['checkpoint']}`, preset `{settings['preset']}`. Percent. Published figures: "
        f"{published_source()}; empty where it has none."
    ]
    if settings["preset"] != "published":
        notes.append("† not asked as for the published figures: `--preset published` does that (docs/evaluation.md).")
    if not all(_is_published_with(e.benchmark, e.framework) for e in results):
        notes.append("* not the framework of the published figures: prompts and scoring differ.")
    own = [e.benchmark for e in results if e.benchmark not in benchmarks()]
    if own:
        notes.append(
            f"As the framework scales them, with one of their metrics: {', '.join(own)}; {RESULTS_JSON} has all."
        )
    limits = [f"{_label(e)} {e.settings['limit']}" for e in results if e.settings.get("limit")]
    if limits:
        notes.append(f"Only the first questions were asked: {', '.join(limits)}.")
    options = [f"{_label(e)} `{given}`" for e in results if (given := _given_options(e))]
    if options:
        notes.append(f"Options that depart from the published evaluation: {', '.join(options)}.")
    return notes


def _given_options(entry: Result) -> str:
    """Its departures as on the command line, but for the limit, which has a note of its own."""
    found = _departures(entry.framework, entry.task, entry.settings)
    words = {name: value if isinstance(value, str) else json.dumps(value) for name, value in found.items()}
    return " ".join(f"--{name.replace('_', '-')} {word}" for name, word in words.items() if name != "limit")


def _label(entry: Result) -> str:
    known = benchmarks().get(entry.benchmark)
    return known.label if known else entry.benchmark


def _is_published_with(benchmark: str, framework: str) -> bool:
    """Whether that is the framework of its published figures; also of a benchmark that has none."""
    known = benchmarks().get(benchmark)
    return known is None or known.published_with == framework


def _framework(entry: Result) -> str:
    return entry.framework + ("" if _is_published_with(entry.benchmark, entry.framework) else " *")


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"
