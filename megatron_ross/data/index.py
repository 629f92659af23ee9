"""Random access to the records of a JSON array or JSONL file without loading it.

An index holds the byte range of every record. The file itself is memory-mapped, so all ranks and workers of a node
share one copy in the page cache. The index of a large file is kept in a cache folder, and the second start reads
nothing but it; a file at a URL is copied there, too.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import json
import mmap
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import fsspec
import numpy as np

from megatron_ross.config.paths import is_url
from megatron_ross.text_files import replace_text

CACHE_ABOVE_BYTES = 32 * 2**20
"""Smaller files are indexed at every start, which takes less than a second."""

_CHUNK_CHARACTERS = 2**24
_CUT_OFF_CHARACTERS = 2**23  # a syntax error so close to the end of the window may be a value cut in two
_LONGEST_NUMBER = 64  # characters; the only value that may look complete when it is cut in two
_BETWEEN = re.compile(r"[\s,]*")
_BYTE_ORDER_MARK = re.compile("\ufeff?")


def default_cache_folder() -> Path:
    """Node-local: `$XDG_CACHE_HOME/megatron_ross`, or `~/.cache/megatron_ross`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "megatron_ross"


class MappedRecords(Sequence[Any]):
    """JSON values at byte ranges (int64 [n, 2]) of a file. Picklable: a copy in another process maps the same file."""

    def __init__(self, local: Path, ranges: np.ndarray):
        self._local = local
        self._ranges = ranges
        self._map: mmap.mmap | None = None

    def __len__(self) -> int:
        return len(self._ranges)

    def __getitem__(self, index: Any) -> Any:
        if self._map is None:
            with self._local.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        begin, end = self._ranges[index]
        return json.loads(self._map[begin:end])

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_map": None}


class RecordFile(MappedRecords):
    """The unchecked records of one file."""

    def __init__(self, path: str | os.PathLike[str], cache_folder: Path | None = None):
        """
        Args:
            path: JSON array, or JSONL if the name ends in `.jsonl`; a local path or a URL.
            cache_folder: for indices and copies of remote files; None takes `default_cache_folder()`.

        Raises:
            ValueError: the file is missing, unreadable, not JSON, not an array, or empty.
        """
        self.path = os.fspath(path)
        self._cache = cache = (cache_folder or default_cache_folder()) / "records"
        try:
            local = _local_copy(self.path, cache) if is_url(self.path) else Path(self.path)
            super().__init__(local, _load_or_build(local, cache))
            self.fingerprint = f"{self.path} {self._local.stat().st_size} {self._local.stat().st_mtime_ns}"
            """Changes whenever the file does."""
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"cannot read the data file {self.path}: {error}") from error
        if len(self._ranges) == 0:
            raise ValueError(f"{self.path} holds no record")

    def content_digest(self) -> str:
        """Of all bytes of the file, wherever it lies and whenever it was written. Raises OSError."""
        if self._local.stat().st_size <= CACHE_ABOVE_BYTES:
            return _digest(self._local)
        known = self._cache / f"{file_key(self._local)}.digest"
        with locked(known.with_suffix(".lock")):
            if not known.exists():
                replace_text(known, _digest(self._local))
        return known.read_text()


def file_key(path: Path) -> str:
    """Another one for every state of a local file, also if its size and its time of change were put back."""
    stat = path.stat()
    state = (path.resolve(), stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
    return hashlib.blake2b(" ".join(map(str, state)).encode(), digest_size=12).hexdigest()


@dataclass(frozen=True)
class OpenedFile:
    """A file of samples, local or at a URL.

    Attributes:
        real: its path within `file_system`.
        fingerprint: names path, size and time of change; the same on all nodes.
        state: also names everything by which a node can tell that a local file was replaced (`file_key`).
    """

    file_system: Any
    real: str
    fingerprint: str
    state: str

    @classmethod
    def of(cls, path: str, version: int) -> OpenedFile:
        """`version`: of what is made of its content. Raises OSError, ImportError, ValueError."""
        file_system, real = fsspec.core.url_to_fs(path)
        info = file_system.info(real)
        stamp = f"{path} {info['size']} {info.get('mtime', info.get('LastModified', ''))} {version}"
        fingerprint = hashlib.blake2b(stamp.encode(), digest_size=12).hexdigest()
        return cls(file_system, real, fingerprint, fingerprint + ("" if is_url(path) else file_key(Path(real))))


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Only one process of the node at a time; the others wait, and then find the work done."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def write_atomically(path: Path, array: np.ndarray) -> None:
    """Save an array so that no reader ever sees half of it."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as file:
        np.save(file, array)
    os.replace(temporary, path)


def _local_copy(url: str, cache: Path) -> Path:
    """Download once; a file of another size at the URL is downloaded again."""
    try:
        file_system, remote = fsspec.core.url_to_fs(url)
        size = file_system.size(remote)
    except (ImportError, ValueError) as error:
        raise ValueError(f"cannot open {url}: {error}") from error
    suffix = ".jsonl" if url.endswith(".jsonl") else ".json"
    target = cache / f"{hashlib.blake2b(f'{url} {size}'.encode(), digest_size=12).hexdigest()}{suffix}"
    with locked(target.with_suffix(".lock")):
        if not target.exists():
            temporary = target.with_name(f"{target.name}.tmp")
            with file_system.open(remote, "rb") as source, temporary.open("wb") as sink:
                shutil.copyfileobj(source, sink, 2**22)
            os.replace(temporary, target)
    return target


def _load_or_build(path: Path, cache: Path) -> np.ndarray:
    """int64 [n, 2]: first and one past the last byte of every record."""
    stat = path.stat()
    if stat.st_size <= CACHE_ABOVE_BYTES:
        return _build(path)
    key = f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}"
    index = cache / f"{hashlib.blake2b(key.encode(), digest_size=12).hexdigest()}.npy"
    with locked(index.with_suffix(".lock")):
        if not index.exists():
            write_atomically(index, _build(path))
    return np.load(index, mmap_mode="r")


def _build(path: Path) -> np.ndarray:
    with path.open("rb") as file:
        ranges = list(_line_ranges(file, path) if path.suffix == ".jsonl" else _array_ranges(file, path))
    return np.array(ranges, dtype=np.int64).reshape(-1, 2)


def _line_ranges(file: IO[bytes], path: Path) -> Iterator[tuple[int, int]]:
    begin = 0
    for number, line in enumerate(file, start=1):
        if line.strip():
            try:
                json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}, line {number}: not valid JSON ({error})") from error
            yield begin, begin + len(line)
        begin += len(line)


def _array_ranges(file: IO[bytes], path: Path) -> Iterator[tuple[int, int]]:
    """Byte ranges of the elements of a JSON array, reading a piece at a time."""
    pieces = _Pieces(file)
    hint = "files with one record per line must end in .jsonl"
    pieces.skip(_BYTE_ORDER_MARK)
    if not pieces.skip(_BETWEEN) or pieces.text[pieces.place] != "[":
        raise ValueError(f"{path} must hold a JSON array of records; {hint}")
    pieces.advance(pieces.place + 1)
    count = 0
    while True:
        if not pieces.skip(_BETWEEN):
            raise ValueError(f"{path} is not valid JSON: the array ends after {count} records without ']'")
        if pieces.text[pieces.place] == "]":
            return
        begin = pieces.byte
        try:
            pieces.read_value()
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{path} is not valid JSON: record {count} at byte {begin}: {error.msg}; {hint}"
            ) from error
        except (ValueError, RecursionError) as error:  # a number of thousands of digits; a thousand levels
            raise ValueError(f"{path}: record {count} at byte {begin} cannot be read: {error}") from error
        count += 1
        yield begin, pieces.byte


class _Pieces:
    """A window of text that moves over a UTF-8 file and knows its byte position."""

    def __init__(self, file: IO[bytes]):
        self._reader = io.TextIOWrapper(file, encoding="utf-8", newline="")
        self._decoder = json.JSONDecoder()
        self.text = ""
        self.place = 0
        self.byte = 0

    def advance(self, place: int) -> None:
        """Move to a later place of the window."""
        passed = self.text[self.place : place]
        self.byte += len(passed) if passed.isascii() else len(passed.encode())
        self.place = place

    def skip(self, pattern: re.Pattern[str]) -> bool:
        """Move over what `pattern` matches; False at the end of the file."""
        while True:
            match = pattern.match(self.text, self.place)
            assert match is not None
            self.advance(match.end())
            if self.place < len(self.text):
                return True
            if not self._grow():
                return False

    def read_value(self) -> None:
        """Move over one JSON value. Raises JSONDecodeError."""
        while True:
            try:
                _, end = self._decoder.raw_decode(self.text, self.place)
            except json.JSONDecodeError as error:
                is_cut_off = error.pos > len(self.text) - _CUT_OFF_CHARACTERS
                if not is_cut_off or not self._grow():
                    raise
                continue
            may_go_on = end > len(self.text) - _LONGEST_NUMBER and self.text[end:][:1] not in (",", "]")
            if not may_go_on or not self._grow():
                self.advance(end)
                return

    def _grow(self) -> bool:
        """Read another piece, forget what was passed; False, and no change, at the end of the file."""
        more = self._reader.read(_CHUNK_CHARACTERS)
        if more:
            self.text = self.text[self.place :] + more
            self.place = 0
        return bool(more)
