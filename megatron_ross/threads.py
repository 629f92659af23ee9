"""Work beside the main thread."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

Result = TypeVar("Result")


def in_thread(work: Callable[[], Result], name: str) -> Future[Result]:
    """Do it in a daemon thread, which the end of the process does not wait for; the future has result or error.

    Args:
        name: of the thread, for lists of stacks.
    """
    done: Future[Result] = Future()

    def run() -> None:
        try:
            done.set_result(work())
        except BaseException as error:  # whoever asks for the result gets it
            done.set_exception(error)

    threading.Thread(target=run, name=name, daemon=True).start()
    return done
