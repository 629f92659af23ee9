"""Records: checking one, in any of the forms of `formats`, and reading its image files.

The published form is `{"id": ..., "image": "a.jpg" | ["a.jpg", ...], "conversations": [{"from": ..., "value": ...}]}`;
`image` is absent (or null, or empty) in text-only records and `id` may be missing, an int or a string. No torch here.
"""

from __future__ import annotations

import hashlib
import os
import posixpath
import stat
from dataclasses import dataclass
from typing import Any, Protocol

import fsspec
from fsspec.implementations.local import LocalFileSystem

from megatron_ross.config.paths import is_url
from megatron_ross.config.shown import shown
from megatron_ross.data.errors import ImageError, RecordError, SampleError
from megatron_ross.data.formats import IMAGE_TAG, Turn, is_unicode, plain_record, short_name

_LONGEST_ID_BITS = 256
_NUM_SAMPLED_IMAGES = 16
MAX_IMAGE_BYTES = 1 << 29
"""Larger image files are refused before they are read."""


@dataclass(frozen=True)
class Record:
    """One checked record.

    Attributes:
        images: file names; of images that the record or its file holds, a name for messages.
        turns: the first one may be the system text.
        where: file and record, for messages.
    """

    id: str
    images: tuple[str, ...]
    turns: tuple[Turn, ...]
    where: str

    @property
    def lacks_images(self) -> bool:
        """It speaks of images and brings none: `<image>` is then text like any other."""
        return not self.images and any(IMAGE_TAG in turn.text for turn in self.turns)


def parse_record(raw: Any, where: str, *, needs_answer: bool = True) -> Record:
    """Check one raw record.

    Args:
        raw: what the JSON holds.
        where: file and index, for messages.
        needs_answer: False takes a record with nothing but images, and gives it a turn that shows them.

    Raises:
        RecordError: names the file, the record's id and the offending field.
    """
    if not isinstance(raw, dict):
        raise RecordError(f"{where}: a record must be an object, found {type(raw).__name__}")
    record_id = "" if raw.get("id") is None else raw["id"]
    if isinstance(record_id, bool) or not isinstance(record_id, str | int):
        raise RecordError(f"{where}: field 'id' must be a string or an integer, found {type(record_id).__name__}")
    if isinstance(record_id, int) and record_id.bit_length() > _LONGEST_ID_BITS:
        raise RecordError(f"{where}: field 'id' is {shown(record_id)}")
    where = f"{where} (id {shown(record_id)})"
    plain = plain_record(raw, where, needs_answer=needs_answer)
    return Record(str(record_id), tuple(map(short_name, plain.images)), plain.turns, where)


class _Images(Protocol):
    """The part of `sources.Source` that says which images there are."""

    path: str

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any: ...

    def read_image(self, index: int, number: int, name: str) -> bytes: ...


def sampled_images_digest(source: _Images) -> str:
    """Hex digest of the first images of some records, from the first to the last; unreadable ones count as empty."""
    last, digest = len(source) - 1, hashlib.blake2b(digest_size=16)
    for index in sorted({place * last // (_NUM_SAMPLED_IMAGES - 1) for place in range(_NUM_SAMPLED_IMAGES)}):
        try:
            names = parse_record(source[index], source.path, needs_answer=False).images
            data = source.read_image(index, 0, names[0]) if names else b""
        except SampleError:
            data = b""
        digest.update(hashlib.blake2b(data, digest_size=16).digest())
    return digest.hexdigest()


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
                f"image_folder={self.folder}: is not a folder; set it to the folder the 'image' names start from"
            )

    def resolve(self, name: str) -> str:
        """The path of image `name`; unless they are allowed, symbolic links are followed before the place is checked.

        Raises:
            ImageError: the path leaves the image root.
        """
        if "\0" in name or not is_unicode(name):
            raise ImageError(f"image name {shown(name)} holds a NUL byte or a lone surrogate")
        if name.startswith(("http://", "https://")):
            raise ImageError(f"image {shown(name)} is not downloaded; put a copy below {self.folder} and name that")
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
