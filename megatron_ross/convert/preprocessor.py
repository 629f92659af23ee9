"""preprocessor_config.json of a vision tower: what it asks of the image pipeline beside mean and standard deviation.

The pipeline resizes uint8 images, stretched to the tower's square or cropped to it, and normalises value / 255. A
processor that wants anything else is refused here: the tower would see other pictures than those it learned from.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_ross.config.json_files import read_json
from megatron_ross.config.model import VisionConfig
from megatron_ross.config.shown import shown
from megatron_ross.convert.checked_fields import Fields

PILLOW_FILTERS = {"lanczos": 1, "bilinear": 2, "bicubic": 3}
"""Filter -> Pillow's number, which the files hold."""


def stored_preprocessor(directory: Path) -> tuple[dict[str, Any], str] | None:
    """Image processor config of a folder and the file it is from; None if the folder has none.

    It is preprocessor_config.json, or nested in processor_config.json (transformers 5).
    """
    path = directory / "preprocessor_config.json"
    if path.is_file():
        return read_json(path), str(path)
    path = directory / "processor_config.json"
    nested = read_json(path).get("image_processor") if path.is_file() else None
    return (nested, str(path)) if isinstance(nested, dict) else None


def preprocessed(vision: VisionConfig, preprocessor: dict[str, Any], where: str) -> VisionConfig:
    """The tower with the filter and the crop of its image processor.

    Raises:
        ValueError: the processor does something that the image pipeline does not.
    """
    fields = Fields(preprocessor, where)
    for step in ("do_resize", "do_rescale", "do_normalize"):
        fields.choice(step, (True,), True)
    if not math.isclose(fields.number("rescale_factor", 0, 1, 1 / 255), 1 / 255, rel_tol=1e-6):
        raise ValueError(f"{where}: rescale_factor is {shown(preprocessor['rescale_factor'])}, it must be 1/255")
    number = fields.choice("resample", tuple(PILLOW_FILTERS.values()), PILLOW_FILTERS["bicubic"])
    resample = next(name for name, known in PILLOW_FILTERS.items() if known == number)
    return with_processing(vision, resample, _crops(fields, vision))


def with_processing(vision: VisionConfig, resample: str, crops: bool) -> VisionConfig:
    """The tower with another filter and crop, written as manifests hold them."""
    plain = replace(vision, resample=resample, do_center_crop=None)
    return plain if plain.crops == crops else replace(plain, do_center_crop=crops)


def _crops(fields: Fields, vision: VisionConfig) -> bool:
    """True for shorter side and centre crop, False for stretching; both must give the tower's own size."""
    kind = fields.values.get("image_processor_type") or fields.values.get("feature_extractor_type") or ""
    is_siglip = "siglip" in str(kind).lower() or (not kind and vision.model_type == "siglip_vision_model")
    crops = centre = fields.boolean("do_center_crop", not is_siglip)
    if fields.has("size"):
        size = fields.values["size"]
        if not isinstance(size, dict):  # old files: CLIP means the shorter side, SigLIP both
            size = {"height": size, "width": size} if is_siglip else {"shortest_edge": size}
        sides = {name: value for name, value in size.items() if value is not None}
        _check_side(fields, "size", sides, vision.image_size, ("shortest_edge",) if crops else ())
        crops = crops and "shortest_edge" in sides
    if centre and fields.has("crop_size"):
        size = fields.values["crop_size"]
        sides = size if isinstance(size, dict) else {"height": size, "width": size}
        _check_side(fields, "crop_size", sides, vision.image_size)
    return crops


def _check_side(
    fields: Fields, name: str, sides: dict[str, Any], image_size: int, other_names: tuple[str, ...] = ()
) -> None:
    named = tuple(sorted(sides))
    if named not in (("height", "width"), other_names) or any(side != image_size for side in sides.values()):
        raise ValueError(
            f"{fields.where}: {name} is {shown(fields.values[name])}, but the tower takes {image_size} x {image_size}: "
            "other sizes are not implemented; correct the file, or give the preprocessor_config.json of this tower"
        )
