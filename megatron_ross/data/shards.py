"""WebDataset tar shards with random access.

The conventions are the `webdataset` library's: consecutive files whose names agree up to the first dot of the base name
make one sample; the rest of the name says what a file is. Here `json` is the LLaVA record, or `txt` a caption (the
record is then made up), and `jpg`, `jpeg`, `png`, `webp`, ... are its images; `0.jpg`, `1.jpg`, ... are several.
A shard's headers are read once; the cached index says where every file lies. Nothing is ever extracted.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import tarfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import fsspec
import numpy as np

from megatron_ross.config.paths import is_url
from megatron_ross.data.errors import ImageError, RecordError
from megatron_ross.data.header_reader import HeaderReader
from megatron_ross.data.index import default_cache_folder, locked, write_atomically
from megatron_ross.data.records import MAX_IMAGE_BYTES

_NAME = re.compile(r"^((?:.*/|)[^./]+)\.([^/]*)$")
_MOST_DIGITS = 18
IMAGE_TYPES = {"jpg", "jpeg", "png", "webp", "gif", "bmp", "ppm", "img"}


class ShardFile:
    """A `sources.Source` over one tar file."""

    def __init__(self, path: str | os.PathLike[str], cache_folder: Path | None = None):
        """
        Raises:
            ValueError: the file is missing, no tar file, or holds no sample.
        """
        self.path = os.fspath(path)
        try:
            self._file_system, self._real = fsspec.core.url_to_fs(self.path)
            info = self._file_system.info(self._real)
            stamp = f"{self.path} {info['size']} {info.get('mtime', info.get('LastModified', ''))}"
            self.fingerprint = hashlib.blake2b(stamp.encode(), digest_size=12).hexdigest()
            self._index = self._load_or_build((cache_folder or default_cache_folder()) / "shards")
        except (OSError, ImportError, ValueError, tarfile.TarError) as error:
            raise ValueError(f"cannot read the shard {self.path}: {error}") from error
        if not len(self):
            raise ValueError(f"the shard {self.path} holds no sample with a .json or .txt file")
        self._files = threading.local()

    def __len__(self) -> int:
        return int(self._index[0, 0])

    def __getitem__(self, index: int) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(index)
        begin, size, is_text, _ = self._record_rows[index]
        data = self._read(int(begin), int(size))
        images = [f"{number}.img" for number in range(len(self._image_rows(index)))]
        try:
            record = {"conversations": caption_turns(data.decode())} if is_text else json.loads(data)
        except (ValueError, RecursionError) as error:
            raise RecordError(f"{self.path}[{index}]: not valid JSON or UTF-8 ({error})") from error
        return record | {"image": images} if isinstance(record, dict) and images else record

    def read_image(self, index: int, number: int, name: str) -> bytes:
        """Raises ImageError."""
        try:
            begin, size = self._image_rows(index)[number]
            if size > MAX_IMAGE_BYTES:
                raise OSError(f"it has {size:,} bytes, more than {MAX_IMAGE_BYTES:,}")
            return self._read(int(begin), int(size))
        except OSError as error:
            raise ImageError(f"image {number} of {self.path}[{index}] cannot be read: {error}") from error

    def image_stamp(self, index: int, number: int, name: str) -> str:
        """That of the whole shard."""
        return self.fingerprint

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "_files"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self._files = threading.local()

    @property
    def _record_rows(self) -> np.ndarray:
        return self._index[1 : 1 + len(self)]

    def _image_rows(self, index: int) -> np.ndarray:
        """int64 [images, 2]: first byte and size."""
        first = int(self._record_rows[index, 3])
        last = int(self._record_rows[index + 1, 3]) if index + 1 < len(self) else int(self._index[0, 1])
        begin = 1 + len(self)
        return self._index[begin + first : begin + last, :2]

    def _read(self, begin: int, size: int) -> bytes:
        if is_url(self.path):
            return self._file_system.cat_file(self._real, start=begin, end=begin + size)
        if not hasattr(self._files, "file"):  # one handle per thread: seeking is not shared
            self._files.file = open(self._real, "rb")  # noqa: SIM115 - closed with its thread
        self._files.file.seek(begin)
        return self._files.file.read(size)

    def _load_or_build(self, cache: Path) -> np.ndarray:
        """int64 [1 + records + images, 4].

        Row 0: number of records and images. Then per record: first byte, size, 1 if it is a caption, its first image.
        Then per image: first byte, size.
        """
        path = cache / f"{self.fingerprint}.npy"
        with locked(path.with_suffix(".lock")):
            if not path.exists():
                with self._file_system.open(self._real, "rb") as file:
                    write_atomically(path, _build(HeaderReader(file, self._file_system.size(self._real))))
        return np.load(path, mmap_mode="r")


def caption_turns(text: str) -> list[dict[str, str]]:
    """A caption as a conversation of one question and one answer."""
    return [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": text.strip()}]


def _build(file: HeaderReader) -> np.ndarray:
    records: list[tuple[int, int, int, int]] = []
    images: list[tuple[int, int, int, int]] = []
    for members in _samples(file):
        text = next((t for t in ("json", "txt") if t in members), None)
        if text is None:
            continue
        records.append((*members[text], int(text == "txt"), len(images)))
        images += [(*members[t], 0, 0) for t in sorted(members, key=_image_number) if t.split(".")[-1] in IMAGE_TYPES]
    return np.array([(len(records), len(images), 0, 0), *records, *images], dtype=np.int64)


def _image_number(kind: str) -> tuple[int, str]:
    """Sorts "2.jpg" before "10.jpg"."""
    number = kind.split(".")[0]
    return (int(number) if number.isdecimal() and len(number) <= _MOST_DIGITS else 0, kind)


def _samples(file: HeaderReader) -> Iterator[dict[str, tuple[int, int]]]:
    """Per sample: kind of file (lower case) -> (first byte, size). Links, devices and sparse files are no samples."""
    current: dict[str, tuple[int, int]] = {}
    previous = None
    with tarfile.open(fileobj=file, mode="r:") as tar:  # type: ignore[call-overload]
        for member in tar:
            match = _NAME.match(member.name)
            file.check(member)
            if not member.isreg() or member.issparse() or match is None:
                continue
            key, kind = match.groups()
            if key != previous and current:
                yield current
                current = {}
            previous = key
            current[kind.lower()] = (member.offset_data, member.size)
    if current:
        yield current


def write_sample(tar: tarfile.TarFile, key: str, record: dict[str, Any], images: Sequence[tuple[str, bytes]]) -> None:
    """Append one sample. `images`: (file name suffix such as "jpg", bytes) in order."""
    several = len(images) > 1
    for number, (suffix, data) in enumerate(images):
        _add(tar, f"{key}.{number}.{suffix}" if several else f"{key}.{suffix}", data)
    _add(tar, f"{key}.json", json.dumps(record, ensure_ascii=False).encode())


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))
