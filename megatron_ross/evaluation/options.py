"""Options of the programs that ask a loaded model, and their rules. Needs no torch: mistakes are told at once."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ross.config.shown import shown

DTYPES = ("auto", "bf16", "fp16", "fp32")
TEMPLATES = ("qwen_2", "v1", "llava_v1", "llama3", "plain")
IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


@dataclass(frozen=True)
class Decoding:
    """How answers are chosen: greedily at temperature 0, else by sampling."""

    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    """Sample from the likeliest tokens only; 0: from all."""
    stop: tuple[str, ...] = ()
    """Texts that end an answer and do not belong to it, beside the checkpoint's end tokens."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max-new-tokens is {self.max_new_tokens}, it must be at least 1")
        if self.temperature < 0:
            raise ValueError(f"temperature is {self.temperature}, it must be 0 (greedy) or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top-p is {self.top_p}, it must be above 0 and at most 1")
        if self.top_k < 0:
            raise ValueError(f"top-k is {self.top_k}, it must be at least 1, or 0 for no limit")

    def options(self) -> dict[str, Any]:
        """Arguments of transformers' `generate`; they override the checkpoint's generation config."""
        options: dict[str, Any] = {"max_new_tokens": self.max_new_tokens, "do_sample": self.temperature > 0}
        sampling = {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        return options | (sampling if self.temperature > 0 else dict.fromkeys(sampling))


def check_device(device: str | None) -> None:
    """Raises ValueError: not the name of a device. Whether it is there is known when the model is loaded."""
    if device is not None and not re.fullmatch(r"(?:cpu|cuda|mps|xpu)(?::\d+)?", device):
        raise ValueError(f"device={shown(device, 40)}: write cpu, cuda or cuda:N")


def image_files(folder: Path) -> list[Path]:
    """Image files of a folder, by name.

    Raises:
        ValueError: it is no folder, or holds no images.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder of images")
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)
    if not files:
        raise ValueError(f"{folder} holds no images ({', '.join(IMAGE_SUFFIXES)})")
    return files
