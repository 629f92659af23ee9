"""What one quickstart picture shows: a photograph, one to three shapes and a digit, each in its own quadrant.

A scene is plain data. It is drawn by `drawing.py`, told and asked about by `conversations.py`, and its annotations
supervise the toy vision tower, so all three agree by construction. Every scene depends on (seed, index) only.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np

SHAPES = ("circle", "square", "triangle", "star")
COLORS = {
    "red": (220, 35, 35),
    "green": (40, 170, 60),
    "blue": (40, 80, 225),
    "yellow": (245, 215, 40),
    "purple": (150, 50, 190),
    "white": (245, 245, 245),
}
QUADRANTS = ("top left", "top right", "bottom left", "bottom right")
NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PHOTOS = {  # scikit-image's name of a photograph that its wheel contains -> what it shows
    "astronaut": "an astronaut",
    "chelsea": "a cat",
    "coffee": "a cup of coffee",
    "rocket": "a rocket",
    "hubble_deep_field": "galaxies",
    "stereo_motorcycle": "a motorcycle",
    "coins": "old coins",
    "brick": "a brick wall",
}
CANVAS_SIZES = ((128, 128), (128, 128), (128, 128), (128, 128), (144, 112), (112, 144))  # (width, height), pixels
MAX_SHAPES = 3


@dataclass(frozen=True)
class Item:
    """A shape or the digit. `center` and `size` are fractions of (width, height) and of the shorter side."""

    kind: str  # a shape's name, or "digit"
    value: str  # the colour's name, or the digit as a numeral
    quadrant: str
    center: tuple[float, float]
    size: float


@dataclass(frozen=True)
class Scene:
    """`crop` is (left, top, side) of the photograph's window as fractions of what is free, and of the short side."""

    canvas: tuple[int, int]  # width, height in pixels
    photo: str  # a key of PHOTOS
    crop: tuple[float, float, float]
    flip: bool
    brightness: float
    shapes: tuple[Item, ...]
    digit: Item

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, d: dict[str, Any]) -> Scene:
        """Inverse of `to_dict`, also after a trip through JSON."""
        items = [Item(**{**item, "center": tuple(item["center"])}) for item in (*d["shapes"], d["digit"])]
        return cls(
            **{
                **d,
                "canvas": tuple(d["canvas"]),
                "crop": tuple(d["crop"]),
                "shapes": tuple(items[:-1]),
                "digit": items[-1],
            }
        )


def _place(kind: str, value: str, quadrant: str, rng: np.random.Generator) -> Item:
    column, row = "right" in quadrant, "bottom" in quadrant
    jitter = rng.uniform(-0.03, 0.03, size=2)
    center = (0.25 + 0.5 * column + float(jitter[0]), 0.25 + 0.5 * row + float(jitter[1]))
    return Item(kind, value, quadrant, center, float(rng.uniform(0.32, 0.40)))


def make_scene(seed: int, index: int) -> Scene:
    """Scene number `index` of the data set `seed`."""
    rng = np.random.default_rng([seed, index])
    quadrants = rng.permutation(QUADRANTS)
    kinds = rng.permutation(SHAPES)[: rng.integers(1, MAX_SHAPES + 1)]
    shapes = tuple(
        _place(str(kind), str(rng.choice(list(COLORS))), str(quadrant), rng)
        for kind, quadrant in zip(kinds, quadrants, strict=False)
    )
    return Scene(
        canvas=CANVAS_SIZES[rng.integers(len(CANVAS_SIZES))],
        photo=str(rng.choice(list(PHOTOS))),
        crop=(float(rng.uniform()), float(rng.uniform()), float(rng.uniform(0.75, 0.95))),
        flip=bool(rng.integers(2)),
        brightness=float(rng.uniform(0.7, 1.0)),
        shapes=shapes,
        digit=_place("digit", str(rng.integers(10)), str(quadrants[-1]), rng),
    )
