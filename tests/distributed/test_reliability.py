"""Promises of long runs on two real ranks: asynchronous saves, faults of disks and files, NaN, repeated steps."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import math
import os
import shutil
import signal
import statistics
import time
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch

from megatron_ross.checkpoint import writer
from megatron_ross.checkpoint.agreement import CheckpointError
from megatron_ross.checkpoint.manifest import Manifest, iteration_dir, resolve_checkpoint, write_latest
from megatron_ross.checkpoint.reader import open_checkpoint
from megatron_ross.checkpoint.retention import complete_iterations
from megatron_ross.checkpoint.saver import SavedCheckpoint
from megatron_ross.training import spikes
from megatron_ross.training.trainer import Trainer, TrainingError
from tests.helpers.distributed import RankError, run_ranks
from tests.helpers.full_disk import full_disk
from tests.helpers.toy_run import curve, train, two_stage_settings, with_trainer, write_data

SLOW_DISK_S = 20.0  # longer than a step takes
SMALL_FILE = 50_000  # bytes; less than any rank's share
HANG_S = 15.0


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return two_stage_settings(tmp_path_factory.mktemp("run")) | {"train_iters": 6, "log_interval": 1}


def _train_on_a_slow_disk(rank: int, world_size: int, flat: dict[str, Any]) -> list[tuple[int, int]]:
    """Nothing is written before training has gone on: a checkpoint of live tensors would be a later one.

    Returns the iterations at the begin and at the end of every write. A save that blocks waits for the whole time.
    """
    spans = []

    def act(trainer: Trainer) -> list[tuple[int, int]]:
        write = writer._write

        def late(*args: Any) -> None:
            begin, limit = trainer.iteration, time.monotonic() + SLOW_DISK_S
            while begin == trainer.iteration < trainer.train_iters and time.monotonic() < limit:
                time.sleep(0.01)
            write(*args)
            spans.append((begin, trainer.iteration))

        writer._write = late
        trainer.train()
        return spans

    return with_trainer(flat, act)


def _train_and_time_saves(rank: int, world_size: int, flat: dict[str, Any]) -> list[tuple[float, float]]:
    """Of every save, seconds that training stood still, and seconds until it was done."""
    times = []

    def act(trainer: Trainer) -> list[tuple[float, float]]:
        checkpoints = trainer.checkpoints
        assert checkpoints is not None
        report = checkpoints._report

        def noted(saved: SavedCheckpoint) -> None:
            times.append((saved.stall_seconds, saved.total_seconds))
            report(saved)

        checkpoints._report = noted  # type: ignore[method-assign]
        trainer.train()
        return times

    return with_trainer(flat, act)


def _losses(folder: Path) -> list[tuple[Any, ...]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["iteration"], line["lm_loss"], line["recon_loss"], line["grad_norm"]) for line in lines]


def _stalls(folder: Path) -> float:
    """Seconds that training stood still for saves, by the log."""
    return sum(json.loads(line)["save_stall_seconds"] for line in (folder / "metrics.jsonl").read_text().splitlines())


@pytest.fixture(scope="module")
def whole(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that saves in the foreground."""
    folder = tmp_path_factory.mktemp("whole")
    assert run_ranks(train, 2, settings | {"save": str(folder), "save_interval": 2}) == ["", ""]
    return folder


def test_asynchronous_saves_change_nothing(whole: Path, settings: dict[str, Any], tmp_path: Path) -> None:
    """The same losses and checkpoints, although training went on while they were written; and old ones go."""
    flat = settings | {"save": str(tmp_path), "save_interval": 2, "async_save": True, "save_retain_last": 2}
    for first, second, _ in run_ranks(_train_on_a_slow_disk, 2, flat):  # the third is the last of the run
        assert 2 <= first[0] < first[1]
        assert 4 <= second[0] < second[1]
    assert _losses(tmp_path) == _losses(whole)
    assert all(_stalls(folder) > 0 for folder in (tmp_path, whole))
    assert complete_iterations(tmp_path / "checkpoints") == [4, 6]
    for iteration in (4, 6):
        name = f"checkpoints/iter_{iteration:07d}"
        ours, expected = open_checkpoint(tmp_path / name), open_checkpoint(whole / name)
        assert ours.keys() == expected.keys()
        assert all(torch.equal(ours.read(key), expected.read(key)) for key in ours.keys())  # noqa: SIM118
    assert not list((tmp_path / "checkpoints").glob("*.incomplete"))


def test_a_run_resumes_from_an_asynchronous_checkpoint(
    whole: Path, settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flat = settings | {"save": str(tmp_path), "async_save": True, "save_interval": 2}
    times = run_ranks(_train_and_time_saves, 2, flat)[0][:-1]  # nothing goes on beside the last one
    with capsys.disabled():
        print("".join(f"\nsave of {total:.2f} s: training stood still {stall:.2f} s" for stall, total in times))
    load = str(tmp_path / "checkpoints" / "iter_0000004")
    (got, _) = run_ranks(curve, 2, settings | {"load": load, "init_from": "", "verify_checkpoint": True}, 2)
    assert [tuple(row) for row in got["losses"]] == [row[1:] for row in _losses(whole)[4:]]


def _fill_disk_at(rank: int, world_size: int, flat: dict[str, Any], iteration: int) -> str:
    """No file of rank 1 may grow any more while the save of `iteration` begins; afterwards all is well again."""

    def act(trainer: Trainer) -> str:
        save = trainer.save

        def limited(**kwargs: Any) -> None:
            full = rank == 1 and trainer.iteration == iteration
            with full_disk(SMALL_FILE) if full else contextlib.nullcontext():
                save(**kwargs)
                if full and trainer.checkpoints is not None:
                    while trainer.checkpoints.is_writing:  # the writer meets the limit, too
                        continue

        trainer.save = limited  # type: ignore[method-assign]
        try:
            trainer.train()
        except CheckpointError as error:
            return str(error)
        return ""

    return with_trainer(flat, act)


@pytest.mark.parametrize("is_async", [False, True], ids=["foreground", "asynchronous"])
def test_training_goes_on_after_a_failed_save_if_asked_to(
    is_async: bool, whole: Path, settings: dict[str, Any], tmp_path: Path
) -> None:
    flat = settings | {"save": str(tmp_path), "save_interval": 2, "save_failure": "continue", "async_save": is_async}
    assert run_ranks(_fill_disk_at, 2, flat, 4) == ["", ""]
    assert complete_iterations(tmp_path / "checkpoints") == [2, 6]
    assert not list((tmp_path / "checkpoints").glob("*.incomplete"))
    assert _losses(tmp_path) == _losses(whole)


def test_the_last_checkpoint_must_be_written(settings: dict[str, Any], tmp_path: Path) -> None:
    """Also where it is one of the regular ones, and training would go on after any other."""
    flat = settings | {"save": str(tmp_path), "save_interval": 2, "train_iters": 4, "save_failure": "continue"}
    for message in run_ranks(_fill_disk_at, 2, flat, 4):
        assert "iter_0000004" in message
    assert complete_iterations(tmp_path / "checkpoints") == [2]


def test_training_stops_after_a_failed_asynchronous_save_by_default(settings: dict[str, Any], tmp_path: Path) -> None:
    flat = settings | {"save": str(tmp_path), "save_interval": 2, "async_save": True}
    for message in run_ranks(_fill_disk_at, 2, flat, 4):
        assert "iter_0000004" in message
        assert "File too large" in message
    assert complete_iterations(tmp_path / "checkpoints") == [2]


def _load_damaged(rank: int, world_size: int, flat: dict[str, Any]) -> str:
    try:
        with_trainer(flat, lambda trainer: None)
    except (CheckpointError, ValueError) as error:
        return str(error)
    return ""


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-50])


def _change_a_digit(path: Path) -> None:
    """Of a manifest: what is left is a good one of another iteration."""
    text = path.read_text()
    assert text.count('"iteration": 4') == 1
    path.write_text(text.replace('"iteration": 4', '"iteration": 5'))


@pytest.fixture(scope="module")
def saved_twice(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints of iterations 2 and 4."""
    folder = tmp_path_factory.mktemp("twice")
    assert run_ranks(train, 2, settings | {"save": str(folder), "save_interval": 2, "train_iters": 4}) == ["", ""]
    return folder


@pytest.mark.parametrize(
    ("victim", "damage", "says"),
    [
        pytest.param("__1_*.distcp", _flip, "is damaged", id="data, flipped bit"),
        pytest.param("__1_*.distcp", _cut, "", id="data, truncated"),
        pytest.param("__1_*.distcp", Path.unlink, "is missing", id="data, missing"),
        pytest.param(".metadata", _flip, "is damaged", id="index, flipped bit"),
        pytest.param("common.pt", _flip, "is damaged", id="common state, flipped bit"),
        pytest.param("manifest.json", _change_a_digit, "is damaged", id="manifest, changed digit"),
        pytest.param("manifest.json", _cut, "is not valid JSON", id="manifest, truncated"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_offered(
    victim: str, damage: Any, says: str, settings: dict[str, Any], saved_twice: Path, tmp_path: Path
) -> None:
    shutil.copytree(saved_twice, tmp_path, dirs_exist_ok=True)
    (path,) = resolve_checkpoint(tmp_path / "checkpoints").glob(victim)
    damage(path)
    flat = settings | {"load": str(tmp_path), "init_from": "", "verify_checkpoint": True}
    for message in run_ranks(_load_damaged, 2, flat):
        assert path.name in message
        assert says in message
        assert f"write 2 into {tmp_path / 'checkpoints' / 'latest_checkpointed_iteration.txt'}" in message


def test_a_run_goes_back_as_advised(whole: Path, settings: dict[str, Any], tmp_path: Path) -> None:
    """Its new checkpoints count as the newest, although later iterations are there, one of which cannot be read."""
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    root = tmp_path / "checkpoints"
    _cut(root / "iter_0000004" / "manifest.json")
    write_latest(root, 2)
    flat = settings | {"save": str(tmp_path), "load": str(root), "save_interval": 3, "save_retain_last": 1}
    flat |= {"verify_checkpoint": True}
    assert run_ranks(train, 2, flat) == ["", ""]
    assert complete_iterations(root) == [6]
    assert resolve_checkpoint(root) == iteration_dir(root, 6)
    assert _losses(tmp_path) == _losses(whole)


def _start(rank: int, world_size: int, flat: dict[str, Any], folders: list[str]) -> str:
    try:
        with_trainer(flat | {"load": folders[rank]}, lambda trainer: None)
    except CheckpointError as error:
        return str(error)
    return ""


def test_ranks_that_see_different_checkpoints_do_not_start(
    settings: dict[str, Any], saved_twice: Path, tmp_path: Path
) -> None:
    """As on a shared file system that shows one machine an old `latest`; where it lies may differ."""
    shutil.copytree(saved_twice, tmp_path, dirs_exist_ok=True)
    folders, flat = [str(saved_twice), str(tmp_path)], settings | {"lr_continue": "constant"}
    assert run_ranks(_start, 2, flat, folders) == ["", ""]
    write_latest(tmp_path / "checkpoints", 2)
    for message in run_ranks(_start, 2, flat, folders):
        assert "different checkpoints: rank 0 from" in message
        assert "iter_0000004, rank 1 from" in message
        assert "iter_0000002;" in message


def _poison(rank: int, world_size: int, flat: dict[str, Any], steps: dict[int, int]) -> str:
    """At iteration i, the LM loss of microbatch steps[i] is NaN; on the rank with the LM head alone."""

    def act(trainer: Trainer) -> str:
        stage = trainer.stages[-1]
        if stage.spec.has("H"):
            lm_loss, calls = stage.lm_loss, [0]

            def poisoned(hidden: torch.Tensor, batch: Any) -> torch.Tensor:
                iteration, microbatch = divmod(calls[0], 4)
                calls[0] += 1
                loss = lm_loss(hidden, batch)
                return loss * float("nan") if steps.get(iteration + 1) == microbatch else loss

            stage.lm_loss = poisoned
        try:
            trainer.train()
        except TrainingError as error:
            return str(error)
        return ""

    return with_trainer(flat, act)


def test_a_nan_is_skipped_by_all_ranks_and_its_samples_are_written_down(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    flat = settings | {"save": str(tmp_path), "skip_nonfinite_steps": 1}
    messages = run_ranks(_poison, 2, flat, {2: 3, 5: 1})
    first, second = (json.loads(line) for line in (tmp_path / "nonfinite.jsonl").read_text().splitlines())
    assert (first["iteration"], second["iteration"]) == (2, 5)
    (found,) = first["microbatches"]
    assert (found["rank"], found["loss"], found["microbatch"]) == (1, "lm", 3)
    assert len(found["sample_ids"]) == 1
    assert [row[0] for row in _losses(tmp_path)] == [1, 2, 3, 4]  # the second one ends the run
    for message in messages:
        assert "2 time(s)" in message
        assert str(second["microbatches"][0]["sample_ids"]) in message


def _digest(trainer: Trainer) -> str:
    """Of all parameters of this rank."""
    digest = hashlib.sha256()
    for stage in trainer.stages:
        for parameter in stage.parameters():
            digest.update(parameter.detach().numpy().tobytes())
    return digest.hexdigest()


def _break_step_3(rank: int, world_size: int, flat: dict[str, Any], fault: str) -> list[str]:
    """The first microbatch of rank 1 in the third step is broken; digests of the parameters after each step."""

    def act(trainer: Trainer) -> list[str]:
        stage, step, digests, fresh = trainer.stages[-1], trainer._step, [_digest(trainer)], [False]
        lm_loss = stage.lm_loss

        def broken(hidden: torch.Tensor, batch: Any) -> torch.Tensor:
            is_time, fresh[0] = fresh[0], False
            if is_time and fault == "gradient nan":
                hidden.register_hook(lambda gradient: gradient * float("nan"))
            loss = lm_loss(hidden, batch)
            return loss * float(fault.split()[1]) if is_time and fault.startswith("loss") else loss

        def counted() -> Any:
            fresh[0] = rank == 1 and trainer.iteration == 2
            result = step()
            digests.append(_digest(trainer))
            return result

        stage.lm_loss, trainer._step = broken, counted  # type: ignore[method-assign]
        trainer.train()
        return digests

    return with_trainer(flat, act)


@pytest.mark.parametrize("fault", ["loss nan", "loss inf", "gradient nan"])
@pytest.mark.parametrize("sizes", [{}, {"pipeline_model_parallel_size": 1, "layout": "VEt*4NDH"}], ids=["PP2", "DP2"])
def test_all_ranks_skip_what_is_not_finite_on_one(
    sizes: dict[str, Any], fault: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    """Nothing changes in that step on any rank, training goes on afterwards, and replicas stay the same."""
    flat = settings | sizes | {"save": str(tmp_path), "train_iters": 4, "skip_nonfinite_steps": 1}
    everyone = run_ranks(_break_step_3, 2, flat, fault)
    for _, first, second, third, fourth in everyone:  # the learning rate of the first step is 0
        assert first != second == third != fourth
    assert not sizes or everyone[0] == everyone[1]
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["skipped_iterations"] for line in lines] == [0, 0, 1, 1]
    (record,) = (json.loads(line) for line in (tmp_path / "nonfinite.jsonl").read_text().splitlines())
    assert record["iteration"] == 3
    if fault.startswith("loss"):
        assert [(found["rank"], found["loss"]) for found in record["microbatches"]] == [(1, "lm")]
    else:
        assert float(record["lm_loss"]) > 0
        assert record["grad_norm"] == "nan"
        assert {found["loss"] for found in record["microbatches"]} == {None}


class Attempts(NamedTuple):
    """Of four steps: calls of the backbone, losses, updates, output, and a row of sums and one of counts."""

    calls: int
    losses: list[float]
    updated: list[bool]
    output: str
    broken_down: list[list[float]] | None


def _count_attempts(rank: int, world_size: int, flat: dict[str, Any], broken: set[int]) -> Attempts:
    """Four steps, with NaN in these microbatches of the rank with the LM head."""

    def act(trainer: Trainer) -> Attempts:
        stage, calls = trainer.stages[-1], [0]
        backbone = stage.backbone

        def counted(batch: Any) -> torch.Tensor:
            calls[0] += 1
            hidden = backbone(batch)
            return hidden * float("nan") if calls[0] in broken and stage.spec.has("H") else hidden

        stage.backbone = counted
        with contextlib.redirect_stdout(io.StringIO()) as out:
            results = [trainer._step()[0] for _ in range(4)]
        losses, updated = [result.lm_loss for result in results], [result.updated for result in results]
        broken_down = None if stage.breakdown is None else stage.breakdown.sums.tolist()
        return Attempts(calls[0], losses, updated, out.getvalue(), broken_down)

    return with_trainer(flat, act)


def test_a_transient_error_is_computed_again(whole: Path, settings: dict[str, Any], tmp_path: Path) -> None:
    """Megatron's rerun state machine: the third of four steps is repeated, and its second result is the right one."""
    flat = settings | {"rerun_mode": "validate_results", "save": str(tmp_path)}
    for calls, losses, updated, *_ in run_ranks(_count_attempts, 2, flat, {9}):
        assert calls == 5 * 4
        assert all(updated)
        assert losses == [row[1] for row in _losses(whole)[:4]]
    assert "initial_run" in (tmp_path / "rejected_results.jsonl").read_text().lower()


def test_a_nan_that_comes_again_is_skipped(whole: Path, settings: dict[str, Any], tmp_path: Path) -> None:
    """Computed twice with the same result, it is the model's or the data's: nothing is updated, training goes on."""
    flat = settings | {"rerun_mode": "validate_results", "save": str(tmp_path), "skip_nonfinite_steps": 1}
    for calls, losses, updated, *_ in run_ranks(_count_attempts, 2, flat, {9, 13}):
        assert calls == 5 * 4
        assert updated == [True, True, False, True]
        assert losses[:2] == [row[1] for row in _losses(whole)[:2]]
        assert math.isnan(losses[2])
    first, second = (tmp_path / "rejected_results.jsonl").read_text().lower().splitlines()
    assert "initial_run" in first
    assert "first_rerun_reproducible" in second


def test_determinism_is_reported(whole: Path, settings: dict[str, Any]) -> None:
    """Every step is computed twice, with the same losses as without; on this machine both are equal to the last bit."""
    answers = run_ranks(_count_attempts, 2, settings | {"rerun_mode": "report_determinism_stats"}, set())
    for calls, losses, updated, *_ in answers:
        assert calls == 2 * 4 * 4
        assert all(updated)
        assert losses == [row[1] for row in _losses(whole)[:4]]
    report = [line for line in answers[0].output.splitlines() if "computed twice" in line]
    assert report == [
        "losses computed twice since the start: 2 samples, all identical",  # two ranks
        "losses computed twice since the start: 6 samples, all identical",
    ]


@pytest.fixture(scope="module")
def taken_apart(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Settings of a run on two sources that looks at its losses by timestep and by source."""
    flat = dict(settings)
    first = {name: flat.pop(name) for name in ("data_path", "image_folder")}
    second = write_data(tmp_path_factory.mktemp("second"))
    blend = [source | {"epochs": 1} for source in (first, second)]
    return flat | {"blend": blend, "log_timestep_buckets": 3, "log_source_losses": True}


@pytest.fixture(scope="module")
def undisturbed(taken_apart: dict[str, Any]) -> list[list[float]]:
    """Sums and counts of the rank with both heads, of steps that are computed once."""
    broken_down = run_ranks(_count_attempts, 2, taken_apart, set())[1].broken_down
    assert all(sum(row) > 0 for row in broken_down)
    return broken_down


@pytest.mark.parametrize(
    ("mode", "broken"),
    [("validate_results", {9}), ("report_determinism_stats", set())],
    ids=["one repeated", "all repeated"],
)
def test_repeated_steps_count_once_in_losses_taken_apart(
    mode: str, broken: set[int], undisturbed: list[list[float]], taken_apart: dict[str, Any], tmp_path: Path
) -> None:
    """Equal to the last bit; a NaN of the first attempt leaves nothing behind."""
    flat = taken_apart | {"rerun_mode": mode, "save": str(tmp_path)}
    got = run_ranks(_count_attempts, 2, flat, broken)[1]
    assert got.calls == (5 * 4 if broken else 2 * 4 * 4)
    assert got.broken_down == undisturbed


def test_a_skipped_step_counts_in_losses_taken_apart_as_in_the_whole(
    undisturbed: list[list[float]], taken_apart: dict[str, Any], tmp_path: Path
) -> None:
    """Once, and as what it was: the mean of its log interval is NaN."""
    flat = taken_apart | {"rerun_mode": "validate_results", "save": str(tmp_path), "skip_nonfinite_steps": 1}
    got = run_ranks(_count_attempts, 2, flat, {9, 13})[1]
    assert got.updated == [True, True, False, True]
    assert all(map(math.isnan, got.broken_down[0]))
    assert got.broken_down[1] == undisturbed[1]


def _inflate_step_3(rank: int, world_size: int, flat: dict[str, Any]) -> str:
    """Four steps, the third with a hundred times the LM loss; what is printed if two losses make a median."""

    def act(trainer: Trainer) -> str:
        stage = trainer.stages[-1]
        lm_loss = stage.lm_loss
        stage.lm_loss = lambda *args: lm_loss(*args) * (100 if trainer.iteration == 2 else 1)
        with mock.patch.object(spikes, "_AT_LEAST", 2), contextlib.redirect_stdout(io.StringIO()) as out:
            for _ in range(4):
                trainer._step()
        return out.getvalue()

    return with_trainer(flat, act)


def test_a_loss_that_jumps_is_warned_of(whole: Path, settings: dict[str, Any]) -> None:
    """Once, by one rank, with its iteration and the median before it."""
    median = statistics.median(row[1] + row[2] for row in _losses(whole)[:2])
    lines = "".join(run_ranks(_inflate_step_3, 2, settings)).splitlines()
    (warning,) = (line for line in lines if "a spike" in line)
    assert warning.startswith("warning: iteration 3: loss ")
    assert warning.endswith(f", {median:.4g} before: a spike")


def test_manifest_covers_every_file_of_a_checkpoint(whole: Path) -> None:
    directory = resolve_checkpoint(whole / "checkpoints")
    names = {path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()}
    assert set(Manifest.read(directory).files) == names - {"manifest.json"}


def _stop_in_step_3(rank: int, world_size: int, flat: dict[str, Any]) -> None:
    """Rank 1 is stopped by the system, as by a debugger or a machine out of memory."""

    def act(trainer: Trainer) -> None:
        for _ in range(2):
            trainer._step()
        trainer.watchdog._limit_s = HANG_S  # what came before takes longer on a machine that has a lot else to do
        if rank == 1:
            os.kill(os.getpid(), signal.SIGSTOP)
        trainer._step()

    with_trainer(flat, act)


def test_a_rank_that_stands_still_ends_the_run(settings: dict[str, Any], tmp_path: Path) -> None:
    """The other rank shows where it waits, names the silent one, and leaves: in seconds, not at the end of time."""
    with pytest.raises(RankError, match=r"(?s)rank 0 .*exit code 1"):
        run_ranks(_stop_in_step_3, 2, settings | {"save": str(tmp_path)})
    report = (tmp_path / "hang" / "rank-0.txt").read_text()
    assert "no progress for 15 s in iteration 3" in report
    assert "in _step" in report
    assert "ranks [1] do not answer" in report
