"""Tensors to pictures, and pictures side by side."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image
from torch import Tensor

PANEL_GAP_PX = 4


def to_pil(images: Tensor) -> list[Image.Image]:
    """Float images [n, 3, H, W] in [-1, 1] (clamped) -> PIL images."""
    return bytes_to_pil(to_bytes(images))


def bytes_to_pil(images: Tensor) -> list[Image.Image]:
    """uint8 [n, 3, H, W] -> PIL images."""
    return [Image.fromarray(value) for value in images.permute(0, 2, 3, 1).cpu().numpy()]


def to_bytes(images: Tensor) -> Tensor:
    """The same as uint8 [n, 3, H, W]."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().byte()


def side_by_side(panels: Sequence[Image.Image]) -> Image.Image:
    """Pictures of one size in a row on white, with a small gap."""
    width, height = panels[0].size
    row = Image.new("RGB", (len(panels) * (width + PANEL_GAP_PX) - PANEL_GAP_PX, height), "white")
    for i, panel in enumerate(panels):
        row.paste(panel, (i * (width + PANEL_GAP_PX), 0))
    return row


def below_each_other(rows: Sequence[Image.Image]) -> Image.Image:
    """Rows of one size on white, with a small gap."""
    width, height = rows[0].size
    grid = Image.new("RGB", (width, len(rows) * (height + PANEL_GAP_PX) - PANEL_GAP_PX), "white")
    for i, row in enumerate(rows):
        grid.paste(row, (0, i * (height + PANEL_GAP_PX)))
    return grid
