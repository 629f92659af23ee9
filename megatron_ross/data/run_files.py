"""Files about a run beside its checkpoints: logs, broken samples, steps without update."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from megatron_ross.config.schema import RunConfig


class RunFiles:
    """Writes them; a disk that is full is treated as `save_failure` says.

    Args:
        goes_on: warn once for every file that cannot be written, instead of ending the run.
    """

    def __init__(self, *, goes_on: bool = False) -> None:
        self._goes_on = goes_on
        self._warned: set[Path | str] = set()

    @classmethod
    def of(cls, run: RunConfig) -> RunFiles:
        """As the run's `save_failure` says."""
        return cls(goes_on=run.training.save_failure == "continue")

    def append(self, path: Path, text: str) -> None:
        """Add whole lines. They are there or not, never a part of one that the next line would be glued to."""
        with self.writing(path), path.open("ab", buffering=0) as file:
            size = file.seek(0, os.SEEK_END)
            rest = memoryview(text.encode(errors="backslashreplace"))
            try:
                while rest:
                    rest = rest[file.write(rest) :]
            except OSError:
                file.truncate(size)
                raise

    def say(self, text: str) -> None:
        """Print a line; standard output may be a file on the same disk."""
        with self.writing("standard output"):
            print(text, flush=True)

    @contextlib.contextmanager
    def writing(self, path: Path | str) -> Iterator[None]:
        """What is done inside writes to `path`.

        Raises:
            OSError: it cannot be written, and the run is to end then; names file and reason.
        """
        try:
            yield
        except OSError as error:
            reason = f"cannot write {path} ({error.strerror or error})"
            if not self._goes_on:
                raise OSError(f"{reason}; free space or choose another folder, then resume") from error
            if path not in self._warned:
                self._warned.add(path)
                with contextlib.suppress(OSError):  # stderr may be a file on the same disk
                    print(f"warning: {reason}; training goes on (save_failure=continue)", file=sys.stderr, flush=True)
