"""Data of the ablation: JPEG files and LLaVA-format JSON about small and thin things, the same bytes for the same seed.

Writes under --output:

    images/000000.jpg ...   see details.py
    images/heldout/...      the same, for evaluation only
    train.json              multi-turn questions about every image that is not held out
    train_<n>.json          the first n of them, for each --subset n
    stage1.json             a caption for every image of train.json, to align the projector with
    heldout.json            single-turn questions about the held-out images, with their category
    scenes.json             what each image shows but for its line, to train the toy tower with
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import quickstart_scripts  # noqa: F401
from conversations import caption_record
from details import Details, draw_details, heldout_records, training_record
from jsonargparse import auto_cli
from make_data import HELDOUT_FOLDER, image_names, write_images


def build_records(shown: list[Details], images: list[str], seed: int) -> dict[str, list[dict]]:
    """The splits of pictures and their file names (see `image_names`)."""
    train, captions, heldout = [], [], []
    for index, (details, image) in enumerate(zip(shown, images, strict=True)):
        name = f"{index:06d}"
        if image.startswith(HELDOUT_FOLDER):
            heldout += heldout_records(name, image, details)
        else:
            train.append(training_record(name, image, details, np.random.default_rng([seed, index, 8])))
            captions.append(caption_record(name, image, details.scene, np.random.default_rng([seed, index, 9])))
    return {"train": train, "stage1": captions, "heldout": heldout}


def make_details_data(
    output: Path, seed: int = 0, num_images: int = 5900, num_heldout: int = 200, subset: list[int] | None = None
) -> None:
    """Write images and conversations.

    Args:
        output: folder to write into.
        seed: everything follows from it.
        num_images: JPEG files to draw, the held-out ones included.
        num_heldout: images kept for evaluation.
        subset: sizes of smaller training sets to write as well.
    """
    if not 0 < num_heldout < num_images:
        raise ValueError(f"--num_heldout {num_heldout} must be at least 1 and below --num_images {num_images}")
    names = image_names(num_images, num_heldout)
    shown = write_images(draw_details, output / "images", seed, names)
    splits = build_records(shown, names, seed)
    for size in subset or []:
        if not 0 < size <= len(splits["train"]):
            raise ValueError(f"--subset {size}: there are {len(splits['train'])} training records")
        splits[f"train_{size}"] = splits["train"][:size]
    for split, records in splits.items():
        (output / f"{split}.json").write_text(json.dumps(records, indent=1))
    scenes = {name: details.scene.to_dict() for name, details in zip(names, shown, strict=True)}
    (output / "scenes.json").write_text(json.dumps(scenes))


if __name__ == "__main__":
    auto_cli(make_details_data, as_positional=False)
