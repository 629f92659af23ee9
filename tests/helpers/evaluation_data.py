"""Small data sets in the formats of MMVP and POPE."""

from __future__ import annotations

import io
import json
from pathlib import Path

from PIL import Image

MMVP_HEADER = "lndex,Question,Options,Correct Answer"
MMVP_ROWS = [
    '1,"Are the wings open?","(a) Open (b) Closed",(a)',
    '2,"Are the wings open?","(a) Open (b) Closed",(b)',
    '3,"One or two, roughly?","(a) One (b) Two",(b)',
    '4,"One or two, roughly?","(a) One (b) Two",(a)',
]


def write_mmvp(folder: Path, rows: list[str]) -> Path:
    """Questions.csv and a picture for every row."""
    (folder / "MMVP Images").mkdir(parents=True)
    for i, _ in enumerate(rows, 1):
        picture(i).save(folder / "MMVP Images" / f"{i}.jpg")
    (folder / "Questions.csv").write_text("\n".join([MMVP_HEADER, *rows]) + "\n")
    return folder


def picture(number: int) -> Image.Image:
    """40 x 30, of a colour that depends on the number."""
    return Image.new("RGB", (40, 30), (60 * number % 256, 10, 10))


def png(number: int) -> bytes:
    """`picture` as file."""
    file = io.BytesIO()
    picture(number).save(file, "PNG")
    return file.getvalue()


def write_pope(folder: Path) -> tuple[Path, Path]:
    """Two questions about one picture: (file, folder of the picture)."""
    folder.mkdir()
    Image.new("RGB", (40, 30), (200, 10, 10)).save(folder / "a.jpg")
    lines = [{"image": "a.jpg", "text": f"Is there a {x}?", "label": y} for x, y in (("cat", "yes"), ("dog", "no"))]
    (folder / "pope.json").write_text("\n".join(map(json.dumps, lines)))
    return folder / "pope.json", folder
