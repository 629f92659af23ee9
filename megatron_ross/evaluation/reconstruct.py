"""What the language model's outputs remember of an image, as pictures and as figures, for a folder of images.

Every image gives one row of three panels: what the model saw, the auto-encoder's round trip of it (the best any
reconstruction can be), and the picture sampled from the model's outputs at the image tokens.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from tqdm import tqdm

from megatron_ross.evaluation.generate import open_image
from megatron_ross.evaluation.options import image_files
from megatron_ross.huggingface import RossProcessor
from megatron_ross.models.pictures import side_by_side, to_pil

FIGURES_FILE = "figures.csv"


@dataclass(frozen=True)
class Figures:
    """Likeness to what the model saw: PSNR in dB (inf = identical) and SSIM (1 = identical), over 8-bit RGB."""

    file: str
    vae_psnr: float
    vae_ssim: float
    reconstruction_psnr: float
    reconstruction_ssim: float


def reconstruct_folder(
    model: Any,
    processor: RossProcessor,
    images: Path,
    output: Path,
    *,
    steps: str | None = None,
    seed: int = 0,
    prompt: str | None = None,
    batch_size: int = 8,
    limit: int | None = None,
) -> list[Figures]:
    """Reconstruct every image of a folder; write `<file>.png` (three panels) and figures.csv.

    Args:
        images: folder; its image files are taken in the order of their names.
        output: folder, made if it does not exist.
        steps, seed, prompt: see `RossForConditionalGeneration.reconstruct`.
        limit: at most so many images.

    Returns:
        One entry per image.

    Raises:
        ValueError: there are no images, one cannot be decoded, or the model cannot reconstruct.
    """
    if batch_size < 1:
        raise ValueError(f"batch-size is {batch_size}, it must be at least 1")
    model.check_steps(steps)  # before anything is written
    files = image_files(images)[:limit]
    encoder = model.latent_encoder
    output.mkdir(parents=True, exist_ok=True)
    results: list[Figures] = []
    with open(output / FIGURES_FILE, "w", newline="") as stream, tqdm(total=len(files), unit="image") as progress:
        writer = csv.DictWriter(stream, [field.name for field in fields(Figures)])
        writer.writeheader()
        for start in range(0, len(files), batch_size):
            batch = files[start : start + batch_size]
            pictures = [open_image(file) for file in batch]
            pixels = processor.pixels(pictures).to(model.device)
            seen, round_trip = to_pil(encoder.vae_input(pixels)), to_pil(encoder.round_trip(pixels))
            painted = model.reconstruct(
                pictures, steps=steps, seed=seed + start, prompt=prompt, processor=processor, batch_size=batch_size
            )
            for file, *panels in zip(batch, seen, round_trip, painted, strict=True):
                side_by_side(panels).save(output / f"{file.name}.png")
                results.append(figures(file.name, *panels))
                writer.writerow(asdict(results[-1]))
            progress.update(len(batch))
    return results


def figures(file: str, seen: Image.Image, round_trip: Image.Image, painted: Image.Image) -> Figures:
    """Figures of one image; all pictures have one size."""
    target = np.asarray(seen)
    values: list[float] = []
    for picture in (np.asarray(round_trip), np.asarray(painted)):
        equal = np.array_equal(target, picture)
        values.append(float("inf") if equal else float(peak_signal_noise_ratio(target, picture, data_range=255)))
        values.append(float(structural_similarity(target, picture, data_range=255, channel_axis=2)))
    return Figures(file, *values)


def mean_figures(results: Sequence[Figures]) -> dict[str, float]:
    """Mean of every figure over the images."""
    names = [field.name for field in fields(Figures) if field.name != "file"]
    return {name: float(np.mean([getattr(result, name) for result in results])) for name in names}
