"""Errors of one rank become errors of all, so that none waits for the others in a collective."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar, cast

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

Told = TypeVar("Told")


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read; the message names the file and the reason."""


def run_on_rank_0(action: Callable[[], Told], what: str, cleanup: Path | None = None) -> Told:
    """Call `action` on rank 0; every rank gets what it returned. A collective.

    Raises:
        CheckpointError: on every rank; it raised an OSError or a ValueError.
    """
    told: list[Told | None] = [None]
    error = None
    if dist.get_rank() == 0:
        try:
            told[0] = action()
        except (OSError, ValueError) as caught:
            error = caught
    raise_together(error, what, cleanup)
    dist.broadcast_object_list(told, src=0)
    return cast(Told, told[0])


def agree_on_checkpoint(directory: Path, content: str) -> None:
    """Ranks read the file system each for itself, and may see different states of it. A collective.

    Args:
        content: what must be the same on all ranks, wherever the directory is on their machines.

    Raises:
        CheckpointError: on every rank; it is not.
    """
    everyone = [(str(directory), content)] * dist.get_world_size()
    dist.all_gather_object(everyone, everyone[0])
    others = [rank for rank, (_, other) in enumerate(everyone) if other != everyone[0][1]]
    if others:
        raise CheckpointError(
            f"ranks would start from different checkpoints: rank 0 from {everyone[0][0]}, rank {others[0]} from "
            f"{everyone[others[0]][0]}; the shared file system shows them different states: start again"
        )


def raise_together(error: BaseException | None, what: str, cleanup: Path | None = None) -> None:
    """Raise CheckpointError on every rank if any rank has an error; rank 0 removes `cleanup` first. A collective."""
    reasons: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(reasons, None if error is None else _reason(error))
    failed = sorted({reason for reason in reasons if reason is not None}, key=len, reverse=True)
    if not failed:
        return
    if cleanup is not None and dist.get_rank() == 0:
        shutil.rmtree(cleanup, ignore_errors=True)
    raise CheckpointError(f"cannot {what}: {failed[0]}") from error


def _reason(error: BaseException) -> str:
    """One line. The writer reports all ranks' errors to one rank, and nothing to the others."""
    if isinstance(error, CheckpointException):
        causes = [_last_line(failure[0]) for failure in error.failures.values()]
        return causes[0] if causes else ""
    return _last_line(error)


def _last_line(error: BaseException) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[-1] if text else ''}"
