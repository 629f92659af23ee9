"""LLaVA records: checking one record and reading its image files.

A record is `{"id": ..., "image": "a.jpg" | ["a.jpg", "b.jpg"], "conversations": [{"from": "human", "value": ...}]}`;
`image` is absent (or null, or empty) in text-only records and `id` may be missing, an int or a string. No torch here.
"""

from __future__ import annotations

import os
import posixpath
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec

from megatron_ross.config.paths import is_url
from megatron_ross.data.errors import ImageError, RecordError

ROLES = ("human", "gpt")


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
    where = f"{where} (id {record_id!r})"
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
            raise RecordError(f"{where}: field 'image' must be a file name or a list of them, found {name!r:.80}")
    return tuple(names)


def _parse_turn(turn: Any, where: str) -> Turn:
    if not isinstance(turn, dict):
        raise RecordError(f"{where} must be an object, found {type(turn).__name__}")
    role, text = turn.get("from"), turn.get("value")
    if role not in ROLES:
        raise RecordError(f"{where}: field 'from' must be 'human' or 'gpt', found {role!r:.80}")
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

    def __init__(self, folder: str | os.PathLike[str]):
        """
        Raises:
            ValueError: `folder` is not a folder.
        """
        self.folder = os.fspath(folder)
        if is_url(self.folder):
            self._file_system, self._real = _open_url(self.folder)
        else:
            self._file_system, self._real = None, os.path.realpath(self.folder)
        is_folder = os.path.isdir(self._real) if self._file_system is None else self._file_system.isdir(self._real)
        if not is_folder:
            raise ValueError(
                f"image_root {self.folder} is not a folder; set it to the folder the 'image' names start from"
            )

    def resolve(self, name: str) -> str:
        """The real path of image `name`; symbolic links are followed first, then the place is checked.

        Raises:
            ImageError: the path leaves the image root.
        """
        if "\0" in name:
            raise ImageError(f"image name {name!r} holds a NUL byte")
        if self._file_system is None:
            path = os.path.realpath(os.path.join(self._real, name))
        else:
            path = posixpath.normpath(posixpath.join(self._real, name))
        if not path.startswith(self._real.rstrip("/") + "/"):
            raise ImageError(f"image {name!r} lies outside the image root {self.folder}; refused")
        return path

    def read(self, name: str) -> bytes:
        """The bytes of image `name`.

        Raises:
            ImageError: the path leaves the image root, or the file cannot be read.
        """
        path = self.resolve(name)
        try:
            if self._file_system is not None:
                return self._file_system.cat_file(path)
            return Path(path).read_bytes()
        except FileNotFoundError as error:
            raise ImageError(f"image {name!r} not found in {self.folder}") from error
        except (OSError, ValueError) as error:
            raise ImageError(f"image {name!r} cannot be read: {error}") from error


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
