"""Failures of evaluation frameworks as one line that names what to do."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LOG_FILE = "error.log"
_NO_DATA = (
    "ConnectionError",
    "DataFilesNotFoundError",
    "DatasetNotFoundError",
    "FileNotFoundError",
    "GatedRepoError",
    "LocalEntryNotFoundError",
    "LocalTokenNotFoundError",
    "OfflineModeIsEnabled",
    "RepositoryNotFoundError",
)
"""Names of the errors that say that a data set could not be had; their classes live in packages not always there."""


class FrameworkError(ValueError):
    """A framework failed, or has no result."""


@contextmanager
def framework_errors(
    framework: str, tasks: str, output: Path, install: str, *, passes: tuple[type[Exception], ...] = ()
) -> Iterator[None]:
    """Turn whatever a framework raises, or its attempt to exit, into a FrameworkError; the traceback is added to
    LOG_FILE.

    Args:
        framework: its name, for messages.
        tasks: what it was asked to run, for messages.
        output: folder for LOG_FILE.
        install: how to install the framework, for messages.
        passes: errors that already say what to do, raised as they are.

    Raises:
        FrameworkError: the block failed.
    """
    try:
        yield
    except (Exception, SystemExit) as error:
        if isinstance(error, (FrameworkError, *passes)):
            raise
        cause = _first_cause(error)
        output.mkdir(parents=True, exist_ok=True)
        log = output / LOG_FILE
        with log.open("a", encoding="utf-8") as file:
            file.write(f"== {framework}: {tasks}\n{''.join(traceback.format_exception(error))}\n")
        reason = f"{type(cause).__name__}: {' '.join(str(cause).split())[:300]}"
        if isinstance(cause, ImportError):
            raise FrameworkError(
                f"{framework} cannot import {cause.name or 'one of its modules'} ({reason}): install what is missing, "
                f"or the framework again: {install}; traceback in {log}"
            ) from error
        if {base.__name__ for base in type(cause).__mro__} & set(_NO_DATA):
            raise FrameworkError(
                f"the data of {tasks} for {framework} is missing ({reason}): run once with network access (docs/"
                f"evaluation.md says what is downloaded), log in to the hub if it asks for a token, or set HF_HOME to "
                f"where the data is; traceback in {log}"
            ) from error
        raise FrameworkError(
            f"{framework} failed in {tasks} ({reason}): the traceback in {log} says where; leave the task out, or mend "
            "its cause and run again"
        ) from error


def _first_cause(error: BaseException) -> BaseException:
    """Behind tenacity's RetryError is the error of the last attempt."""
    attempt = getattr(error, "last_attempt", None)
    inner = attempt.exception() if attempt is not None else None
    return _first_cause(inner) if inner is not None else error
