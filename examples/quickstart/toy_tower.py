"""A small SigLIP vision tower that recognises the quickstart's shapes, saved as transformers saves it.

A real run takes a tower pretrained on hundreds of millions of pictures. Ours learns from the training images (none held
out) to say for every patch what lies there and to keep its pixels, so that its features serve questions and
reconstruction alike. The task heads are thrown away.

    python examples/quickstart/toy_tower.py --data DIR --output DIR
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from jsonargparse import auto_cli
from scenes import COLORS, PHOTOS, SHAPES, Item, Scene
from torch import Tensor, nn
from toy_images import GRID_SIZE, IMAGE_MEAN, IMAGE_SIZE, IMAGE_STD, PATCH_SIZE, load_training_images, to_signed
from tqdm import trange
from transformers import SiglipImageProcessor, SiglipVisionConfig, SiglipVisionModel

NOTHING = 0  # class of a patch without an item, in each of the three item tasks
DIGITS = tuple("0123456789")
TASKS = {"kind": 1 + len(SHAPES) + 1, "color": 1 + len(COLORS), "digit": 1 + len(DIGITS), "photo": len(PHOTOS)}
PIXEL_STRIDE = 2  # pixels of a patch are predicted at this coarseness
PIXELS_PER_PATCH = 3 * (PATCH_SIZE // PIXEL_STRIDE) ** 2
PIXEL_WEIGHT = 2.0
BAR_ROW = 1  # of the progress bar: make_components.py shows three at once


def build_tower() -> SiglipVisionModel:
    """SigLIP with random weights. Ross reads the output of the last but one layer, so only three are ever run."""
    return SiglipVisionModel(
        SiglipVisionConfig(
            hidden_size=96,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            image_size=IMAGE_SIZE,
            patch_size=PATCH_SIZE,
        )
    )


def _covers(item: Item, scene: Scene) -> tuple[slice, slice]:
    """Rows and columns of the patches that the item's middle covers, in the padded square picture."""
    width, height = scene.canvas
    side = max(width, height)
    x = (item.center[0] * width + (side - width) / 2) / side * GRID_SIZE
    y = (item.center[1] * height + (side - height) / 2) / side * GRID_SIZE
    reach = 0.35 * item.size * min(width, height) / side * GRID_SIZE
    return slice(int(y - reach), int(y + reach) + 1), slice(int(x - reach), int(x + reach) + 1)


def patch_labels(scene: Scene) -> Tensor:
    """Class of every patch in each of TASKS: int64 [len(TASKS), GRID_SIZE**2]."""
    labels = torch.zeros(len(TASKS), GRID_SIZE, GRID_SIZE, dtype=torch.int64)
    labels[3] = list(PHOTOS).index(scene.photo)
    for item in scene.shapes:
        rows, columns = _covers(item, scene)
        labels[0, rows, columns] = 1 + SHAPES.index(item.kind)
        labels[1, rows, columns] = 1 + list(COLORS).index(item.value)
    rows, columns = _covers(scene.digit, scene)
    labels[0, rows, columns] = 1 + len(SHAPES)
    labels[2, rows, columns] = 1 + DIGITS.index(scene.digit.value)
    return labels.flatten(1)


def patch_pixels(signed: Tensor) -> Tensor:
    """Coarse pixels of every patch: [n, 3, P, P] -> [n, N, PIXELS_PER_PATCH]."""
    coarse = F.avg_pool2d(signed, PIXEL_STRIDE)
    return F.unfold(coarse, PATCH_SIZE // PIXEL_STRIDE, stride=PATCH_SIZE // PIXEL_STRIDE).transpose(1, 2)


def tower_loss(outputs: Tensor, labels: Tensor, pixels: Tensor) -> Tensor:
    """Sum of the tasks' cross entropies and the pixels' squared error.

    Patches without an item weigh little in the item tasks, because there are many.

    Args:
        outputs: [n, N, sum(TASKS) + PIXELS_PER_PATCH].
        labels: [n, len(TASKS), N].
        pixels: [n, N, PIXELS_PER_PATCH].
    """
    *scores, painted = outputs.split([*TASKS.values(), PIXELS_PER_PATCH], dim=-1)
    loss = PIXEL_WEIGHT * F.mse_loss(painted, pixels)
    for i, (task, num_classes) in enumerate(TASKS.items()):
        weight = torch.ones(num_classes)
        weight[NOTHING] = 1.0 if task == "photo" else 0.1
        loss = loss + F.cross_entropy(scores[i].flatten(0, 1), labels[:, i].flatten(), weight)
    return loss


def pretrain_tower(
    tower: SiglipVisionModel, pixels: Tensor, labels: Tensor, steps: int, batch: int, lr: float
) -> float:
    """Train on random batches; returns the last loss."""
    head = nn.Linear(tower.config.hidden_size, sum(TASKS.values()) + PIXELS_PER_PATCH)
    parameters = [*tower.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.98), weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, lr, total_steps=steps, pct_start=0.1, cycle_momentum=False
    )
    progress = trange(steps, desc="vision tower", unit="step", position=BAR_ROW)
    for _ in progress:
        chosen = torch.randint(len(pixels), (batch,))
        signed = to_signed(pixels[chosen])
        features = tower(signed, output_hidden_states=True).hidden_states[-2]
        loss = tower_loss(head(features), labels[chosen], patch_pixels(signed))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    return loss.item()


def make_tower(data: Path, output: Path, seed: int = 0, steps: int = 550, batch: int = 32, lr: float = 2e-3) -> str:
    """Train the tower on the images of `make_data.py`.

    Args:
        data: folder that make_data.py wrote.
        output: folder for `save_pretrained`.
        seed: of the initial weights and batches.

    Returns:
        A line that says what was made.
    """
    torch.set_num_threads(1)  # the three components are made at the same time
    torch.manual_seed(seed)
    pixels, scenes = load_training_images(data)
    tower = build_tower()
    loss = pretrain_tower(tower, pixels, torch.stack([patch_labels(s) for s in scenes]), steps, batch, lr)
    tower.save_pretrained(output)
    SiglipImageProcessor(
        size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}, image_mean=list(IMAGE_MEAN), image_std=list(IMAGE_STD)
    ).save_pretrained(output)
    return f"vision tower: {tower.num_parameters():,} parameters, loss {loss:.3f}"


if __name__ == "__main__":
    print(auto_cli(make_tower, as_positional=False))
