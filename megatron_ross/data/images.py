"""Image files -> the vision tower's pixels, as published, with Pillow.

Everything becomes RGB first (`rgb.py` says how). `pad` pastes the image into a square of its longer side in the mean
colour. Then SigLIP's processor stretches to the input size; CLIP's scales the shorter side to it and crops the centre.
Resizing, bicubic if the tower's processor says nothing else, is on uint8; pixels are then (value / 255 - mean) / std.
"""

from __future__ import annotations

import contextlib
import functools
import io
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from megatron_ross.config.model import VisionConfig
from megatron_ross.data.errors import ImageError
from megatron_ross.data.rgb import CONVERSIONS, Picture

MAX_PIXELS = 178_956_970
"""Images with more pixels are refused (Pillow's own limit for a decompression bomb)."""

MAX_SCANS = 500
"""JPEG files with more scans are refused: each is a pass over all pixels. A progressive photograph has about ten."""

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "PPM", "TIFF", "AVIF")
"""What photographs and drawings come in. Pillow knows more; some start programs (EPS), or hold files in files (ICO)."""


def decode_image(data: bytes, name: str, conversion: str = "viewer") -> Image.Image:
    """Decode the bytes of an image file to RGB.

    Args:
        name: file name for messages.
        conversion: one of `rgb.CONVERSIONS`.

    Raises:
        ImageError: not an image of FORMATS, truncated, or with more than MAX_PIXELS or MAX_SCANS.
    """
    return inspect_image(data, name, conversion)[0]


def inspect_image(data: bytes, name: str, conversion: str) -> tuple[Image.Image, list[str]]:
    """Like `decode_image`; also returns those of `rgb.KINDS` that the image is."""
    with _naming(name):
        picture = Picture(_open(data))
        return picture.rgb(conversion), picture.kinds


def open_decodable(data: bytes, name: str) -> Image.Image:
    """An image file in its own mode, proven to be decodable but not yet read, as an ImageProcessor wants it.

    A read one no longer says how many bits the file has. Raises ImageError, as `decode_image` does.
    """
    decode_image(data, name)
    return _open(data)


def _open(data: bytes) -> Image.Image:
    if not data:
        raise ImageError("is empty (0 bytes)")
    image = Image.open(io.BytesIO(data), formats=_formats())
    _check_size(*image.size)
    check_scans(data)
    return image


@contextlib.contextmanager
def _naming(name: str) -> Iterator[None]:
    """Whatever is wrong with an image becomes an ImageError that names it."""
    try:
        yield
    except ImageError as error:
        raise ImageError(f"image {name!r} {error}") from error
    except UnidentifiedImageError as error:
        raise ImageError(f"image {name!r} cannot be decoded: none of {', '.join(_formats())}, or damaged") from error
    except Exception as error:  # Pillow's plugins raise whatever their parsers stumble over
        raise ImageError(f"image {name!r} cannot be decoded: {type(error).__name__}: {error}") from error


_FILTERS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


@functools.cache
def _formats() -> tuple[str, ...]:
    """Those of FORMATS that this build of Pillow has."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def check_scans(data: bytes) -> None:
    """Refuse a JPEG file of more than MAX_SCANS, by the marks that start them. Raises ImageError."""
    if data.startswith(b"\xff\xd8") and (found := data.count(b"\xff\xda")) > MAX_SCANS:
        raise ImageError(f"has {found} scans, more than {MAX_SCANS}; refused")


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise ImageError(f"needs {width}x{height} pixels, more than {MAX_PIXELS}; refused")


@dataclass(frozen=True)
class ImageProcessor:
    """Callable from a PIL image to pixels.

    `mode` is "pad" or "square" (published name `image_aspect_ratio`); `resize` is "stretch" (SigLIP) or "crop" (CLIP);
    `resample` is Pillow's filter; `conversion` is one of `rgb.CONVERSIONS` (setting `image_conversion`).
    """

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    image_size: int
    mode: str = "pad"
    resize: str = "stretch"
    resample: str = "bicubic"
    conversion: str = "viewer"

    def __post_init__(self) -> None:
        if self.mode not in ("pad", "square"):
            raise ValueError(f"image_aspect_ratio {self.mode!r} is unknown; use 'pad' or 'square'")
        if self.resize not in ("stretch", "crop"):
            raise ValueError(f"resize {self.resize!r} is unknown; use 'stretch' or 'crop'")
        if self.resample not in _FILTERS:
            raise ValueError(f"resample {self.resample!r} is unknown; use {', '.join(map(repr, _FILTERS))}")
        if self.conversion not in CONVERSIONS:
            raise ValueError(f"image_conversion {self.conversion!r} is unknown; use 'viewer' or 'published'")

    @classmethod
    def from_config(cls, vision: VisionConfig) -> ImageProcessor:
        """The processor that belongs to a vision tower."""
        return cls(
            vision.image_mean,
            vision.image_std,
            vision.image_size,
            vision.image_aspect_ratio,
            "crop" if vision.crops else "stretch",
            vision.resample,
            vision.image_conversion,
        )

    def decode(self, data: bytes, name: str) -> Image.Image:
        """The bytes of an image file -> RGB. Raises ImageError."""
        return decode_image(data, name, self.conversion)

    @property
    def pad_colour(self) -> tuple[int, int, int]:
        """int(255 * mean) per channel."""
        r, g, b = (int(255 * m) for m in self.mean)
        return r, g, b

    def __call__(self, image: Image.Image) -> Tensor:
        """float32 [3, P, P], normalised."""
        return self.normalise(self.to_uint8(image))

    def to_uint8(self, image: Image.Image) -> np.ndarray:
        """uint8 [P, P, 3], resized but not normalised.

        Raises:
            ImageError: the aspect ratio is so extreme that an intermediate image would pass MAX_PIXELS.
        """
        image = Picture(image).rgb(self.conversion)
        if self.mode == "pad":
            image = pad_to_square(image, self.pad_colour)
        size = self.image_size
        if self.resize == "stretch":
            image = image.resize((size, size), _FILTERS[self.resample])
        else:
            image = _scale_and_crop(image, size, _FILTERS[self.resample])
        return np.asarray(image)

    def normalise(self, pixels: np.ndarray) -> Tensor:
        """uint8 [P, P, 3] -> float32 [3, P, P]."""
        values = np.ascontiguousarray(pixels.transpose(2, 0, 1)).astype(np.float32)  # faster in this order
        mean, std = (np.array(v, dtype=np.float32)[:, None, None] for v in (self.mean, self.std))
        values /= 255  # numpy, not torch: this runs in many threads, each of which would start its own OpenMP team
        values -= mean
        values /= std
        return torch.from_numpy(values)


def pad_to_square(image: Image.Image, colour: tuple[int, int, int]) -> Image.Image:
    """Paste into the middle of a square of the longer side; the offset is rounded down."""
    width, height = image.size
    if width == height:
        return image
    side = max(width, height)
    _check_size(side, side)
    square = Image.new(image.mode, (side, side), colour)
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square


def _scale_and_crop(image: Image.Image, size: int, resample: Image.Resampling) -> Image.Image:
    """Shorter side to `size` (the longer one rounded down), then the central square."""
    shorter = min(image.size)
    width, height = (size if side == shorter else int(size * side / shorter) for side in image.size)
    _check_size(width, height)
    image = image.resize((width, height), resample)
    left, top = (width - size) // 2, (height - size) // 2
    return image.crop((left, top, left + size, top + size))
