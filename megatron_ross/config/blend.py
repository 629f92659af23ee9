"""Where training data comes from: one source, or a blend of several with a weight or a number of epochs each.

    blend:
      - {data_path: llava.json, image_folder: images, epochs: 2}
      - {data_path: "shards/{000000..000099}.tar", epochs: 0.5}

With `epochs`, an epoch of the blend passes each source so many times. With `weight`, samples are drawn in proportion to
the weights, and an epoch of the blend is as long as all sources together.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

from megatron_ross.config.schema import DataConfig
from megatron_ross.config.shown import shown


@dataclass(frozen=True)
class DataSource:
    """One source. Exactly one of `weight` and `epochs` is set, the same one in all sources of a blend.

    `prefix` makes a field's name the setting's name: "", "blend[0]." or "valid_".
    """

    prefix: str
    data_path: str
    image_folder: str = ""
    weight: float | None = None
    epochs: float | None = None


MAX_SHARES = {"weight": 1e12, "epochs": 1e6}
_KEYS = tuple(f.name for f in fields(DataSource) if f.name != "prefix")


def data_sources(data: DataConfig) -> list[DataSource]:
    """The sources of a run; one, passed once per epoch, unless `blend` lists several.

    Raises:
        ValueError: no source, or a rule between the settings is broken; one line that says which, and what to do.
    """
    if not data.blend:
        if not data.data_path:
            raise ValueError("data_path='': name the LLaVA-format JSON file to train on, or list sources under blend")
        return [DataSource("", data.data_path, data.image_folder, epochs=1.0)]
    for name in ("data_path", "image_folder"):
        if value := getattr(data, name):
            raise ValueError(
                f"{name}={value!r}: blend is set, too; leave {name} out, each source of a blend has its own"
            )
    sources = [_source(entry, f"blend[{i}].") for i, entry in enumerate(data.blend)]
    _check_shares(sources)
    return sources


def valid_source(data: DataConfig) -> DataSource:
    """What `valid_data_path` names."""
    return DataSource("valid_", data.valid_data_path, data.valid_image_folder)


def _source(entry: dict[str, Any], prefix: str) -> DataSource:
    """A checked entry of `blend`. Raises ValueError."""
    for key, value in entry.items():
        if key not in _KEYS:
            raise ValueError(f"{prefix}{key!s:.80}={shown(value)}: no such key; a source has {', '.join(_KEYS)}")
        if key in ("data_path", "image_folder"):
            if not isinstance(value, str):
                raise ValueError(f"{prefix}{key}={shown(value)}: must be a path")
        elif not _is_share(value):
            raise ValueError(f"{prefix}{key}={shown(value)}: must be a number, and not negative")
        elif value > MAX_SHARES[key]:
            raise ValueError(
                f"{prefix}{key}={shown(value)}: must be at most {MAX_SHARES[key]:g}, because an epoch would have no end"
            )
    if not entry.get("data_path"):
        raise ValueError(
            f"{prefix}data_path={entry.get('data_path', '')!r}: name the source's JSON, JSONL, parquet or tar file"
        )
    given = [key for key in ("weight", "epochs") if key in entry]
    if len(given) != 1:
        found = " and ".join(f"{key}={entry[key]}" for key in given) or "neither weight nor epochs"
        raise ValueError(f"{prefix[:-1]}: has {found}; give it one of the two, weight or epochs")
    return DataSource(prefix, **entry)


def _is_share(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf


def _check_shares(sources: list[DataSource]) -> None:
    """All by weight or all by epochs, and not all zero. Raises ValueError."""
    first = "epochs" if sources[0].weight is None else "weight"
    for source in sources:
        if getattr(source, first) is None:
            other = "weight" if first == "epochs" else "epochs"
            raise ValueError(
                f"{source.prefix}{other}={getattr(source, other)}: {sources[0].prefix[:-1]} has {first}; "
                "give all sources the same of the two"
            )
    if not any(getattr(source, first) for source in sources):
        raise ValueError(f"blend: {first} of every source is 0; give at least one source a positive number")
