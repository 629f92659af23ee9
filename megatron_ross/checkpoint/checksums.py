"""SHA-256 of a checkpoint's files: written into the manifest, compared when a checkpoint is verified."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from megatron_ross.checkpoint.manifest import MANIFEST_NAME

_DATA_SUFFIX = ".distcp"


def sha256_of(path: Path) -> str:
    """Hexadecimal digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def own_data_files(directory: Path, rank: int) -> list[Path]:
    """What this rank's writer left in `directory`; torch names the files after the rank."""
    return sorted(directory.glob(f"__{rank}_*{_DATA_SUFFIX}"))


def other_files(directory: Path) -> list[Path]:
    """Index, common state and assets: everything that is not one rank's data, or the manifest itself."""
    return sorted(
        path
        for path in directory.rglob("*")
        if path.is_file() and path.suffix != _DATA_SUFFIX and path.name != MANIFEST_NAME
    )


def checksums(directory: Path, paths: Iterable[Path]) -> dict[str, str]:
    """Name relative to `directory` -> SHA-256."""
    return {path.relative_to(directory).as_posix(): sha256_of(path) for path in paths}


def verify_files(directory: Path, expected: dict[str, str], rank: int = 0, world_size: int = 1) -> None:
    """Compare this rank's share of the files with the manifest's checksums.

    Raises:
        ValueError: a file is missing or has other bytes, or the manifest has no checksums.
    """
    if not expected:
        raise ValueError(
            f"{directory / MANIFEST_NAME} has no checksums: it was written before they were; do not verify"
        )
    for name in sorted(expected)[rank::world_size]:
        path = directory / name
        if not path.is_file():
            raise ValueError(f"{path} is missing: the checkpoint is incomplete")
        if sha256_of(path) != expected[name]:
            raise ValueError(f"{path} is damaged: its SHA-256 is not the manifest's")
