"""Saving a checkpoint: no process is forked, and a disk that takes no more fails all ranks and harms nothing."""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.dist_checkpointing import ShardedTensor

from megatron_ross.checkpoint import saver
from megatron_ross.checkpoint.agreement import CheckpointError
from megatron_ross.checkpoint.checksums import verify_files
from megatron_ross.checkpoint.manifest import Manifest, iteration_dir, resolve_checkpoint
from megatron_ross.checkpoint.reader import open_checkpoint
from megatron_ross.checkpoint.saver import CheckpointSaver, SavePolicy
from megatron_ross.training.trainer import Trainer
from tests.helpers.distributed import run_ranks
from tests.helpers.full_disk import full_disk
from tests.helpers.golden import model_config
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


def _look_when_latest_is_written(rank: int, world_size: int, folder: Path, is_async: bool) -> list[str]:
    """Save one tensor; the checkpoints that were found complete when `latest` was about to be written."""
    (folder / "assets").mkdir(exist_ok=True)
    (folder / "assets" / "tokenizer.json").write_text("{}")
    write_latest, sync_files, complete, synced = saver.write_latest, saver.sync_files, [], set()

    def sync(paths: Iterable[Path]) -> None:
        found = list(paths)
        sync_files(found)
        synced.update(path.name for path in found)

    def look(root: Path, iteration: int) -> None:
        directory = resolve_checkpoint(iteration_dir(root, iteration))
        verify_files(directory, Manifest.read(directory).files)
        assert synced >= {".metadata", "common.pt", "metadata.json", "tokenizer.json", "assets"}
        complete.append(directory.name)
        write_latest(root, iteration)

    saver.write_latest, saver.sync_files = look, sync
    checkpoints = CheckpointSaver(folder / "root", folder / "assets", SavePolicy(is_async))
    tensor = ShardedTensor.from_rank_offsets("x", torch.ones(4), (0, rank, world_size))
    checkpoints.save(Manifest(3, model_config("qwen2_siglip")), {"x": tensor})
    checkpoints.finish()
    checkpoints.close()
    return complete


@pytest.mark.parametrize("is_async", [False, True], ids=["foreground", "asynchronous"])
def test_latest_is_written_last(is_async: bool, tmp_path: Path) -> None:
    """When it is, every file of the checkpoint is in place and on disk, as its manifest has it, under its name."""
    assert run_ranks(_look_when_latest_is_written, 2, tmp_path, is_async) == [["iter_0000003"], []]
    assert resolve_checkpoint(tmp_path / "root").name == "iter_0000003"


def _save_where_nothing_can_be_removed(rank: int, world_size: int, folder: Path) -> str:
    (folder / "assets").mkdir(exist_ok=True)

    def fail(*args: Any) -> list[int]:
        raise OSError("busy")

    saver.remove_superseded = fail
    checkpoints = CheckpointSaver(folder / "root", folder / "assets", SavePolicy(False))
    tensor = ShardedTensor.from_rank_offsets("x", torch.ones(4), (0, rank, world_size))
    checkpoints.save(Manifest(3, model_config("qwen2_siglip")), {"x": tensor})
    saved = checkpoints.finish()
    assert saved is not None
    return saved.complaint


def test_old_checkpoints_that_stay_are_no_failed_save(tmp_path: Path) -> None:
    complaint = f"cannot remove old checkpoints of {tmp_path / 'root'}: busy"
    assert run_ranks(_save_where_nothing_can_be_removed, 2, tmp_path) == [complaint] * 2
    assert resolve_checkpoint(tmp_path / "root").name == "iter_0000003"


def _save_twice(rank: int, world_size: int, flat: dict[str, Any]) -> str:
    """The second save runs against a limit on one rank; returns the error each rank saw."""

    def act(trainer: Trainer) -> str:
        trainer._step()
        trainer.save()
        trainer._step()
        with full_disk(SMALL_FILE) if rank == 1 else contextlib.nullcontext():
            try:
                trainer.save()
            except CheckpointError as error:
                return str(error)
        return ""

    return with_trainer(flat, act)


def test_a_failed_save_fails_all_ranks_and_leaves_the_last_checkpoint(settings: dict[str, Any], tmp_path: Path) -> None:
    """What a killed run left beside it goes with the first save."""
    (tmp_path / "checkpoints" / "iter_0000007.incomplete").mkdir(parents=True)
    messages = run_ranks(_save_twice, 2, settings | {"save": str(tmp_path)})
    for message in messages:
        assert "iter_0000002" in message
        assert "File too large" in message
    root = tmp_path / "checkpoints"
    assert sorted(path.name for path in root.iterdir()) == ["iter_0000001", "latest_checkpointed_iteration.txt"]
    reader = open_checkpoint(resolve_checkpoint(root))
    assert all(reader.read(key).isfinite().all() for key in reader.keys())  # noqa: SIM118 - not a dict
