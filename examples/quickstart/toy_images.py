"""The quickstart's training images as the model will see them, for training its components."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from scenes import Scene
from torch import Tensor
from torch.nn.functional import interpolate

from megatron_ross.data.images import ImageProcessor, decode_image

IMAGE_SIZE = 112
PATCH_SIZE = 14
GRID_SIZE = IMAGE_SIZE // PATCH_SIZE
VAE_SIZE = 16 * GRID_SIZE
IMAGE_MEAN = IMAGE_STD = (0.5, 0.5, 0.5)


def load_training_images(data: Path) -> tuple[Tensor, list[Scene]]:
    """Pixels uint8 [n, 3, IMAGE_SIZE, IMAGE_SIZE] and scenes of the images in stage1.json (none is held out)."""
    process = ImageProcessor(IMAGE_MEAN, IMAGE_STD, IMAGE_SIZE)
    names = [record["image"] for record in json.loads((data / "stage1.json").read_text())]
    scenes = json.loads((data / "scenes.json").read_text())

    def load(name: str) -> np.ndarray:
        return process.to_uint8(decode_image((data / "images" / name).read_bytes(), name))

    with ThreadPoolExecutor(2) as pool:
        pixels = np.stack(list(pool.map(load, names)))
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), [Scene.from_dict(scenes[name]) for name in names]


def to_signed(pixels: Tensor) -> Tensor:
    """uint8 -> float32 in [-1, 1]; with mean and deviation 0.5 this is also the tower's normalisation."""
    return pixels.float() / 127.5 - 1


def vae_input(pixels: Tensor) -> Tensor:
    """uint8 [n, 3, P, P] -> what Ross gives the auto-encoder: float32 [n, 3, VAE_SIZE, VAE_SIZE] in [-1, 1]."""
    return interpolate(to_signed(pixels), size=(VAE_SIZE, VAE_SIZE), mode="bilinear", align_corners=False)
