"""LLaVA records: checking one record and reading its image files.

A record is `{"id": ..., "image": "a.jpg" | ["a.jpg", "b.jpg"], "conversations": [{"from": "human", "value": ...}]}`;
`image` is absent (or null, or empty) in text-only records and `id` may be missing, an int or a string. No torch here.
"""

from __future__ import annotations

import os
import posixpath
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from megatron_ross.config.paths import is_url
from megatron_ross.config.shown import shown
from megatron_ross.data.errors import ImageError, RecordError

ROLES = ("human", "gpt")
_LONGEST_ID_BITS = 256
MAX_IMAGE_BYTES = 1 << 29
"""Larger image files are refused before they are read."""


@dataclass(frozen=True)
class Turn:
    """What one side says: `role` is "human" or "gpt"."""

    role: str
    text: str


@dataclass(frozen=True)
class Record:
    """One checked record. `where` names file and record in error messages."""

    id: str
    images: tuple[str, ...]
    turns: tuple[Turn, ...]
    where: str


def parse_record(raw: Any, where: str) -> Record:
    """Check one raw record.

    Args:
        raw: what the JSON holds.
        where: file and index, for messages.

    Raises:
        RecordError: names the file, the record's id and the offending field.
    """
    if not isinstance(raw, dict):
        raise RecordError(f"{where}: a record must be an object, found {type(raw).__name__}")
    record_id = raw.get("id", "")
    if isinstance(record_id, bool) or not isinstance(record_id, str | int):
        raise RecordError(f"{where}: field 'id' must be a string or an integer, found {type(record_id).__name__}")
    if isinstance(record_id, int) and record_id.bit_length() > _LONGEST_ID_BITS:
        raise RecordError(f"{where}: field 'id' is {shown(record_id)}")
    where = f"{where} (id {shown(record_id)})"
    turns = raw.get("conversations")
    if not isinstance(turns, list) or not turns:
        raise RecordError(f"{where}: field 'conversations' must be a non-empty list")
    return Record(
        id=str(record_id),
        images=_parse_images(raw.get("image"), where),
        turns=tuple(_parse_turn(turn, f"{where}: conversations[{i}]") for i, turn in enumerate(turns)),
        where=where,
    )


def _parse_images(value: Any, where: str) -> tuple[str, ...]:
    names = value if isinstance(value, list) else [] if value in (None, "") else [value]
    for name in names:
        if not isinstance(name, str) or not name or not _is_unicode(name):
            raise RecordError(f"{where}: field 'image' must be a file name or a list of them, found {shown(name)}")
    return tuple(names)


def _parse_turn(turn: Any, where: str) -> Turn:
    if not isinstance(turn, dict):
        raise RecordError(f"{where} must be an object, found {type(turn).__name__}")
    role, text = turn.get("from"), turn.get("value")
    if role not in ROLES:
        raise RecordError(f"{where}: field 'from' must be 'human' or 'gpt', found {shown(role)}")
    if not isinstance(text, str):
        raise RecordError(f"{where}: field 'value' must be a string, found {type(text).__name__}")
    if not _is_unicode(text):
        raise RecordError(f"{where}: field 'value' holds a lone surrogate (\\ud800 to \\udfff), which is no text")
    return Turn(role, text)


def _is_unicode(text: str) -> bool:
    """JSON may escape half a surrogate pair; Python reads it, but no encoder or tokenizer takes it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


class ImageRoot:
    """Reads image files of records below one folder (or URL prefix), and nowhere else."""

    def __init__(self, folder: str | os.PathLike[str], allow_symlinks: bool = False):
        """
        Args:
            folder: may itself be a symbolic link.
            allow_symlinks: follow symbolic links out of `folder`; a name can still not leave it by itself.

        Raises:
            ValueError: `folder` is not a folder.
        """
        self.folder = os.fspath(folder)
        self._allow_symlinks = allow_symlinks
        file_system, path = _open_url(self.folder) if is_url(self.folder) else (None, self.folder)
        # A file:// folder is read like any other local one: it has symbolic links, too.
        self._file_system: Any = None if isinstance(file_system, LocalFileSystem) else file_system
        self._real = os.path.realpath(path) if self._file_system is None else path
        is_folder = os.path.isdir(self._real) if self._file_system is None else self._file_system.isdir(self._real)
        if not is_folder:
            raise ValueError(
                f"image_root {self.folder} is not a folder; set it to the folder the 'image' names start from"
            )

    def resolve(self, name: str) -> str:
        """The path of image `name`; unless they are allowed, symbolic links are followed before the place is checked.

        Raises:
            ImageError: the path leaves the image root.
        """
        if "\0" in name or not _is_unicode(name):
            raise ImageError(f"image name {shown(name)} holds a NUL byte or a lone surrogate")
        path = written = posixpath.normpath(posixpath.join(self._real, name))
        if self._file_system is None and not self._allow_symlinks:
            path = os.path.realpath(os.path.join(self._real, name))
        if not self._is_inside(path):
            why = " behind a symbolic link (allow_image_symlinks follows them)" if self._is_inside(written) else ""
            raise ImageError(f"image {shown(name)} lies outside the image root {self.folder}{why}; refused")
        return path

    def _is_inside(self, path: str) -> bool:
        return path.startswith(self._real.rstrip("/") + "/")

    def read(self, name: str) -> bytes:
        """The bytes of image `name`.

        Raises:
            ImageError: the path leaves the image root, or the file is too large or cannot be read.
        """
        path = self.resolve(name)
        try:
            if self._file_system is None:
                return _read_regular_file(path)
            data = self._file_system.cat_file(path, start=0, end=MAX_IMAGE_BYTES + 1)
            _check_size(len(data))
            return data
        except FileNotFoundError as error:
            raise ImageError(f"image {shown(name)} not found in {self.folder}") from error
        except (OSError, ValueError) as error:  # an ImageError is a ValueError: the file is none, or too large
            raise ImageError(f"image {shown(name)} cannot be read: {error}") from error

    def stamp(self, name: str) -> str:
        """The state of image `name`: size and times, or what the remote store says; empty if it cannot be found.

        A replaced local file has another one even if size and modification time are kept: the time of its last change
        of any kind (ctime) cannot be.
        """
        try:
            path = self.resolve(name)
            if self._file_system is None:
                status = os.stat(path)
                return f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}"
            info = self._file_system.info(path)
        except (OSError, ValueError):  # an ImageError is a ValueError; reading the image says what is wrong
            return ""
        known = (info.get(key) for key in ("size", "ETag", "etag", "LastModified", "mtime", "created"))
        return " ".join(str(value) for value in known if value is not None)


def _read_regular_file(path: str) -> bytes:
    """Neither a pipe, which may never end, nor a device. Raises OSError, ImageError."""
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise ImageError("it is no regular file")
        _check_size(status.st_size)
        return file.read()


def _check_size(size: int) -> None:
    if size > MAX_IMAGE_BYTES:
        raise ImageError(f"it has {size:,} bytes, more than {MAX_IMAGE_BYTES:,}")


def _open_url(url: str) -> tuple[Any, str]:
    try:
        return fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise ValueError(f"cannot open {url}: {error}") from error


def word_count(raw: Any) -> int:
    """Words of a raw record as the published length-grouped sampler counts them; 0 for a malformed one."""
    turns = raw.get("conversations") if isinstance(raw, dict) else None
    if not isinstance(turns, Sequence) or isinstance(turns, str):
        return 0
    texts = (turn.get("value") if isinstance(turn, dict) else None for turn in turns)
    return sum(len(text.split()) for text in texts if isinstance(text, str))
