"""The report of an ablation: Markdown between two markers of a document, pictures beside it, all numbers as JSON.

What people write around the markers stays. The verdicts are computed: a difference is called shown only where the
interval of the paired differences leaves out zero.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from megatron_ross.config.schema import DataConfig
from megatron_ross.evaluation.ablation import figures
from megatron_ross.evaluation.ablation.execute import AblationError
from megatron_ross.evaluation.ablation.plan import AblationConfig, Group, run_folder, runs_of
from megatron_ross.evaluation.ablation.results import Result, read_result
from megatron_ross.evaluation.ablation.statistics import CONFIDENCE, paired_difference, summarise
from megatron_ross.evaluation.held_out import OVERALL

BEGIN = "<!-- begin: written by tools/ablate.py -->"
END = "<!-- end: written by tools/ablate.py -->"
NUM_PAINTED = 6
_ORDER_SETTINGS = {"seed", "train_iters", "num_epochs", *(field.name for field in fields(DataConfig))}
"""Runs that are equal in these see the same samples in the same order."""
METRICS = {"accuracy": ("correct answers, %", 1), "loss": ("loss of the right answers, nats per token", 3)}
"""Metric -> title and decimals."""


def collect(config: AblationConfig, seeds: int) -> dict[str, dict[int, Result]]:
    """Results by arm and seed. Raises ValueError where a run has not finished."""
    results: dict[str, dict[int, Result]] = {}
    for run in runs_of(config, seeds):
        results.setdefault(run.arm.name, {})[run.seed] = read_result(run)
    return results


def check_samples(results: figures.Results) -> None:
    """Runs of one seed that differ in no setting of the data have seen the same samples in the same order.

    Raises:
        AblationError: two have not.
    """
    first: dict[str, tuple[str, str]] = {}
    for arm, by_seed in results.items():
        for seed, result in by_seed.items():
            settings = {name: value for name, value in result.settings.items() if name in _ORDER_SETTINGS}
            other, samples = first.setdefault(json.dumps(settings, sort_keys=True), (arm, result.samples))
            if samples != result.samples:
                raise AblationError(
                    f"{other} and {arm}, seed {seed}, were not trained on the same samples in the same order: the data "
                    "have changed in between; remove the folders of both, or name another output folder"
                )


def write_report(config: AblationConfig, seeds: int, command: str, document: Path, images: Path, numbers: Path) -> None:
    """Write the pictures and numbers, and replace the part of `document` between the markers.

    Args:
        command: how the ablation was run; the report begins with it.
        document: Markdown file; made if it does not exist.
        images: folder for the pictures.
        numbers: JSON file.

    Raises:
        ValueError: a run has not finished, or the document has lost a marker.
        AblationError: see `check_samples`.
    """
    results = collect(config, seeds)
    check_samples(results)
    images.mkdir(parents=True, exist_ok=True)
    parts = [f"```bash\n{command}\n```"]
    for number, group in enumerate(config.groups):
        parts.append(_group(config, group, {arm.name: results[arm.name] for arm in group.arms}, results))
        if number == 0:
            parts.append(_pictures(config, group, results, document, images))
    numbers.parent.mkdir(parents=True, exist_ok=True)
    numbers.write_text(json.dumps(_numbers(config, results), indent=1) + "\n")
    document.write_text(replace_between(document, "\n\n".join(parts)))


def replace_between(document: Path, text: str) -> str:
    """The document with `text` between its markers; one that does not exist has nothing else but a title.

    Raises:
        ValueError: it exists and has no such markers.
    """
    body = f"{BEGIN}\n\n{text}\n\n{END}"
    if not document.exists():
        return f"# Matched ablation\n\n{body}\n"
    old = document.read_text()
    before, begin, rest = old.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{document} has no place for the report: it needs the lines {BEGIN!r} and {END!r}")
    return before + body + after


def _group(
    config: AblationConfig, group: Group, shown: Mapping[str, Mapping[int, Result]], results: figures.Results
) -> str:
    counts = {len(by_seed) for by_seed in shown.values()}
    seeds = ", ".join(str(count) for count in sorted(counts))
    parts = [f"## {group.title}", f"Seeds per arm: {seeds}. Arms:\n\n{_arms(group)}"]
    for metric, (title, decimals) in METRICS.items():
        parts.append(f"Held-out questions, {title}, mean ± standard deviation over seeds:")
        parts.append(_score_table(shown, metric, decimals))
    if any(result.figures for by_seed in shown.values() for result in by_seed.values()):
        parts.append(f"Reconstructions of {config.paint.limit} held-out images:")
        parts.append(_figure_table(shown))
    minutes = [result.minutes for by_seed in shown.values() for result in by_seed.values()]
    parts.append(f"Wall time of the command that finished a run: {min(minutes):.1f} to {max(minutes):.1f} minutes.")
    if group.comparisons:
        parts.append(
            f"Paired differences, arm minus baseline of the same seed, over all categories, with Student's "
            f"{CONFIDENCE:.0%} interval:"
        )
        parts.append(_comparison_table(group, results))
        parts.append(_verdicts(group, results))
    return "\n\n".join(parts)


def _arms(group: Group) -> str:
    lines = []
    for arm in group.arms:
        settings = ", ".join(f"`{name}: {value}`" for name, value in arm.settings.items()) or "the shared settings"
        lines.append(f"- **{arm.name}**: {settings}")
    return "\n".join(lines)


def categories_of(results: figures.Results) -> list[str]:
    """Question categories, `OVERALL` last."""
    first = next(iter(next(iter(results.values())).values()))
    return list(first.scores["accuracy"])


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first column is text, the others are numbers."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, rule, *rows))


def with_spread(values: Sequence[float], decimals: int) -> str:
    """`mean ± std`, or the value alone."""
    summary = summarise(values)
    spread = "" if math.isnan(summary.std) else f" ± {summary.std:.{decimals}f}"
    return f"{summary.mean:.{decimals}f}{spread}"


def _score_table(shown: figures.Results, metric: str, decimals: int) -> str:
    categories = categories_of(shown)
    rows = [
        [arm, *(with_spread([r.scores[metric][c] for r in by_seed.values()], decimals) for c in categories)]
        for arm, by_seed in shown.items()
    ]
    return table(["arm", *categories], rows)


def _figure_table(shown: figures.Results) -> str:
    rows = []
    for arm, by_seed in shown.items():
        found = [result.figures for result in by_seed.values() if result.figures]
        if found:
            psnr = with_spread([f["reconstruction_psnr"] for f in found], 2)
            ssim = with_spread([f["reconstruction_ssim"] for f in found], 3)
            rows.append([arm, psnr, ssim, f"{found[0]['vae_psnr']:.2f}", f"{found[0]['vae_ssim']:.3f}"])
    return table(["arm", "PSNR, dB", "SSIM", "VAE's own PSNR", "VAE's own SSIM"], rows)


def _common(results: figures.Results, pair: tuple[str, str], metric: str) -> tuple[list[float], list[float]]:
    """Values of (arm, baseline) over the seeds that both have."""
    seeds = [seed for seed in results[pair[0]] if seed in results[pair[1]]]
    arm, baseline = ([results[name][seed].scores[metric][OVERALL] for seed in seeds] for name in pair)
    return arm, baseline


def _comparison_table(group: Group, results: figures.Results) -> str:
    rows = []
    for pair in group.comparisons:
        for metric, (_, decimals) in METRICS.items():
            difference = paired_difference(*_common(results, pair, metric))
            by_seed = ", ".join(f"{value:+.{decimals}f}" for value in difference.differences)
            interval = (
                "-"
                if math.isnan(difference.low)
                else (f"{difference.low:+.{decimals}f} to {difference.high:+.{decimals}f}")
            )
            rows.append([f"{pair[0]} - {pair[1]}", metric, by_seed, f"{difference.mean:+.{decimals}f}", interval])
    return table(["difference", "metric", "by seed", "mean", f"{CONFIDENCE:.0%} interval"], rows)


def _verdicts(group: Group, results: figures.Results) -> str:
    lines = []
    for arm, baseline in group.comparisons:
        difference = paired_difference(*_common(results, (arm, baseline), "accuracy"))
        points = f"{difference.mean:+.1f} points"
        if len(difference.differences) == 1:
            lines.append(f"- {arm} against {baseline}: {points} with one seed, which shows a direction at most.")
        elif difference.is_shown:
            more = "more" if difference.mean > 0 else "fewer"
            lines.append(f"- {arm} answers {more} questions than {baseline}: {points}, and the interval leaves out 0.")
        else:
            lines.append(f"- {arm} against {baseline}: {points}; the interval holds 0, so no difference is shown.")
    return "\n".join(lines)


def _pictures(config: AblationConfig, group: Group, results: figures.Results, document: Path, images: Path) -> str:
    shown = {arm.name: results[arm.name] for arm in group.arms}
    figures.loss_curves(shown, images / "ablation_losses.png")
    figures.accuracy_bars(shown, categories_of(shown), images / "ablation_accuracy.png")
    first_seed = next(iter(next(iter(shown.values()))))
    folders = {
        arm.name: run_folder(config, arm.name, first_seed) / "reconstructions" for arm in group.arms if arm.reconstructs
    }
    lines = [
        _image(document, images / "ablation_accuracy.png", "correct answers by category; a dot is a seed"),
        _image(document, images / "ablation_losses.png", "training losses; bands span the seeds"),
    ]
    if folders:
        figures.painted_images(folders, NUM_PAINTED, images / "ablation_images.png")
        lines.append(_image(document, images / "ablation_images.png", "held-out images as each arm reconstructs them"))
    return "\n\n".join(lines)


def _image(document: Path, path: Path, caption: str) -> str:
    return f"![{caption}]({os.path.relpath(path, document.parent)})"


def _numbers(config: AblationConfig, results: figures.Results) -> dict[str, Any]:
    return {
        "config": asdict(config),
        "results": {arm: {str(seed): asdict(r) for seed, r in by_seed.items()} for arm, by_seed in results.items()},
    }
