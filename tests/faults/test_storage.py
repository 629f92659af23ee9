"""Real file systems that are full, read-only or do not answer, under a run of two ranks."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_ross.checkpoint import writer
from megatron_ross.checkpoint.manifest import resolve_checkpoint
from megatron_ross.checkpoint.retention import complete_iterations
from megatron_ross.config.schema import RunConfig
from megatron_ross.training.checkpoints import prepare_run_folder
from megatron_ross.training.trainer import Trainer
from tests.helpers.distributed import RankError, run_ranks
from tests.helpers.toy_run import train, two_stage_settings, with_trainer

pytestmark = pytest.mark.faults

HANG_S = 15.0
DISK_MB = 14  # more than one checkpoint of the toy model, less than two


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    more = {"train_iters": 6, "log_interval": 1, "save_interval": 2}
    return two_stage_settings(tmp_path_factory.mktemp("run")) | more


@pytest.fixture
def settings(toy: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    return toy | {"save": str(tmp_path)}


@contextlib.contextmanager
def _mounted(folder: Path, megabytes: int = DISK_MB) -> Iterator[Path]:
    """A small file system there."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount file systems")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """The folder of the run's checkpoints, a small file system of its own."""
    with _mounted(tmp_path / "checkpoints") as folder:
        yield folder


@pytest.fixture
def run_disk(tmp_path: Path) -> Iterator[Path]:
    """The whole run folder, a small file system of its own."""
    with _mounted(tmp_path / "run", 3 * DISK_MB) as folder:
        yield folder


@pytest.mark.parametrize("is_async", [False, True], ids=["foreground", "asynchronous"])
def test_a_full_disk_stops_all_ranks_and_keeps_the_last_checkpoint(
    is_async: bool, settings: dict[str, Any], disk: Path
) -> None:
    for message in run_ranks(train, 2, settings | {"async_save": is_async}):
        assert "iter_0000004" in message
        assert "No space left on device" in message
        assert "free space" in message
    assert complete_iterations(disk) == [2]
    assert resolve_checkpoint(disk).name == "iter_0000002"
    assert not list(disk.glob("*.incomplete"))


FULL_FROM, FULL_UNTIL = 3, 17


def _train_on_a_disk_that_is_full_for_a_while(rank: int, world_size: int, flat: dict[str, Any]) -> tuple[str, str]:
    """Others fill it before the third step and free it before the 17th; the loss of the fourth is NaN.

    Returns what `train` does, and what this rank wrote to stderr.
    """
    step, skip, filler = Trainer._step, Trainer._skip, Path(flat["save"]) / "filler"

    def fill() -> None:
        with contextlib.suppress(OSError), filler.open("ab", buffering=0) as file:
            while True:
                file.write(bytes(4096))

    def late(self: Trainer, *args: Any) -> None:
        if rank == world_size - 1:
            fill()  # again: rank 0 may have removed a failed save since
        skip(self, *args)

    def timed(self: Trainer) -> Any:
        now = self.iteration + 1
        if rank == world_size - 1 and FULL_FROM <= now < FULL_UNTIL:
            fill()
        if rank == world_size - 1 and now == FULL_UNTIL:
            filler.unlink()
        stage = self.stages[-1]
        lm_loss = stage.lm_loss
        if now == 4 and stage.spec.has("H"):
            stage.lm_loss = lambda hidden, batch: lm_loss(hidden, batch) * float("nan")
        result = step(self)
        stage.lm_loss = lm_loss
        return result

    Trainer._step, Trainer._skip = timed, late  # type: ignore[method-assign]
    with tempfile.TemporaryFile("w+") as err, contextlib.redirect_stderr(err):
        message = train(rank, world_size, flat)
        err.seek(0)
        return message, err.read()


@pytest.mark.parametrize("is_async", [False, True], ids=["foreground", "asynchronous"])
def test_training_goes_on_while_the_disk_of_the_run_is_full(
    is_async: bool, toy: dict[str, Any], run_disk: Path
) -> None:
    """No checkpoint, log line, or record of a skipped step can be written: one warning for each file, and it goes on.

    Lines are whole or missing, so that the run can be resumed.
    """
    more = {"train_iters": 18, "save_interval": 2, "save_retain_last": 1, "save_failure": "continue"}
    flat = toy | more | {"save": str(run_disk), "async_save": is_async, "skip_nonfinite_steps": 1}
    (first, _), (second, said) = run_ranks(_train_on_a_disk_that_is_full_for_a_while, 2, flat)
    assert (first, second) == ("", "")
    lines = [json.loads(line) for line in (run_disk / "metrics.jsonl").read_text().splitlines()]
    iterations = [line["iteration"] for line in lines]
    assert iterations == sorted(set(iterations))
    assert {1, 2, 17, 18} <= set(iterations)
    assert len(iterations) < 18
    assert not (run_disk / "nonfinite.jsonl").read_text()
    for name in ("metrics.jsonl", "nonfinite.jsonl"):
        assert said.count(f"warning: cannot write {run_disk / name} (No space left on device); training goes on") == 1
    assert complete_iterations(run_disk / "checkpoints") == [18]
    resumed = flat | {"load": str(run_disk), "init_from": "", "train_iters": 19, "save_interval": 100}
    resumed |= {"lr_continue": "constant"}
    assert run_ranks(train, 2, resumed) == ["", ""]


def _train_on_a_disk_that_becomes_read_only(rank: int, world_size: int, flat: dict[str, Any], disk: str) -> str:
    save = Trainer.save

    def late(self: Trainer, **kwargs: Any) -> None:
        if rank == 0 and self.iteration == 4:
            subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        save(self, **kwargs)

    Trainer.save = late  # type: ignore[method-assign]
    return train(rank, world_size, flat)


def test_a_disk_that_becomes_read_only(settings: dict[str, Any], disk: Path) -> None:
    """As after an error of the disk: the run stops, the last checkpoint can be read, and the next start is refused."""
    for message in run_ranks(_train_on_a_disk_that_becomes_read_only, 2, settings, str(disk)):
        assert "iter_0000004" in message
        assert "Read-only file system" in message
    assert complete_iterations(disk) == [2]
    with pytest.raises(OSError, match=r"save=.*: cannot write there \(Read-only file system\); choose another"):
        prepare_run_folder(RunConfig.from_flat(settings))


def _train_on_a_disk_that_does_not_answer(rank: int, world_size: int, flat: dict[str, Any], pipe: str) -> None:
    """The file of rank 1 is a pipe without a reader: opening it blocks in the system, as a lost server's files do."""

    def stuck(*args: Any) -> None:
        os.open(pipe, os.O_WRONLY)

    if rank == 1:
        writer._write = stuck

    def act(trainer: Trainer) -> None:
        for _ in range(2):
            trainer._step()
        trainer.watchdog._limit_s = HANG_S  # what came before takes longer on a machine that has a lot else to do
        trainer.save()

    with_trainer(flat, act)


def test_a_disk_that_does_not_answer_ends_the_run(settings: dict[str, Any], tmp_path: Path) -> None:
    """Both ranks leave after the limit and say in which save they stood."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(RankError):
        run_ranks(_train_on_a_disk_that_does_not_answer, 2, settings, str(pipe))
    reports = [path.read_text() for path in (tmp_path / "hang").glob("rank-*.txt")]
    assert all("no progress for 15 s in save of iteration 2" in report for report in reports)
    assert any("in stuck" in report for report in reports)
    assert not complete_iterations(tmp_path / "checkpoints")
