"""Pictures that turn on fine detail: a small digit, a thin line and up to five small shapes on a photograph.

The picture is a 3x3 grid. Digit and line have a cell of their own, shapes lie in the others. At the tower's 112 pixels
a digit is about 25 pixels high, that is two patches; a line is two pixels wide.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import quickstart_scripts  # noqa: F401
from conversations import Question, Record, turns
from drawing import draw_scene
from PIL import Image, ImageDraw
from scenes import COLORS, NUMBER_WORDS, PHOTOS, SHAPES, Item, Scene

CELLS = ("top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right")
CANVAS_PX = 128
MAX_SHAPES = 5
JITTER = 0.04  # of a centre, as a fraction of the side
ITEM_SIZES = (0.20, 0.25)  # height as a fraction of the side
LINE_LENGTHS = (0.24, 0.30)
LINE_WIDTH_PX = 2.5
LINE_SUPERSAMPLING = 4
DIRECTIONS = {"horizontal": 0.0, "rising": 45.0, "vertical": 90.0, "falling": 135.0}  # degrees, anticlockwise
MAX_TILT = 12.0  # degrees off its direction


@dataclass(frozen=True)
class Line:
    """A thin line; `center` and `length` are fractions of the side, `angle` is in degrees, anticlockwise."""

    direction: str
    color: str
    center: tuple[float, float]
    length: float
    angle: float


@dataclass(frozen=True)
class Details:
    """What a picture shows: a quickstart scene whose items name cells instead of quadrants, and a line."""

    scene: Scene
    line: Line

    def to_dict(self) -> dict[str, Any]:
        return {"scene": self.scene.to_dict(), "line": dataclasses.asdict(self.line)}


def _center(cell: int, rng: np.random.Generator) -> tuple[float, float]:
    x, y = (1 + 2 * (cell % 3)) / 6, (1 + 2 * (cell // 3)) / 6
    dx, dy = rng.uniform(-JITTER, JITTER, size=2)
    return float(x + dx), float(y + dy)


def _item(kind: str, value: str, cell: int, rng: np.random.Generator) -> Item:
    return Item(kind, value, CELLS[cell], _center(cell, rng), float(rng.uniform(*ITEM_SIZES)))


def make_details(seed: int, index: int) -> Details:
    """Picture number `index` of the data set `seed`."""
    rng = np.random.default_rng([seed, index, 7])
    digit_cell, line_cell, *cells = (int(cell) for cell in rng.permutation(len(CELLS)))
    count = int(rng.integers(1, MAX_SHAPES + 1))
    colors = list(COLORS)
    scene = Scene(
        canvas=(CANVAS_PX, CANVAS_PX),
        photo=str(rng.choice(list(PHOTOS))),
        crop=(float(rng.uniform()), float(rng.uniform()), float(rng.uniform(0.75, 0.95))),
        flip=bool(rng.integers(2)),
        brightness=float(rng.uniform(0.6, 0.9)),
        shapes=tuple(_item(str(rng.choice(SHAPES)), str(rng.choice(colors)), cell, rng) for cell in cells[:count]),
        digit=_item("digit", str(rng.integers(10)), digit_cell, rng),
    )
    direction = str(rng.choice(list(DIRECTIONS)))
    angle = DIRECTIONS[direction] + float(rng.uniform(-MAX_TILT, MAX_TILT))
    line = Line(direction, str(rng.choice(colors)), _center(line_cell, rng), float(rng.uniform(*LINE_LENGTHS)), angle)
    return Details(scene, line)


def _stroke(line: Line, side: int) -> Image.Image:
    """How far the line covers each pixel: an 8-bit mask of side `side`."""
    big = side * LINE_SUPERSAMPLING
    mask = Image.new("L", (big, big))
    x, y = (fraction * big for fraction in line.center)
    half, turn = line.length * big / 2, math.radians(line.angle)
    dx, dy = half * math.cos(turn), -half * math.sin(turn)
    width = round(LINE_WIDTH_PX * LINE_SUPERSAMPLING)
    ImageDraw.Draw(mask).line((x - dx, y - dy, x + dx, y + dy), fill=255, width=width)
    return mask.resize((side, side), Image.Resampling.BOX)


def draw_details(seed: int, index: int) -> tuple[Details, Image.Image]:
    """What picture `index` shows, and the picture: RGB, `CANVAS_PX` square."""
    details = make_details(seed, index)
    image = draw_scene(details.scene)
    image.paste(COLORS[details.line.color], (0, 0), _stroke(details.line, CANVAS_PX))
    return details, image


def questions(details: Details) -> dict[str, Question]:
    """One question of each category; its words are the same for every picture, so the picture decides."""
    scene, line = details.scene, details.line
    return {
        "digit": ("Which digit is written?", scene.digit.value),
        "position": ("Where is the digit?", scene.digit.quadrant),
        "count": ("How many shapes are there?", NUMBER_WORDS[len(scene.shapes)]),
        "direction": ("Which way does the line go?", line.direction),
        "line color": ("What color is the line?", line.color),
    }


def training_record(name: str, image: str, details: Details, rng: np.random.Generator) -> Record:
    """One conversation with every question, in random order."""
    pairs = list(questions(details).values())
    shuffled = [pairs[i] for i in rng.permutation(len(pairs))]
    return {"id": name, "image": image, "conversations": turns(shuffled, image=True)}


def heldout_records(name: str, image: str, details: Details) -> list[Record]:
    """One single-turn record per question; the key "question_type" says which."""
    return [
        {"id": f"{name}-{kind}", "image": image, "question_type": kind, "conversations": turns([pair], image=True)}
        for kind, pair in questions(details).items()
    ]
