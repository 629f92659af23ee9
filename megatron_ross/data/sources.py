"""Where records and image files come from: LLaVA JSON beside an image folder, or WebDataset tar shards.

A source gives raw records and the bytes of their images by index; `dataset.RossDataset` does the rest.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from megatron_ross.config.paths import expand_braces
from megatron_ross.data.errors import ImageError
from megatron_ross.data.index import RecordFile
from megatron_ross.data.records import ImageRoot
from megatron_ross.data.shards import ShardFile

PathLike = str | os.PathLike[str]


class Source(Protocol):
    """Random access to raw records."""

    path: str
    fingerprint: str

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any: ...

    def read_image(self, index: int, number: int, name: str) -> bytes:
        """Bytes of a record's image `number`, which the record calls `name`. Raises ImageError."""

    def image_stamp(self, index: int, number: int, name: str) -> str:
        """Changes whenever the image's file does, and when it is copied; empty if there is none. Reads no image."""


class LlavaSource:
    """A JSON / JSONL file and the folder its image names start from (None: no record has an image)."""

    def __init__(self, path: PathLike, image_root: ImageRoot | None, cache_folder: Path | None):
        self._records = RecordFile(path, cache_folder)
        self._image_root = image_root
        self.path = self._records.path
        self.fingerprint = self._records.fingerprint

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Any:
        return self._records[index]

    def read_image(self, index: int, number: int, name: str) -> bytes:
        if self._image_root is None:
            raise ImageError(f"image {name!r} cannot be read: no image_root is set")
        return self._image_root.read(name)

    def image_stamp(self, index: int, number: int, name: str) -> str:
        return self._image_root.stamp(name) if self._image_root is not None else ""


def open_sources(
    paths: PathLike | Sequence[PathLike],
    image_root: PathLike | None,
    cache_folder: Path | None,
    allow_image_symlinks: bool = False,
) -> list[Source]:
    """One source per file. Tar names may hold braces: "shards/{000000..000099}.tar".

    `allow_image_symlinks`: see `ImageRoot`.

    Raises:
        ValueError: no path, or a file or the image folder is missing or unreadable.
    """
    given = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
    names = [name for path in given for name in expand_braces(os.fspath(path))]
    if not names:
        raise ValueError("json_path is empty; name at least one JSON, JSONL or tar file")
    root = ImageRoot(image_root, allow_image_symlinks) if image_root is not None else None
    return [
        ShardFile(name, cache_folder) if name.endswith(".tar") else LlavaSource(name, root, cache_folder)
        for name in names
    ]
