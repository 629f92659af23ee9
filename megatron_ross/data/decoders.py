"""How a rank turns images into pixels: one interface, `PixelDecoder`, and its Pillow implementation.

`dali_images.DaliDecoder` is the other one. A decoder never raises for a broken image; it returns the error in its
place, so that one bad file does not cost the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

from torch import Tensor

from megatron_ross.data.batch import ImageSpan
from megatron_ross.data.errors import ImageError


class PixelDecoder(Protocol):
    """Decodes images of one microbatch."""

    def decode(self, spans: Sequence[ImageSpan]) -> list[Tensor | ImageError]:
        """float32 [3, P, P] per image, or what is wrong with it."""

    def close(self) -> None:
        """Free threads and devices."""


class PillowDecoder:
    """The published preprocessing, several images at a time. Pillow lets other threads run while it decodes."""

    def __init__(self, num_workers: int = 4):
        self._pool = ThreadPoolExecutor(max(1, num_workers), thread_name_prefix="ross-image")

    def decode(self, spans: Sequence[ImageSpan]) -> list[Tensor | ImageError]:
        return list(self._pool.map(load_or_error, spans))

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)


def load_or_error(span: ImageSpan) -> Tensor | ImageError:
    """Pixels of one image, or the error that says why there are none."""
    try:
        return span.load_pixels()
    except ImageError as error:
        return error
