"""Quickstart data: JPEG files and LLaVA-format JSON, the same bytes for the same seed.

Writes under --output:

    images/000000.jpg ...   photographs with drawn shapes and a digit
    images/heldout/...      the same, for evaluation only
    stage1.json             captions (template `plain`)
    stage2.json             multi-turn questions, one record in ten without an image
    heldout.json            single-turn questions about images that no other file mentions
    scenes.json             what each image shows (file name -> scene), held-out images included
"""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np
from conversations import caption_record, heldout_records, question_record, text_only_record
from drawing import draw_scene
from jsonargparse import auto_cli
from PIL import Image
from scenes import Scene, make_scene
from tqdm import tqdm

JPEG_QUALITY = 90
HELDOUT_FOLDER = "heldout/"
TEXT_ONLY_EVERY = 10  # records per text-only record in stage 2
Shown = TypeVar("Shown")


def image_names(num_images: int, num_heldout: int) -> list[str]:
    """File names relative to images/; the last `num_heldout` are held out."""
    first_heldout = num_images - num_heldout
    return [f"{HELDOUT_FOLDER if i >= first_heldout else ''}{i:06d}.jpg" for i in range(num_images)]


Draw = Callable[[int, int], tuple[Shown, Image.Image]]
"""Seed and index -> what an image shows, and the image. A function of a module: worker processes import it."""


def draw_quickstart(seed: int, index: int) -> tuple[Scene, Image.Image]:
    """Image `index` of the quickstart."""
    scene = make_scene(seed, index)
    return scene, draw_scene(scene)


def _write_image(task: tuple[Draw[Shown], Path, int, int]) -> Shown:
    draw, path, seed, index = task
    shown, image = draw(seed, index)
    image.save(path, quality=JPEG_QUALITY)
    return shown


def write_images(draw: Draw[Shown], folder: Path, seed: int, names: list[str]) -> list[Shown]:
    """Draw every image with all cores; returns what they show, in order."""
    (folder / HELDOUT_FOLDER).mkdir(parents=True, exist_ok=True)
    tasks = [(draw, folder / name, seed, index) for index, name in enumerate(names)]
    # An executor fails when a worker dies; multiprocessing.Pool would start new ones for ever.
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), mp_context=multiprocessing.get_context("spawn")) as pool:
        return list(tqdm(pool.map(_write_image, tasks, chunksize=32), total=len(names), desc="images", unit="img"))


def build_records(scenes: list[Scene], images: list[str], seed: int) -> dict[str, list[dict]]:
    """The three splits of scenes and their file names (see `image_names`)."""
    stage1, stage2, heldout = [], [], []
    for index, (scene, image) in enumerate(zip(scenes, images, strict=True)):
        rng = np.random.default_rng([seed, index, 1])  # another stream than the scene's own
        name = f"{index:06d}"
        if image.startswith(HELDOUT_FOLDER):
            heldout += heldout_records(name, image, scene, rng)
            continue
        stage1.append(caption_record(name, image, scene, rng))
        stage2.append(question_record(name, image, scene, rng))
        if index % TEXT_ONLY_EVERY == TEXT_ONLY_EVERY - 1:
            stage2.append(text_only_record(f"text-{name}", rng))
    return {"stage1": stage1, "stage2": stage2, "heldout": heldout}


def make_data(output: Path, seed: int = 0, num_images: int = 4000, num_heldout: int = 100) -> None:
    """Write the quickstart's images and conversations.

    Args:
        output: folder to write into.
        seed: everything follows from it.
        num_images: JPEG files to draw, the held-out ones included.
        num_heldout: images kept for evaluation.
    """
    if not 0 < num_heldout < num_images:
        raise ValueError(f"--num_heldout {num_heldout} must be at least 1 and below --num_images {num_images}")
    names = image_names(num_images, num_heldout)
    scenes = write_images(draw_quickstart, output / "images", seed, names)
    for split, records in build_records(scenes, names, seed).items():
        (output / f"{split}.json").write_text(json.dumps(records, indent=1))
    (output / "scenes.json").write_text(json.dumps({n: s.to_dict() for n, s in zip(names, scenes, strict=True)}))


if __name__ == "__main__":
    auto_cli(make_data, as_positional=False)
