"""Files that change all at once, and are on disk then."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable
from pathlib import Path


def replace_text(path: Path, text: str) -> None:
    """Write a file so that readers see the old one or the new one, also after a kill or a power failure.

    One process at a time may write it. A killed one leaves `NAME.partial`, which the next overwrites.

    Raises:
        OSError: the file cannot be written; the old one is still there.
    """
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    sync_files([path.parent])


def sync_files(paths: Iterable[Path]) -> None:
    """Wait until these are on disk; of a folder, the names in it.

    Raises:
        OSError: they cannot be written. That a file system cannot do this for folders is no error.
    """
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):
                raise
        finally:
            os.close(descriptor)


def check_vacant(path: Path) -> None:
    """Raises ValueError: a folder cannot be made at `path`, because there is something, and no empty folder."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"{path} already exists: give another --output or remove it")
