"""The quickstart's report: one HTML file with loss curves, accuracy table and reconstructed images, nothing beside it.

python examples/quickstart/report.py --run runs/quickstart
"""

from __future__ import annotations

import base64
import html
import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from gates import Gate, check_gates, read_metrics
from jsonargparse import auto_cli

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from PIL import Image

STAGES = ("stage1", "stage2")
PANELS = ("input", "VAE round trip", "reconstruction")
MAGNIFICATION = 1.5

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; margin: 1rem 0; } th, td { padding: .3rem .9rem; border-bottom: 1px solid #ddd; }
td { text-align: right; } th, td:first-child { text-align: left; } img { max-width: 100%; }
.pass { color: #176b2c; } .fail { color: #b3261e; font-weight: bold; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(26rem, 1fr)); gap: .5rem; }
.grid img { width: 100%; image-rendering: auto; }
"""


Metrics = dict[str, list[dict[str, Any]]]
"""Lines of a file of metrics, by stage."""


def loss_figure(metrics: Metrics, validations: Metrics) -> bytes:
    """PNG: language-model loss and reconstruction loss over the iterations of each stage, and on held-out samples."""
    figure, axes = plt.subplots(2, len(metrics), figsize=(10, 5.5), sharey="row", squeeze=False, layout="constrained")
    for column, (stage, rows) in enumerate(metrics.items()):
        for axis, name in zip(axes[:, column], ("lm_loss", "recon_loss"), strict=True):
            axis.plot([row["iteration"] for row in rows], [row[name] for row in rows], label="training")
            held_out = validations[stage]
            axis.plot([r["iteration"] for r in held_out], [r[name] for r in held_out], "o--", label="held out")
            axis.grid(alpha=0.3)
        axes[0, column].set_title(stage)
        axes[1, column].set_xlabel("iteration")
    axes[0, 0].set_ylabel("language-model loss")
    axes[1, 0].set_ylabel("reconstruction loss")
    axes[0, 0].legend()
    return _png(figure)


def timestep_figure(validations: Metrics) -> bytes:
    """PNG: reconstruction loss on held-out images by timestep, for each validation of each stage; dark is late."""
    figure, axes = plt.subplots(1, len(validations), figsize=(10, 3), sharey=True, squeeze=False, layout="constrained")
    for axis, (stage, rows) in zip(axes[0], validations.items(), strict=True):
        for number, row in enumerate(rows, start=1):
            buckets = row["recon_loss_by_timestep"]
            axis.plot(
                list(buckets), list(buckets.values()), color=plt.get_cmap("Blues")(0.2 + 0.8 * number / len(rows))
            )
        axis.set_title(stage)
        axis.set_xlabel("timestep")
        axis.tick_params(axis="x", rotation=60)
        axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("reconstruction loss")
    return _png(figure)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    plt.close(figure)
    return buffer.getvalue()


def picture(png: bytes, caption: str) -> str:
    """An <img> that carries its own data."""
    data = base64.b64encode(png).decode("ascii")
    return f'<img alt="{html.escape(caption)}" src="data:image/png;base64,{data}">'


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """An HTML table; cells are escaped."""
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def accuracy_table(accuracy: dict[str, dict[str, float]]) -> str:
    """One row per question type."""
    rows = [(kind, f"{value:.1f} %", f"{accuracy['blank'][kind]:.1f} %") for kind, value in accuracy["image"].items()]
    return table(("question", "with images", "with blank images"), rows)


def speed_table(metrics: Metrics) -> str:
    """What each stage cost, read off its last log interval."""
    rows = [
        (
            stage,
            f"{rows[-1]['iteration']}",
            f"{rows[-1]['consumed_samples']:,}",
            f"{rows[-1]['samples_per_second']:.1f}",
            f"{rows[-1]['tokens_per_second']:,.0f}",
            f"{rows[-1]['memory_gib']:.2f} GiB",
        )
        for stage, rows in metrics.items()
    ]
    return table(("stage", "iterations", "samples", "samples/s", "tokens/s", "memory of a rank"), rows)


def gate_list(gates: Sequence[Gate]) -> str:
    """Each gate with its value and verdict."""
    lines = [
        f'<li class="{"pass" if gate.passed else "fail"}">{html.escape(gate.name)}: {gate.value:.3g} '
        f"({html.escape(gate.bound)}) {'reached' if gate.passed else 'MISSED'}</li>"
        for gate in gates
    ]
    return f"<ul>{''.join(lines)}</ul>"


def enlarge(path: Path) -> bytes:
    """The picture as PNG, larger."""
    with Image.open(path) as image:
        size = (round(image.width * MAGNIFICATION), round(image.height * MAGNIFICATION))
        buffer = io.BytesIO()
        image.convert("RGB").resize(size, Image.Resampling.BICUBIC).save(buffer, "PNG")
    return buffer.getvalue()


def image_grid(folder: Path) -> str:
    """The rows that tools/reconstruct.py painted.

    Raises:
        ValueError: there are none.
    """
    files = sorted(folder.glob("*.png"))
    if not files:
        raise ValueError(f"{folder} holds no reconstructed images; tools/reconstruct.py writes them")
    return '<div class="grid">' + "".join(picture(enlarge(file), file.stem) for file in files) + "</div>"


def examples_table(answers: list[dict[str, str]], count: int = 12) -> str:
    """The first held-out questions and what the model said."""
    rows = [(a["image"], a["question"], a["expected"], a["answer"], a["blank_answer"]) for a in answers[:count]]
    return table(("image", "question", "expected", "answer", "answer to a blank image"), rows)


def build_report(run: Path) -> tuple[str, list[Gate]]:
    """The report's HTML and the gates of a finished quickstart folder."""
    metrics = {stage: read_metrics(run / stage / "metrics.jsonl") for stage in STAGES}
    results = json.loads((run / "answers.json").read_text())
    validations = {stage: read_metrics(run / stage / "validation.jsonl") for stage in STAGES}
    gates = check_gates(results["accuracy"], metrics["stage2"])
    parts = [
        "<h1>Megatron-Ross quickstart</h1>",
        gate_list(gates),
        "<h2>Losses</h2>",
        picture(loss_figure(metrics, validations), "loss curves"),
        "<p>The same by how much noise the denoiser had to remove, on held-out images; the darker, the later.</p>",
        picture(timestep_figure(validations), "reconstruction loss by timestep"),
        speed_table(metrics),
        "<h2>Answers to held-out questions</h2>",
        accuracy_table(results["accuracy"]),
        examples_table(results["answers"]),
        f"<h2>Held-out images: {' | '.join(PANELS)}</h2>",
        "<p>The third picture of each row is painted by the denoiser from noise, guided by nothing but the language "
        "model's outputs at the image tokens.</p>",
        image_grid(run / "reconstructions"),
    ]
    page = "\n".join(parts)
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>Megatron-Ross quickstart</title>'
        f"<style>{_STYLE}</style></head><body>\n{page}\n</body></html>\n",
        gates,
    )


def write_report(run: Path) -> None:
    """Write report.html into a quickstart folder. Exit code 1 when a gate is missed.

    Args:
        run: folder with stage1/, stage2/, answers.json and reconstructions/.
    """
    page, gates = build_report(run)
    (run / "report.html").write_text(page, encoding="utf-8")
    for gate in gates:
        print(f"{'ok    ' if gate.passed else 'MISSED'} {gate.name}: {gate.value:.3g} (must be {gate.bound})")
    if not all(gate.passed for gate in gates):
        sys.exit("error: the quickstart did not reach what it must; see the report")


if __name__ == "__main__":
    auto_cli(write_report, as_positional=False)
