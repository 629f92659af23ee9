"""Turns of a conversation and where the image placeholders stand in their text.

Training puts every image in front of its turn's text, on a line of its own. The two frameworks of the published
evaluation each have another rule, which only matters with several images in a turn or with blanks around the text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from PIL import Image

from megatron_ross.data.tokenizer import IMAGE_PLACEHOLDER

ImageMarkers = Literal["training", "joined", "in_order"]
Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True)
class Turn:
    """What one side says: texts and pictures in their order."""

    role: Role
    parts: tuple[str | Image.Image, ...]

    @property
    def images(self) -> list[Image.Image]:
        """Its pictures."""
        return [part for part in self.parts if isinstance(part, Image.Image)]


def user_turn(text: str, images: Sequence[Image.Image] = ()) -> Turn:
    """A question, its pictures first."""
    return Turn("user", (*images, text))


def turn_text(turn: Turn, markers: ImageMarkers = "training") -> str:
    """Text of a turn with one `<image>` for each of its pictures.

    Args:
        markers: "training": in front, each on its own line, the text without placeholders and outer blanks;
            "joined": in front, on one line, unless the text has placeholders (published lmms-eval);
            "in_order": where the picture stands among the texts, each on its own line (published VLMEvalKit).

    Raises:
        ValueError: the text has placeholders of its own, and not one for every picture.
    """
    count, spoken = len(turn.images), "".join(part for part in turn.parts if isinstance(part, str))
    if not count:
        return spoken.replace(IMAGE_PLACEHOLDER, "")
    if markers == "training":
        text = (IMAGE_PLACEHOLDER + "\n") * count + spoken.replace(IMAGE_PLACEHOLDER, "").strip()
        return text.strip()
    if markers == "in_order":
        text = "".join(part if isinstance(part, str) else IMAGE_PLACEHOLDER + "\n" for part in turn.parts)
    else:
        marked = IMAGE_PLACEHOLDER in spoken
        text = spoken if marked else " ".join([IMAGE_PLACEHOLDER] * count) + "\n" + spoken
    if text.count(IMAGE_PLACEHOLDER) != count:
        raise ValueError(
            f"a question has {text.count(IMAGE_PLACEHOLDER)} {IMAGE_PLACEHOLDER} placeholders for {count} images; "
            "image markers 'training' ignore placeholders of the data"
        )
    return text
