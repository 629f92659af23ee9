"""Pictures of an ablation: curves, accuracies by category, and what each arm paints of the same images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import ScalarFormatter
from PIL import Image, ImageDraw, ImageFont

from megatron_ross.evaluation.ablation.results import Result
from megatron_ross.models.pictures import PANEL_GAP_PX

DPI = 110
SMOOTHING = 5  # logged intervals in a running mean
CURVE_TITLES = {"lm_loss": "language-model loss", "recon_loss": "reconstruction loss (each its own objective)"}
Results = Mapping[str, Mapping[int, Result]]
"""Results by arm and seed."""


def loss_curves(results: Results, path: Path) -> None:
    """Training losses: a thick line for the mean over seeds, a band from the lowest to the highest."""
    figure, axes = plt.subplots(1, len(CURVE_TITLES), figsize=(11, 4), layout="constrained")
    for axis, (name, title) in zip(axes, CURVE_TITLES.items(), strict=True):
        for number, (arm, by_seed) in enumerate(results.items()):
            curves = np.array([_smooth(result.curves[name]) for result in by_seed.values()])
            if not curves.any():
                continue  # an arm without this loss
            steps = next(iter(by_seed.values())).curves["iteration"]
            axis.plot(steps, curves.mean(0), color=f"C{number}", label=arm)
            axis.fill_between(steps, curves.min(0), curves.max(0), color=f"C{number}", alpha=0.2)
        axis.set_title(title)
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter(ScalarFormatter())
        axis.yaxis.set_minor_formatter(ScalarFormatter())
        axis.set_xlabel("iteration")
        axis.grid(alpha=0.3)
        axis.legend()
    _save(figure, path)


def _smooth(values: Sequence[float]) -> np.ndarray:
    """Mean of each value and up to SMOOTHING - 1 before it."""
    return np.array([np.mean(values[max(0, i + 1 - SMOOTHING) : i + 1]) for i in range(len(values))])


def accuracy_bars(results: Results, categories: Sequence[str], path: Path) -> None:
    """Exact-match accuracy by category: bars for the mean over seeds, a dot for each seed."""
    figure, axis = plt.subplots(figsize=(11, 4), layout="constrained")
    width, places = 0.8 / len(results), np.arange(len(categories))
    for number, (arm, by_seed) in enumerate(results.items()):
        values = np.array([[r.scores["accuracy"][c] for c in categories] for r in by_seed.values()])
        left = places + (number - (len(results) - 1) / 2) * width
        axis.bar(left, values.mean(0), 0.92 * width, color=f"C{number}", alpha=0.6, label=arm)
        for row in values:
            axis.plot(left, row, "o", color=f"C{number}", markersize=4, markeredgecolor="black", markeredgewidth=0.5)
    axis.set_xticks(places, categories)
    axis.set_ylabel("correct answers, %")
    axis.grid(axis="y", alpha=0.3)
    axis.legend()
    _save(figure, path)


def painted_images(folders: Mapping[str, Path], count: int, path: Path, magnification: float = 1.0) -> None:
    """Columns: input, VAE round trip, then each arm's reconstruction of the same image; one row per image.

    Args:
        folders: by arm, a folder that tools/reconstruct.py wrote.
    """
    names = sorted(file.name for file in next(iter(folders.values())).glob("*.png"))[:count]
    rows = []
    for name in names:
        panels = [split_panels(folder / name) for folder in folders.values()]
        rows.append([panels[0][0], panels[0][1], *(arm[2] for arm in panels)])
    titles = ["input", "VAE round trip", *folders]
    _grid(rows, titles, magnification).save(path)


def split_panels(path: Path) -> list[Image.Image]:
    """The three panels of a picture of tools/reconstruct.py."""
    with Image.open(path) as row:
        side = row.height
        return [row.crop((i * (side + PANEL_GAP_PX), 0, i * (side + PANEL_GAP_PX) + side, side)) for i in range(3)]


def _grid(rows: Sequence[Sequence[Image.Image]], titles: Sequence[str], magnification: float) -> Image.Image:
    side, top = round(rows[0][0].width * magnification), 24
    step = side + PANEL_GAP_PX
    grid = Image.new("RGB", (step * len(titles) - PANEL_GAP_PX, top + step * len(rows) - PANEL_GAP_PX), "white")
    draw, font = ImageDraw.Draw(grid), ImageFont.load_default(size=14)
    for column, title in enumerate(titles):
        draw.text((column * step + side / 2, top / 2), title, fill="black", font=font, anchor="mm")
        for i, row in enumerate(rows):
            panel = row[column].resize((side, side), Image.Resampling.BICUBIC)
            grid.paste(panel, (column * step, top + i * step))
    return grid


def _save(figure: plt.Figure, path: Path) -> None:
    figure.savefig(path, format="png", dpi=DPI)
    plt.close(figure)
