"""Output folders that appear complete or not at all."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, BinaryIO

import torch

from megatron_ross.text_files import check_vacant


@contextmanager
def atomic_directory(path: Path, needed_bytes: int = 0) -> Iterator[Path]:
    """A temporary folder beside `path`: takes that name when the block ends without an error, is removed otherwise.

    SIGTERM is treated like an interrupt from the keyboard. After SIGKILL the hidden `.NAME.*.tmp` folder stays, but
    `path` does not exist.

    Args:
        path: must not exist, or be an empty folder.
        needed_bytes: what is going to be written.

    Raises:
        ValueError: there is something at `path` already, or the disk has less than `needed_bytes` left.
    """
    path = Path(os.path.abspath(path))
    check_vacant(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(path.parent).free
    if free < needed_bytes:
        raise ValueError(f"{path.parent} has {free / 1e9:.1f} GB left, the output needs {needed_bytes / 1e9:.1f} GB")
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    try:
        with _sigterm_as_interrupt():
            yield temporary
            temporary.chmod(0o755)
            os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def create_file(path: Path) -> Iterator[BinaryIO]:
    """A new file that is on disk when the block ends; errors of writing it name it.

    Raises:
        OSError: it cannot be written, e.g. because the disk is full.
    """
    try:
        with path.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        if error.filename is not None:
            raise
        raise OSError(error.errno, f"cannot write: {error.strerror}", str(path)) from error


def save_torch(value: Any, file: BinaryIO) -> None:
    """`torch.save` that reports a failing disk as the OSError it is, not as a RuntimeError about file positions."""
    try:
        torch.save(value, file)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):
            raise error.__context__ from error
        raise


@contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(signum: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
