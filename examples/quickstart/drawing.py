"""Draw a scene: photograph, then flat shapes with a dark outline, then the digit on a dark tile."""

from __future__ import annotations

import functools
import math

import numpy as np
import skimage.data
from PIL import Image, ImageDraw, ImageEnhance, ImageFont
from scenes import COLORS, Item, Scene

SUPERSAMPLING = 2  # drawn larger by this factor and reduced, which smooths the edges
OUTLINE = (20, 20, 20)
SHORT_SIDE = 320  # photographs are kept at this size: small enough to crop quickly


@functools.cache
def load_photo(name: str) -> Image.Image:
    """A photograph out of scikit-image's wheel (nothing is downloaded) as RGB, shorter side `SHORT_SIDE`."""
    pixels = getattr(skimage.data, name)()
    pixels = pixels[0] if isinstance(pixels, tuple) else pixels  # the stereo pair: its left picture
    photo = Image.fromarray(np.asarray(pixels)).convert("RGB")
    scale = SHORT_SIDE / min(photo.size)
    return photo.resize((round(photo.width * scale), round(photo.height * scale)), Image.Resampling.LANCZOS)


def _background(scene: Scene, size: tuple[int, int]) -> Image.Image:
    photo = load_photo(scene.photo)
    left, top, side = scene.crop
    scale = side * min(photo.width / size[0], photo.height / size[1])
    width, height = size[0] * scale, size[1] * scale
    x, y = left * (photo.width - width), top * (photo.height - height)
    crop = photo.resize(size, Image.Resampling.BICUBIC, box=(x, y, x + width, y + height))
    if scene.flip:
        crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return ImageEnhance.Brightness(crop).enhance(scene.brightness)


def _corners(kind: str) -> list[tuple[float, float]]:
    """Corners of a triangle or star around the origin; coordinates within [-1, 1]."""
    points, inner = (3, 1.0) if kind == "triangle" else (5, 0.42)
    turns = range(points) if kind == "triangle" else range(2 * points)
    step = 2 * math.pi / len(turns)
    radii = [1.0 if i % 2 == 0 or kind == "triangle" else inner for i in turns]
    return [(r * math.sin(i * step), -r * math.cos(i * step)) for i, r in zip(turns, radii, strict=True)]


def _draw_shape(draw: ImageDraw.ImageDraw, item: Item, x: float, y: float, radius: float, line: int) -> None:
    fill = COLORS[item.value]
    if item.kind == "circle":
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill, OUTLINE, line)
    elif item.kind == "square":
        r = 0.88 * radius
        draw.rectangle((x - r, y - r, x + r, y + r), fill, OUTLINE, line)
    else:
        r, shift = 1.15 * radius, (0.2 if item.kind == "triangle" else 0.05) * radius
        draw.polygon([(x + r * u, y + r * v + shift) for u, v in _corners(item.kind)], fill, OUTLINE, line)


def _draw_digit(draw: ImageDraw.ImageDraw, item: Item, x: float, y: float, radius: float) -> None:
    draw.rectangle((x - radius, y - radius, x + radius, y + radius), OUTLINE)
    font = ImageFont.load_default(size=2.0 * radius)
    draw.text((x, y), item.value, fill=(255, 255, 255), font=font, anchor="mm")


def draw_scene(scene: Scene) -> Image.Image:
    """The picture of `scene`: RGB of size `scene.canvas`."""
    size = (scene.canvas[0] * SUPERSAMPLING, scene.canvas[1] * SUPERSAMPLING)
    image = _background(scene, size)
    draw = ImageDraw.Draw(image)
    for item in (*scene.shapes, scene.digit):
        x, y, radius = item.center[0] * size[0], item.center[1] * size[1], item.size * min(size) / 2
        if item.kind == "digit":
            _draw_digit(draw, item, x, y, radius)
        else:
            _draw_shape(draw, item, x, y, radius, line=2 * SUPERSAMPLING)
    return image.resize(scene.canvas, Image.Resampling.BOX)
