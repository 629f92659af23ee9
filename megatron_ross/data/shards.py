"""WebDataset tar shards with random access.

The conventions are the `webdataset` library's: consecutive files whose names agree up to the first dot of the base name
make one sample; the rest of the name says what a file is. Here `json` is the LLaVA record, or `txt` a caption (the
record is then made up), and `jpg`, `jpeg`, `png`, `webp`, ... are its images; `0.jpg`, `1.jpg`, ... are several.
A shard whose names say anything else about images is refused: a sample in two pieces would be two samples without
pictures. A shard's headers are read once; the cached index says where every file lies. Nothing is ever extracted.
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
from typing import IO, Any

import numpy as np

from megatron_ross.config.paths import is_url
from megatron_ross.config.shown import shown
from megatron_ross.data.errors import ImageError, RecordError
from megatron_ross.data.formats import DATA_SCHEME, FORMATS_VERSION, IMAGE_FIELDS, embedded_image
from megatron_ross.data.header_reader import HeaderReader
from megatron_ross.data.index import OpenedFile, default_cache_folder, locked, write_atomically
from megatron_ross.data.records import MAX_IMAGE_BYTES

_NAME = re.compile(r"^((?:.*/|)[^./]+)\.([^/]*)$")
_MOST_DIGITS = 18
_NUMBERED = re.compile(rf"[0-9]{{1,{_MOST_DIGITS}}}\.([^.]+)")
IMAGE_TYPES = {
    *("jpg", "jpeg", "jpe", "jfif", "png", "webp", "gif", "bmp", "ppm", "pgm", "pbm", "tif", "tiff", "avif"),
    "img",  # of any kind
}
_OTHER_IMAGES = {"heic", "heif", "jp2", "jxl", "svg", "exr", "hdr", "tga", "ico", "psd", "dng"}
_OTHER_MEDIA = {
    *("mp4", "avi", "mov", "mkv", "webm", "m4v", "mpg", "mpeg"),
    *("wav", "mp3", "flac", "ogg", "opus", "m4a", "aac"),
}
_END_BYTES = 512
"""Of an image's beginning and of its end, for the digest; they lie beside headers, which are read anyway."""
_RECORD, _CAPTION, _NO_TEXT = range(3)


class ShardFile:
    """A `sources.Source` over one tar file."""

    def __init__(self, path: str | os.PathLike[str], cache_folder: Path | None = None):
        """
        Raises:
            ValueError: the file is missing, no tar file, or holds no sample.
        """
        self.path = os.fspath(path)
        try:
            opened = OpenedFile.of(self.path, FORMATS_VERSION)
            self._file_system, self._real = opened.file_system, opened.real
            self.fingerprint, self._state = opened.fingerprint, opened.state
            self._index = self._load_or_build((cache_folder or default_cache_folder()) / "shards")
        except (OSError, ImportError, ValueError, tarfile.TarError) as error:
            raise ValueError(f"cannot read the shard {self.path}: {error}") from error
        if not len(self):
            raise ValueError(f"the shard {self.path} holds no sample: no .json, .txt or image file")
        self._files = threading.local()

    def __len__(self) -> int:
        return int(self._index[0, 0])

    def __getitem__(self, index: int) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(index)
        begin, size, kind, _ = self._record_rows[index]
        images = [f"{number}.img" for number in range(len(self._image_rows(index)))]
        if kind == _NO_TEXT:
            return {"image": images}
        data = self._read(int(begin), int(size))
        try:
            is_caption = kind == _CAPTION
            record = {"conversations": caption_turns(data.decode("utf-8-sig"))} if is_caption else json.loads(data)
        except (ValueError, RecursionError) as error:
            raise RecordError(f"{self.path}[{index}]: not valid JSON or UTF-8 ({error})") from error
        if not isinstance(record, dict) or not images:
            return record
        return {key: value for key, value in record.items() if key not in IMAGE_FIELDS} | {"image": images}

    def read_image(self, index: int, number: int, name: str) -> bytes:
        """Raises ImageError."""
        rows = self._image_rows(index)
        if not len(rows) and name.startswith(DATA_SCHEME):
            return embedded_image(self[index], number, MAX_IMAGE_BYTES)
        if number >= len(rows):
            raise ImageError(f"image {name!r} of {self.path}[{index}] is no file of the shard with the record's name")
        try:
            begin, size = rows[number]
            if size > MAX_IMAGE_BYTES:
                raise OSError(f"it has {size:,} bytes, more than {MAX_IMAGE_BYTES:,}")
            return self._read(int(begin), int(size))
        except OSError as error:
            raise ImageError(f"image {number} of {self.path}[{index}] cannot be read: {error}") from error

    def image_stamp(self, index: int, number: int, name: str) -> str:
        """That of the whole shard."""
        return self._state

    def content_digest(self) -> str:
        """Of all texts, of the places and sizes of all images, and of their first and last bytes."""
        return self._index[0, 2:].tobytes().hex()

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

        Row 0: number of records and images, 16 bytes of digest. Then per record: first byte, size, which kind, its
        first image. Then per image: first byte, size.
        """
        path = cache / f"{self._state}.npy"
        with locked(path.with_suffix(".lock")):
            if not path.exists():
                with self._file_system.open(self._real, "rb") as file:
                    write_atomically(path, _build(file, self._file_system.size(self._real)))
        return np.load(path, mmap_mode="r")


def caption_turns(text: str) -> list[dict[str, str]]:
    """A caption as a conversation of one question and one answer."""
    return [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": text.strip()}]


def _build(file: IO[bytes], size: int) -> np.ndarray:
    """See `ShardFile._load_or_build`. Raises ValueError, tarfile.TarError."""
    records: list[tuple[int, int, int, int]] = []
    images: list[tuple[int, int, int, int]] = []
    digest = hashlib.blake2b(digest_size=16)
    for members in _samples(HeaderReader(file, size)):
        text = next((t for t in ("json", "txt") if t in members), None)
        kinds = sorted((t for t in members if t.split(".")[-1] in IMAGE_TYPES), key=_image_number)
        if text is None and not kinds:
            continue
        kind = _NO_TEXT if text is None else _CAPTION if text == "txt" else _RECORD
        records.append((*(members[text] if text else (0, 0)), kind, len(images)))
        images += [(*members[t], 0, 0) for t in kinds]
        digest.update(repr((text, kinds, [members[t] for t in kinds])).encode())
        if text is not None:
            _add_bytes(digest, file, *members[text])
        for place, length in (members[t] for t in kinds):
            _add_bytes(digest, file, place, min(length, _END_BYTES))
            _add_bytes(digest, file, place + max(0, length - _END_BYTES), min(length, _END_BYTES))
    head = np.frombuffer(digest.digest(), dtype=np.int64)
    return np.array([(len(records), len(images), *head), *records, *images], dtype=np.int64)


def _add_bytes(digest: hashlib.blake2b, file: IO[bytes], place: int, length: int) -> None:
    """Add bytes of a file to a digest, a piece at a time."""
    file.seek(place)
    while length > 0 and (piece := file.read(min(length, 1 << 20))):
        digest.update(piece)
        length -= len(piece)


def _image_number(kind: str) -> tuple[int, str]:
    """Sorts "2.jpg" before "10.jpg"."""
    number = kind.split(".")[0]
    return (int(number) if number.isdecimal() and len(number) <= _MOST_DIGITS else 0, kind)


def _samples(file: HeaderReader) -> Iterator[dict[str, tuple[int, int]]]:
    """Per sample: kind of file (lower case) -> (first byte, size). Links, devices and sparse files are no samples.

    Raises:
        ValueError: a sample's files do not lie together, or a name does not say clearly what a file is.
    """
    current: dict[str, tuple[int, int]] = {}
    previous = None
    finished: set[str] = set()
    with tarfile.open(fileobj=file, mode="r:") as tar:  # type: ignore[call-overload]
        for member in tar:
            match = _NAME.match(member.name)
            file.check(member)
            if not member.isreg() or member.issparse() or match is None:
                continue
            key, kind = match.groups()
            kind = kind.lower()
            if key != previous:
                if key in finished:
                    raise ValueError(
                        f"the files of sample {shown(key)} do not lie together: {shown(member.name)} comes after other "
                        "samples; make the tar from a sorted list of names (tar --sort=name)"
                    )
                if current:
                    yield current
                    current = {}
                finished.add(key)
                previous = key
            _check_kind(kind, member.name)
            if kind in current:
                raise ValueError(f"{shown(member.name)} is there twice; a sample has one file of each kind")
            current[kind] = (member.offset_data, member.size)
    if current:
        yield current


def _check_kind(kind: str, name: str) -> None:
    """Refuse names of media that would be lost, or taken for something else. Raises ValueError."""
    last = kind.split(".")[-1]
    if last in _OTHER_MEDIA or last in _OTHER_IMAGES:
        raise ValueError(
            f"{shown(name)}: {'only images are' if last in _OTHER_MEDIA else 'such images are not'} supported"
        )
    numbered = _NUMBERED.fullmatch(kind)
    if "." in kind and (last in IMAGE_TYPES or last in ("json", "txt")) and not (numbered and last in IMAGE_TYPES):
        raise ValueError(
            f"{shown(name)}: a sample's name ends at the first dot, so that its files are x.json and x.jpg, or "
            "x.0.jpg, x.1.jpg, ...; replace the other dots"
        )


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
