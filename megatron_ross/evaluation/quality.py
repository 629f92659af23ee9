"""How good reconstructions are, against training steps and against sampling steps, as figures and as one plot.

Both curves stand beside the VAE's own round trip, which no reconstruction can beat.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

from megatron_ross.config.timesteps import NUM_TRAIN_TIMESTEPS, respaced_timesteps
from megatron_ross.evaluation.reconstruct import mean_figures, reconstruct_folder
from megatron_ross.huggingface import RossProcessor

DPI = 110
METRICS = {"psnr": "PSNR, dB", "ssim": "SSIM"}


@dataclass(frozen=True)
class QualityPoint:
    """Means over the images, for one checkpoint and one respacing. `sampling_steps` is 1 for a regressing denoiser."""

    iteration: int
    steps: str | None
    sampling_steps: int
    images: int
    vae_psnr: float
    vae_ssim: float
    reconstruction_psnr: float
    reconstruction_ssim: float


def measure(
    model: Any,
    processor: RossProcessor,
    images: Path,
    output: Path,
    *,
    iteration: int,
    steps: str | None,
    limit: int | None,
    batch_size: int,
    seed: int = 0,
) -> QualityPoint:
    """Reconstruct a folder of images (pictures go to `output`) and take the means.

    Raises:
        ValueError: there are no images, or `steps` does not fit the model.
    """
    results = reconstruct_folder(
        model, processor, images, output, steps=steps, seed=seed, batch_size=batch_size, limit=limit
    )
    count = 1 if steps is None else len(respaced_timesteps(NUM_TRAIN_TIMESTEPS, steps))
    return QualityPoint(iteration, steps, count, len(results), **mean_figures(results))


def plot_quality(points: Sequence[QualityPoint], path: Path) -> None:
    """Left: every respacing's curve over training steps. Right: the last checkpoint over sampling steps."""
    figure, axes = plt.subplots(len(METRICS), 2, figsize=(10, 6.5), sharey="row", squeeze=False, layout="constrained")
    last = max(point.iteration for point in points)
    for (metric, title), (left, right) in zip(METRICS.items(), axes, strict=True):
        for count in sorted({point.sampling_steps for point in points}):
            curve = sorted((p for p in points if p.sampling_steps == count), key=lambda p: p.iteration)
            if len(curve) > 1:
                values = [_value(p, metric) for p in curve]
                left.plot([p.iteration for p in curve], values, "o-", label=f"{count} sampling steps")
        curve = sorted((p for p in points if p.iteration == last), key=lambda p: p.sampling_steps)
        right.plot([p.sampling_steps for p in curve], [_value(p, metric) for p in curve], "o-", label=f"step {last}")
        right.set_xscale("log")
        for axis in (left, right):
            axis.axhline(getattr(points[-1], f"vae_{metric}"), color="grey", linestyle="--", label="VAE round trip")
            axis.grid(alpha=0.3)
            axis.legend(loc="center right")  # between the curves and the round trip
        left.set_ylabel(title)
    axes[-1][0].set_xlabel("training step")
    axes[-1][1].set_xlabel("sampling steps")
    figure.savefig(path, format="png", dpi=DPI)
    plt.close(figure)


def _value(point: QualityPoint, metric: str) -> float:
    return float(getattr(point, f"reconstruction_{metric}"))


def write_quality(points: Iterable[QualityPoint], path: Path) -> None:
    """All points as JSON."""
    path.write_text(json.dumps([asdict(point) for point in points], indent=1) + "\n")
