"""`manifest.json`: what a checkpoint holds, where it came from, and where the rest of it is.

Layout on disk (`docs/checkpoints.md`): ROOT/latest_checkpointed_iteration.txt names the newest ROOT/iter_0000000/,
which holds Megatron's torch_dist files, `manifest.json` and `assets/`. Only the standard library and package metadata
are used here, so tools can look at a checkpoint without loading torch.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_ross.compat import versions
from megatron_ross.config.json_files import read_json
from megatron_ross.config.model import RossModelConfig
from megatron_ross.config.model_limits import check_model
from megatron_ross.config.shown import shown
from megatron_ross.text_files import replace_text

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
ASSETS_NAME = "assets"
CHECKPOINTS_NAME = "checkpoints"
"""Folder of the checkpoints in a run folder."""
LATEST_NAME = "latest_checkpointed_iteration.txt"
_CHECKSUM_FIELD = "sha256"
"""Of the manifest itself; the other files' checksums are in `files`."""
_ITERATION_NAME = re.compile(r"iter_(\d{7,})")
_MAX_ITERATION = 10**12
_MAX_LATEST_CHARACTERS = 100
_RECORDED_PACKAGES = ("megatron-ross", "megatron-core", "torch")


@dataclass(frozen=True)
class Source:
    """One input of a conversion: `part` it gave, its hub id or folder name, and the SHA-256 of its files by name."""

    part: str
    name: str
    files: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Manifest:
    """Contents of `manifest.json`.

    `dtypes` maps a part (language, vision, projector, denoiser, vae) to its torch dtype without "torch.". `training` is
    the trainer's free-form record (steps, losses, sample digest, recipe). `base` is set when this checkpoint holds only
    some tensors: the checkpoint with the others, absolute or relative to the iteration folder. `files` has the SHA-256
    of every other file, by name.
    """

    iteration: int
    model: RossModelConfig
    sources: tuple[Source, ...] = ()
    dtypes: dict[str, str] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    base: str | None = None
    files: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=lambda: library_versions())
    format_version: int = FORMAT_VERSION

    def write(self, iteration_dir: Path) -> None:
        """Write `iteration_dir/manifest.json` atomically, with a checksum of its own."""
        fields = self._fields()
        fields[_CHECKSUM_FIELD] = _checksum(fields)
        replace_text(Path(iteration_dir) / MANIFEST_NAME, json.dumps(fields, indent=1) + "\n")

    @property
    def digest(self) -> str:
        """Of everything in it, with the other files' checksums: equal for equal checkpoints alone."""
        return _checksum(self._fields())

    def _fields(self) -> dict[str, Any]:
        """As `read` finds them: no tuples, all keys text."""
        fields: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        return fields

    @classmethod
    def read(cls, iteration_dir: Path) -> Manifest:
        """Read `iteration_dir/manifest.json`.

        Raises:
            ValueError: the file is missing, damaged, no manifest, of a newer format, or describes an impossible model.
        """
        path = Path(iteration_dir) / MANIFEST_NAME
        if not path.is_file():
            raise ValueError(f"{path} is missing: not a Megatron-Ross checkpoint, or an incomplete one")
        fields = read_json(path)
        try:
            if fields["format_version"] > FORMAT_VERSION:
                raise ValueError(
                    f"has format_version {shown(fields['format_version'])}, this version reads up to {FORMAT_VERSION}: "
                    "update megatron_ross"
                )
            _check_checksum(fields)
            fields["model"] = RossModelConfig.from_dict(fields["model"])
            fields["sources"] = tuple(Source(**source) for source in fields["sources"])
            manifest = cls(**fields)
            _check_types(manifest)
            check_model(manifest.model)
        except (KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{path} is not a Megatron-Ross manifest: {type(error).__name__} {error}") from None
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        return manifest


def _checksum(fields: dict[str, Any]) -> str:
    """SHA-256 of the fields in one spelling, whatever the file's line breaks."""
    return hashlib.sha256(json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _check_checksum(fields: dict[str, Any]) -> None:
    """Take the manifest's own checksum out of `fields`. Raises ValueError if it is that of other fields.

    A manifest from before there were such checksums has none; a damaged name of the field is an unknown field.
    """
    expected = fields.pop(_CHECKSUM_FIELD, None)
    if expected is not None and expected != _checksum(fields):
        raise ValueError(f"is damaged: its {_CHECKSUM_FIELD} is not that of its other fields")


def _check_types(manifest: Manifest) -> None:
    """Types of everything but the model. Raises ValueError."""
    rules: dict[str, tuple[bool, str]] = {
        "iteration": (_is_whole(manifest.iteration), "a whole number"),
        "format_version": (_is_whole(manifest.format_version), "a whole number"),
        "base": (manifest.base is None or _is_path(manifest.base), "a path or null"),
        "dtypes": (_is_text_table(manifest.dtypes), "an object of texts"),
        "files": (_is_text_table(manifest.files) and all(map(_is_inside, manifest.files)), "an object of file names"),
        "versions": (_is_text_table(manifest.versions), "an object of texts"),
        "training": (isinstance(manifest.training, dict), "an object"),
        "sources": (all(map(_is_source, manifest.sources)), "a list of part, name and files"),
    }
    for name, (holds, rule) in rules.items():
        if not holds:
            raise ValueError(f"{name} is {shown(getattr(manifest, name))}, it must be {rule}")


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _MAX_ITERATION


def _is_path(value: Any) -> bool:
    return isinstance(value, str) and bool(value) and "\0" not in value


def _is_inside(name: str) -> bool:
    return _is_path(name) and not name.startswith("/") and ".." not in name.split("/")


def _is_text_table(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(text, str) for text in value.values())


def _is_source(source: Source) -> bool:
    return isinstance(source.part, str) and isinstance(source.name, str) and _is_text_table(source.files)


def library_versions() -> dict[str, str]:
    """Versions of the packages that determine a checkpoint's format; packages that are not installed are left out."""
    return versions(_RECORDED_PACKAGES)


def iteration_dir(root: Path, iteration: int) -> Path:
    """ROOT/iter_0000000, Megatron's name for the folder of one iteration."""
    return Path(root) / f"iter_{iteration:07d}"


def iteration_of(directory: Path) -> int | None:
    """Which iteration's folder this is by its name, the inverse of `iteration_dir`; None: it is no such folder."""
    match = _ITERATION_NAME.fullmatch(directory.name)
    return int(match[1]) if match else None


def write_latest(root: Path, iteration: int) -> None:
    """Mark `iteration` as the newest complete one. Call it last: until then, readers see the previous one."""
    replace_text(Path(root) / LATEST_NAME, f"{iteration}\n")


def resolve_checkpoint(path: str | os.PathLike[str]) -> Path:
    """Folder of one iteration, given that folder or the root above it (then the newest complete iteration).

    Raises:
        ValueError: there is no complete checkpoint at `path`.
    """
    path = Path(path)
    if (path / MANIFEST_NAME).is_file():
        return path
    latest = path / LATEST_NAME
    if not latest.is_file():
        raise ValueError(f"{path} is not a checkpoint: it has neither {MANIFEST_NAME} nor {LATEST_NAME}")
    with latest.open(encoding="utf-8", errors="replace") as file:
        text = file.read(_MAX_LATEST_CHARACTERS).strip()
    if not re.fullmatch(r"[0-9]{1,12}", text):
        raise ValueError(f"{latest} should hold an iteration number, found {shown(text, 42)}")
    directory = iteration_dir(path, int(text))
    if not (directory / MANIFEST_NAME).is_file():
        raise ValueError(f"{latest} names iteration {int(text)}, but {directory / MANIFEST_NAME} does not exist")
    return directory
