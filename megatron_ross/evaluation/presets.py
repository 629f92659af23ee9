"""How a model is asked: named settings, one set for each framework.

`default` asks as the model was trained. `published` repeats what the released evaluation code does, so that figures
can be put beside the published ones; `docs/evaluation.md` lists the differences.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from megatron_ross.evaluation.prompts import ImageMarkers

Framework = Literal["builtin", "lmms-eval", "vlmevalkit"]
FRAMEWORKS: tuple[Framework, ...] = ("builtin", "lmms-eval", "vlmevalkit")


@dataclass(frozen=True)
class Preset:
    """Settings of one framework."""

    dtype: str = "auto"
    """Of the weights; see `load_for_inference`."""

    image_markers: ImageMarkers = "training"
    """See `turn_text`."""

    aspect_ratio: Literal["checkpoint", "pad"] = "checkpoint"
    """`pad`: pictures are padded to squares whatever the checkpoint says."""

    templates: dict[str, str] = field(default_factory=dict)
    """Chat templates used in place of those the model was trained with, by name."""

    task_stop_strings: bool = True
    """Whether a task's own stop strings (lmms-eval's `until`) end an answer; the end of turn always does."""

    turn_end_as_text: bool = False
    """Whether the end of turn also counts where it is written out as text."""

    task_answer_blank: bool = False
    """Candidate answers keep the blank a task puts in front of them, behind the template's own."""

    ocr_tokens: bool = False
    """TextVQA: the question is followed by the text that an OCR system read."""

    sample_mmvp: bool = False
    """Built-in MMVP: sample answers as the published script does, instead of the likeliest one."""


PRESETS: dict[str, dict[Framework, Preset]] = {
    "default": {framework: Preset() for framework in FRAMEWORKS},
    "published": {
        "builtin": Preset(dtype="fp16", image_markers="joined", sample_mmvp=True),
        "lmms-eval": Preset(
            dtype="fp16", image_markers="joined", task_stop_strings=False, task_answer_blank=True, ocr_tokens=True
        ),
        "vlmevalkit": Preset(
            dtype="fp16",
            image_markers="in_order",
            aspect_ratio="pad",
            templates={"v1": "llava_v1"},
            turn_end_as_text=True,
        ),
    },
}


def preset(name: str, framework: Framework) -> Preset:
    """The settings of a preset for a framework.

    Raises:
        ValueError: unknown preset or framework.
    """
    if name not in PRESETS:
        raise ValueError(f"preset {name!r} is unknown; use {', '.join(PRESETS)}")
    if framework not in FRAMEWORKS:
        raise ValueError(f"framework {framework!r} is unknown; use {', '.join(FRAMEWORKS)}")
    return PRESETS[name][framework]
