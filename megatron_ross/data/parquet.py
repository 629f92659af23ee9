"""Records in parquet files, as most data sets of the hub are, with random access.

Parquet is read by columns and by groups of rows, so a single text in the middle costs as much as its whole group.
The texts are therefore written once, as a line of JSON per row, into the cache folder: reading a record is a look into
a memory-mapped file, whatever the size of the groups, and no image is touched. An image costs its column of its group
of rows; the last groups are kept, so that reading in order decodes each once.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from megatron_ross.config.paths import is_url
from megatron_ross.config.shown import shown
from megatron_ross.data.errors import ImageError
from megatron_ross.data.formats import (
    DATA_SCHEME,
    FORMATS_VERSION,
    IMAGE_FIELDS,
    TURN_LISTS,
    embedded_image,
    is_media_field,
)
from megatron_ross.data.index import MappedRecords, OpenedFile, default_cache_folder, locked, write_atomically
from megatron_ross.data.records import MAX_IMAGE_BYTES, ImageRoot, sampled_images_digest
from megatron_ross.data.row_groups import RowGroups

MAX_GROUP_BYTES = 1 << 30
"""Images of a larger group of rows are refused: each of them would cost so much."""

_MAX_ROWS_PER_BYTE = 100
"""Records of a sentence take bytes, however well they are packed; rows of nothing do not, and may be billions."""

_BATCH_ROWS = 1024
_END_BYTES = 4096
_TEXT_COLUMNS = ("id", *TURN_LISTS, "system", "tools")


class ParquetFile:
    """A `sources.Source` over one parquet file.

    Its columns are the fields of a record (`formats`); images are names, bytes, {"bytes", "path"}, or lists of those.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        image_root: ImageRoot | None = None,
        cache_folder: Path | None = None,
        row_groups: RowGroups | None = None,
    ):
        """
        Args:
            image_root: where names without bytes start.
            row_groups: shared by the files of a data set.

        Raises:
            ValueError: the file is missing, no parquet file, has no column of turns or of images, or too large groups.
        """
        self.path = os.fspath(path)
        self._image_root = image_root
        self._row_groups = row_groups or RowGroups()
        try:
            opened = OpenedFile.of(self.path, FORMATS_VERSION)
            self._file_system, self._real = opened.file_system, opened.real
            self.fingerprint, self._state = opened.fingerprint, opened.state
            texts, index = self._load_or_build((cache_folder or default_cache_folder()) / "parquet")
        except (OSError, ImportError, ValueError, pa.ArrowException) as error:
            raise ValueError(f"cannot read the parquet file {self.path}: {_line(error)}") from error
        num_groups = int(index[0, 0])
        self._holds_images = bool(index[0, 1])
        self._digest = index[1].tobytes().hex()
        self._group_starts = index[2 : 2 + num_groups, 0]
        self._records = MappedRecords(texts, index[2 + num_groups :])
        if not len(self._records):
            raise ValueError(f"the parquet file {self.path} holds no row")

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Any:
        return self._records[index]

    def image_stamp(self, index: int, number: int, name: str) -> str:
        """That of the whole file, and of the image's own, which may lie in the image folder."""
        return self._state + (self._image_root.stamp(name) if self._image_root is not None else "")

    def content_digest(self) -> str:
        """Of all texts, of the file's table of contents, and of the first and last bytes of every group's images; where
        it has names alone, of the first image of some records in a local folder."""
        if self._holds_images or self._image_root is None or is_url(self._image_root.folder):
            return self._digest
        return f"{self._digest} {sampled_images_digest(self)}"

    def read_image(self, index: int, number: int, name: str) -> bytes:
        """Raises ImageError."""
        raw = self[index]
        column = next((key for key in IMAGE_FIELDS if raw.get(key)), None)
        try:
            value = self._value(index, number, column) if column else name
        except (OSError, ValueError, IndexError, pa.ArrowException) as error:
            raise ImageError(f"image {number} of {self.path}[{index}] cannot be read: {_line(error)}") from error
        data = value.get("bytes") if isinstance(value, dict) else value
        if isinstance(data, bytes):
            if len(data) > MAX_IMAGE_BYTES:
                raise ImageError(f"image {number} of {self.path}[{index}] has more than {MAX_IMAGE_BYTES:,} bytes")
            return data
        if name.startswith(DATA_SCHEME):
            return embedded_image(raw, number, MAX_IMAGE_BYTES)
        if isinstance(value, dict) and not value.get("path"):
            raise ImageError(f"image {number} of {self.path}[{index}] has neither bytes nor a path")
        if self._image_root is None:
            raise ImageError(f"image {name!r} of {self.path}[{index}] has no bytes, and image_folder is not set")
        return self._image_root.read(name)

    def _value(self, index: int, number: int, column: str) -> Any:
        """What a row's column says about its image `number`: bytes, a name, or {"bytes", "path"}."""
        group = int(np.searchsorted(self._group_starts, index, side="right")) - 1
        key = (self.path, group, column)
        values = self._row_groups.get(key)
        if values is None:
            with self._reader() as reader:
                values = reader.read_row_group(group, columns=[column], use_threads=False).column(0)
            self._row_groups.put(key, values)
        value = values[index - int(self._group_starts[group])]
        return (value.values[number] if isinstance(value, pa.ListScalar) else value).as_py()

    @contextlib.contextmanager
    def _reader(self) -> Iterator[parquet.ParquetFile]:
        if not is_url(self.path):  # pyarrow reads local files without Python's lock
            with parquet.ParquetFile(self._real, page_checksum_verification=True) as reader:
                yield reader
            return
        with self._file_system.open(self._real, "rb") as file:
            yield parquet.ParquetFile(file, page_checksum_verification=True)

    def _load_or_build(self, cache: Path) -> tuple[Path, np.ndarray]:
        """The file of texts, and int64 [2 + groups + rows, 2].

        Row 0: number of groups, and of columns with the bytes of images. Row 1: digest of the content. Then per
        group: its first row. Then per row of the parquet file: first and one past the last byte of its line of text.
        """
        texts = cache / f"{self._state}.jsonl"
        index = texts.with_suffix(".npy")
        with locked(texts.with_suffix(".lock")):
            if not (index.exists() and texts.exists()):
                temporary = texts.with_suffix(".tmp")
                with self._file_system.open(self._real, "rb") as file:
                    rows = _build(file, self._file_system.size(self._real), temporary)
                os.replace(temporary, texts)
                write_atomically(index, rows)
        return texts, np.load(index, mmap_mode="r")


def _build(file: BinaryIO, size: int, texts: Path) -> np.ndarray:
    """Write the texts; returns the index. Raises ValueError, OSError, ArrowException."""
    reader = parquet.ParquetFile(file, page_checksum_verification=True)
    metadata = reader.metadata
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    if metadata.num_rows > _MAX_ROWS_PER_BYTE * size:
        raise ValueError(f"it says that it has {metadata.num_rows:,} rows, in {size:,} bytes; refused")
    leaves = _leaves(reader, groups)
    digest = hashlib.blake2b(digest_size=16)
    ends = [0]
    with texts.open("wb") as sink:
        for batch in reader.iter_batches(_BATCH_ROWS, columns=leaves.texts, use_threads=False):
            for row in batch.to_pylist():
                line = json.dumps(_plain(row, leaves.full), ensure_ascii=False, default=_unreadable).encode() + b"\n"
                digest.update(line)
                sink.write(line)
                ends.append(ends[-1] + len(line))
    file.seek(size - 8)
    contents = int.from_bytes(file.read(4), "little")
    for place, length in [*_ends(groups, leaves.images), (max(0, size - 8 - contents), contents)]:
        file.seek(place)
        digest.update(file.read(length))
    starts = np.cumsum([0, *(group.num_rows for group in groups)])
    if starts[-1] != len(ends) - 1:
        raise ValueError(f"it says that it has {starts[-1]:,} rows, and has {len(ends) - 1:,}")
    head = [(len(groups), len(leaves.images)), tuple(np.frombuffer(digest.digest(), dtype=np.int64))]
    ranges = np.stack([ends[:-1], ends[1:]], axis=1).reshape(-1, 2)
    return np.concatenate([np.array(head), np.stack([starts[:-1]] * 2, axis=1), ranges]).astype(np.int64)


class _Leaves:
    """Columns by their paths: those to read for the texts, and those with the bytes of images, which are not read.

    Attributes:
        full: columns of bytes without a null: an image in every row.
    """

    def __init__(self, texts: list[str], images: list[int], full: list[str]):
        self.texts, self.images, self.full = texts, images, full


def _leaves(reader: parquet.ParquetFile, groups: list[Any]) -> _Leaves:
    schema = reader.schema
    columns = [schema.column(i) for i in range(len(schema))]
    tops = {column.path.split(".")[0] for column in columns}
    known = {top for top in tops if top in _TEXT_COLUMNS or is_media_field(top)}
    if not known & {*TURN_LISTS, *IMAGE_FIELDS}:
        raise ValueError(f"no column 'conversations', 'messages' or 'images'; it has {shown(sorted(tops))}")
    binary = {i for i, c in enumerate(columns) if _is_media_bytes(c) and c.path.split(".")[0] in known}
    for number, group in enumerate(groups):
        found = sum(group.column(i).total_uncompressed_size for i in binary)
        if found > MAX_GROUP_BYTES:
            raise ValueError(
                f"row group {number} has {found:,} bytes of images, more than {MAX_GROUP_BYTES:,}: every image would "
                "cost so much; write it with smaller groups (row_group_size=100)"
            )
    texts = [c.path for i, c in enumerate(columns) if i not in binary and c.path.split(".")[0] in known]
    told = {path.split(".")[0] for path in texts}
    full = []
    for i in sorted(binary):
        path = columns[i].path
        if path.split(".")[0] in told:
            continue  # its neighbour, the path, says where there is an image
        if "." not in path and all(_num_nulls(group.column(i)) == 0 for group in groups):
            full.append(path)
        else:
            texts.append(path)
    return _Leaves(texts, sorted(binary), full)


def _is_media_bytes(column: Any) -> bool:
    is_bytes = column.physical_type == "BYTE_ARRAY" and column.logical_type.type == "NONE"
    return is_bytes and column.converted_type == "NONE" and is_media_field(column.path.split(".")[0])


def _num_nulls(chunk: Any) -> int | None:
    statistics = chunk.statistics
    return statistics.null_count if statistics is not None and statistics.has_null_count else None


def _ends(groups: list[Any], leaves: list[int]) -> Iterator[tuple[int, int]]:
    """(place, length) of the ends of the images' columns, which stand for the images in the digest."""
    for group in groups:
        for leaf in leaves:
            chunk = group.column(leaf)
            begin, length = chunk.data_page_offset, chunk.total_compressed_size
            yield begin, min(length, _END_BYTES)
            yield begin + max(0, length - _END_BYTES), min(length, _END_BYTES)


def _plain(row: dict[str, Any], full: list[str]) -> dict[str, Any]:
    """A row without the bytes of images; an image is the name that it has, or its place."""
    row |= dict.fromkeys(full, b"")
    for key in filter(is_media_field, list(row)):
        value = row[key]
        if isinstance(value, list):
            row[key] = [_name(item, f"{key}[{i}]") for i, item in enumerate(value)]
        elif value is not None:
            row[key] = _name(value, key)
    return {key: value for key, value in row.items() if value is not None}


def _name(value: Any, place: str) -> Any:
    if isinstance(value, dict):
        return value.get("path") or place
    return place if isinstance(value, bytes) else value


def _unreadable(value: Any) -> dict[str, str]:
    """Stands for what JSON cannot say; no field takes it, so the record is refused if the field matters."""
    return {"type": type(value).__name__, "value": "no text"}


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
