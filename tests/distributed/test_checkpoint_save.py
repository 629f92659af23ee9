"""Saving a checkpoint: no process is forked, and a disk that takes no more fails all ranks and harms nothing."""

from __future__ import annotations

import importlib.util
import os
import resource
import signal
from pathlib import Path
from typing import Any

import pytest

from megatron_ross.checkpoint.agreement import CheckpointError
from megatron_ross.checkpoint.manifest import resolve_checkpoint
from megatron_ross.checkpoint.reader import open_checkpoint
from megatron_ross.training.trainer import Trainer
from tests.helpers.distributed import run_ranks
from tests.helpers.toy_run import two_stage_settings, with_trainer

DECODERS = ["pillow", *(["dali"] if importlib.util.find_spec("nvidia.dali") else [])]
SMALL_FILE = 50_000  # bytes; less than any rank's share


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return two_stage_settings(tmp_path_factory.mktemp("run")) | {"train_iters": 4}


def _count_forks(rank: int, world_size: int, flat: dict[str, Any]) -> int:
    def act(trainer: Trainer) -> int:
        forks = []
        os.register_at_fork(before=lambda: forks.append(1))
        trainer._step()
        trainer.save()
        return len(forks)

    return with_trainer(flat, act)


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_save_forks_no_process(decoder: str, settings: dict[str, Any], tmp_path: Path) -> None:
    """A forked child has none of the threads that decode images or exchange gradients, but may hold their locks."""
    flat = settings | {"save": str(tmp_path), "image_decoder": decoder}
    assert run_ranks(_count_forks, 2, flat) == [0, 0]
    assert open_checkpoint(tmp_path / "checkpoints").manifest.iteration == 1


def _save_twice(rank: int, world_size: int, flat: dict[str, Any]) -> str:
    """The second save runs against a limit on one rank; returns the error each rank saw."""

    def act(trainer: Trainer) -> str:
        trainer._step()
        trainer.save()
        trainer._step()
        if rank == 1:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # then a write past the limit is an OSError
            resource.setrlimit(resource.RLIMIT_FSIZE, (SMALL_FILE, resource.RLIM_INFINITY))
        try:
            trainer.save()
        except CheckpointError as error:
            return str(error)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        return ""

    return with_trainer(flat, act)


def test_a_failed_save_fails_all_ranks_and_leaves_the_last_checkpoint(settings: dict[str, Any], tmp_path: Path) -> None:
    messages = run_ranks(_save_twice, 2, settings | {"save": str(tmp_path)})
    for message in messages:
        assert "iter_0000002" in message
        assert "File too large" in message
    root = tmp_path / "checkpoints"
    assert sorted(path.name for path in root.iterdir()) == ["iter_0000001", "latest_checkpointed_iteration.txt"]
    reader = open_checkpoint(resolve_checkpoint(root))
    assert all(reader.read(key).isfinite().all() for key in reader.keys())  # noqa: SIM118 - not a dict
