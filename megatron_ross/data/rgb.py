"""Any picture that Pillow can open -> 8-bit RGB, in one of two ways (the setting `image_conversion`).

`published` is Pillow's `convert("RGB")`, as in the published code: 16-bit grey is clipped at 255, floats are cut to
integers, transparency is dropped (black writing on a transparent ground becomes a black square), EXIF orientation is
ignored. `viewer` is what a picture viewer shows:

    16-bit and 12-bit grey    scaled by the range of the file's bits, so that two pictures stay comparable
    float, 32-bit, signed     no range is defined: 0-1 or 0-255 where all values lie in it, else smallest to largest;
                              NaN is black, infinities are the ends of the range, a constant outside 0-255 is black
    white is zero (TIFF)      inverted, in all of these
    transparency              laid on white: alpha channels, transparent colours of palettes, and colour keys
    orientation (EXIF)        turned upright

Both take the first picture of a file with several, and neither applies colour profiles (ICC): vision towers were
trained without. CMYK is inverted where Adobe's marker says so, by Pillow.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import ExifTags, Image

CONVERSIONS = ("viewer", "published")

KINDS = {
    "image_16_bit": ("16-bit grey, scaled to 8 bits", "16-bit grey, clipped at 255"),
    "image_float": ("float or 32-bit, scaled to 8 bits", "float or 32-bit, clipped to 0-255"),
    "image_transparent": ("transparent, laid on white", "transparent, opacity dropped"),
    "image_rotated": ("turned as EXIF says", "EXIF orientation ignored"),
}
"""Pictures that the two ways show differently, and what `viewer` and `published` do with them."""

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_PNG_EXIF = (b"eXIf", b"Raw profile type exif", b"com.adobe.xmp")
"""Marks of the places where a PNG file may keep its orientation."""

_STRIP_PIXELS = 1 << 22
_PHOTOMETRIC, _BITS, _SAMPLE_FORMAT = 262, 258, 339  # TIFF tags


class Picture:
    """An opened image file and what, besides its pixels, decides how it looks."""

    def __init__(self, image: Image.Image) -> None:
        """Reads the pixels. Raises whatever Pillow's plugins raise for damaged files."""
        tiles = getattr(image, "tile", None)  # says how deep the file is, until it is loaded
        arguments = tiles[0][3] if tiles else ""
        self._raw_mode = arguments if isinstance(arguments, str) else str(next(iter(arguments or ()), ""))
        image.load()
        self._image = image
        self._turn = _TURNS.get(_orientation(image))
        self._opacity = _opacity(image, self._raw_mode)

    @property
    def kinds(self) -> list[str]:
        """Those of KINDS that this picture is."""
        found = {
            "image_16_bit": self._full_scale is not None,
            "image_float": self._is_deep and self._full_scale is None,
            "image_transparent": self._opacity is not None,
            "image_rotated": self._turn is not None,
        }
        return [kind for kind, is_one in found.items() if is_one]

    def rgb(self, conversion: str) -> Image.Image:
        """Mode RGB; `conversion` is one of CONVERSIONS. What `viewer` gives is not changed by converting it again."""
        if conversion == "published":
            return self._image.convert("RGB")
        image = self._grey() if self._is_deep else _without_alpha(self._image)
        if self._opacity is not None:
            ground = Image.new("RGB", image.size, "white")
            ground.paste(image, mask=self._opacity)
            image = ground
        if self._turn is not None:
            image = image.transpose(self._turn)
        image.info = {}  # orientation and colour keys are used up
        return image

    @property
    def _is_deep(self) -> bool:
        """More than 8 bits per pixel are left in the one channel."""
        return self._image.mode[0] in "IF"

    @property
    def _full_scale(self) -> int | None:
        """The value of white of a grey picture with more than 8 bits, if the format defines one."""
        if self._raw_mode.startswith("I;12"):
            return 4095
        is_short = self._image.mode.startswith("I;16") and "S" not in self._image.mode
        return 65535 if is_short or (self._image.mode == "I" and self._image.format in ("PNG", "PPM")) else None

    def _grey(self) -> Image.Image:
        """Mode RGB, of a picture with more than 8 bits; strip by strip, because the numbers on the way are wider."""
        values, full = np.asarray(self._image), self._full_scale
        values = values.view(np.uint32) if self._is_unsigned else values
        height, width = values.shape
        rows = max(1, _STRIP_PIXELS // width)
        strips = [slice(first, first + rows) for first in range(0, height, rows)]
        limits = (0.0, float(full)) if full is not None else _limits([values[strip] for strip in strips])
        grey = np.empty((height, width), dtype=np.uint8)
        for strip in strips:
            grey[strip] = _scaled(values[strip], *limits)
        if self._tag(_PHOTOMETRIC) == 0:
            np.subtract(255, grey, out=grey)
        return Image.fromarray(grey).convert("RGB")

    @property
    def _is_unsigned(self) -> bool:
        """32-bit integers that Pillow reads as signed ones."""
        return self._image.mode == "I" and self._tag(_BITS) == (32,) and self._tag(_SAMPLE_FORMAT) in (None, (1,))

    def _tag(self, number: int) -> Any:
        """A tag of a TIFF file; None if it has none, or is another file."""
        return getattr(self._image, "tag_v2", {}).get(number)


def is_plain(image: Image.Image, data: bytes) -> bool:
    """Whether an opened 8-bit RGB or grey file has neither orientation nor transparency, from its header alone."""
    if "transparency" in image.info:
        return False
    if image.format == "PNG":  # whose EXIF may stand behind the pixels: Pillow would decode them to look
        return not any(mark in data for mark in _PNG_EXIF)
    return _orientation(image) not in _TURNS


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # a picture whose EXIF block is damaged is shown as it lies, by viewers, too
        return 1


def _opacity(image: Image.Image, raw_mode: str) -> Image.Image | None:
    """Mode L, 255 is opaque; None if all of it is."""
    if image.mode in ("RGBa", "La"):
        image = image.convert(image.mode.upper())
    elif image.mode in ("P", "PA") and image.has_transparency_data:
        image = image.convert("RGBA")
    if image.mode in ("RGBA", "LA"):
        alpha = image.getchannel("A")
    else:
        is_key = _is_colour_key(image, raw_mode)
        if is_key is None:
            return None
        alpha = Image.fromarray(np.where(is_key, np.uint8(0), np.uint8(255)))
    return None if alpha.getextrema()[0] == 255 else alpha


def _is_colour_key(image: Image.Image, raw_mode: str) -> np.ndarray | None:
    """bool [h, w]: pixels of the one colour that the file calls transparent. Its value has the file's bits."""
    key = image.info.get("transparency")
    if isinstance(key, tuple) and len(key) == 3 and image.mode == "RGB":
        bits = 8 if raw_mode.startswith("RGB;16") else 0  # Pillow keeps the upper half of 16 bits
        return (np.asarray(image) == np.array([value >> bits for value in key])).all(axis=2)
    if isinstance(key, int) and (image.mode in ("1", "L", "I") or image.mode.startswith("I;16")):
        step = {"L;2": 85, "L;4": 17}.get(raw_mode, 1)
        return np.asarray(image) == key * step
    return None


def _without_alpha(image: Image.Image) -> Image.Image:
    """Mode RGB, a copy; the colours of transparent pixels are kept."""
    if image.mode in ("RGBa", "La"):  # colours multiplied by alpha
        image = image.convert(image.mode.upper())
    return image.convert("RGB")


def _limits(strips: list[np.ndarray]) -> tuple[float, float]:
    """Black and white of numbers without a defined range: 0 and 1, 0 and 255, or the smallest and the largest."""
    low, high = np.inf, -np.inf
    for strip in strips:
        finite = strip[np.isfinite(strip)]
        if finite.size:
            low, high = min(low, float(finite.min())), max(high, float(finite.max()))
    if low > high:  # none is a number
        return 0.0, 1.0
    return (0.0, 1.0 if high <= 1 else 255.0) if low >= 0 and high <= 255 else (low, high)


def _scaled(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """uint8 of the same shape."""
    numbers = np.nan_to_num(values.astype(np.float64), nan=low, posinf=high, neginf=low)
    return np.rint(((numbers - low) * (255 / ((high - low) or 1))).clip(0, 255)).astype(np.uint8)
