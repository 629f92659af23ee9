"""Where records and image files come from: JSON beside an image folder, parquet files, or WebDataset tar shards.

A source gives raw records and the bytes of their images by index; `dataset.RossDataset` does the rest.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from megatron_ross.config.paths import expand_braces, is_url
from megatron_ross.data.errors import ImageError
from megatron_ross.data.formats import DATA_SCHEME, FORMATS_VERSION, embedded_image
from megatron_ross.data.index import RecordFile
from megatron_ross.data.records import MAX_IMAGE_BYTES, ImageRoot, sampled_images_digest
from megatron_ross.data.row_groups import RowGroups
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

    def content_digest(self) -> str:
        """The same for copies of the same content, whatever their path and time; docs/data.md says what it covers.

        Raises:
            OSError: the content cannot be read.
        """


class LlavaSource:
    """A JSON / JSONL file and the folder its image names start from (None: no record has an image)."""

    def __init__(self, path: PathLike, image_root: ImageRoot | None, cache_folder: Path | None):
        self._records = RecordFile(path, cache_folder)
        self._image_root = image_root
        self.path = self._records.path
        self.fingerprint = f"{self._records.fingerprint} {FORMATS_VERSION}"

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Any:
        return self._records[index]

    def read_image(self, index: int, number: int, name: str) -> bytes:
        if name.startswith(DATA_SCHEME):
            return embedded_image(self[index], number, MAX_IMAGE_BYTES)
        if self._image_root is None:
            raise ImageError(f"image {name!r} cannot be read: image_folder is not set")
        return self._image_root.read(name)

    def image_stamp(self, index: int, number: int, name: str) -> str:
        if name.startswith(DATA_SCHEME):
            return self.fingerprint
        return self._image_root.stamp(name) if self._image_root is not None else ""

    def content_digest(self) -> str:
        """Of all bytes of the file, and of the first image of some records in a local folder."""
        digest = hashlib.blake2b(self._records.content_digest().encode(), digest_size=16)
        if self._image_root is not None and not is_url(self._image_root.folder):
            digest.update(sampled_images_digest(self).encode())
        return digest.hexdigest()


def open_sources(
    paths: PathLike | Sequence[PathLike],
    image_root: PathLike | None,
    cache_folder: Path | None,
    allow_image_symlinks: bool = False,
) -> list[Source]:
    """One source per file. Names may hold braces: "shards/{000000..000099}.tar".

    `allow_image_symlinks`: see `ImageRoot`.

    Raises:
        ValueError: no path, or a file or the image folder is missing or unreadable.
    """
    given = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
    names = [name for path in given for name in expand_braces(os.fspath(path))]
    if not names:
        raise ValueError("data_path is empty; name at least one JSON, JSONL, parquet or tar file")
    root = ImageRoot(image_root, allow_image_symlinks) if image_root is not None else None
    row_groups = RowGroups()
    return [_open_source(name, root, cache_folder, row_groups) for name in names]


def _open_source(name: str, root: ImageRoot | None, cache_folder: Path | None, row_groups: RowGroups) -> Source:
    if name.endswith(".tar"):
        return ShardFile(name, cache_folder)
    if name.endswith(".parquet"):
        from megatron_ross.data.parquet import ParquetFile  # imports pyarrow, which only they need

        return ParquetFile(name, root, cache_folder, row_groups)
    return LlavaSource(name, root, cache_folder)
