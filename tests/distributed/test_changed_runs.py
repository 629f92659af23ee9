"""Real runs whose settings change at a checkpoint do what their settings say, or are refused in one line."""

from __future__ import annotations

import contextlib
import io
import json
import signal
from pathlib import Path
from typing import Any

import pytest

from megatron_ross.checkpoint.manifest import Manifest, resolve_checkpoint
from megatron_ross.training import trainer as trainer_module
from megatron_ross.training.lease import LEASE_NAME
from megatron_ross.training.trainer import Trainer
from tests.helpers.distributed import run_ranks
from tests.helpers.started_ranks import started_ranks
from tests.helpers.toy_run import two_stage_settings, with_trainer

pytestmark = pytest.mark.distributed

NUM_SAMPLES = 29
ONE = {"pipeline_model_parallel_size": 1, "layout": "VEt*4NDH"}
EXIT_S = 120.0


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    more = {"train_iters": 10, "log_interval": 1, "min_lr": 1e-5, "mm_projector_lr": 3e-3, "lr_warmup_fraction": 0.2}
    return two_stage_settings(tmp_path_factory.mktemp("run")) | more


def _train(rank: int, world_size: int, flat: dict[str, Any], steps: int | None = None) -> dict[str, Any]:
    """Steps (None: all that are left), then a save; what they were, and what was printed at the start."""

    def act(trainer: Trainer) -> dict[str, Any]:
        with contextlib.redirect_stdout(io.StringIO()) as out:
            trainer._announce()
        rows = []
        while trainer.iteration < trainer.train_iters and len(rows) != steps:
            rates = sorted({group["lr"] for group in trainer.optimizer.param_groups if group["params"]})
            result, _ = trainer._step()
            rows.append((trainer.iteration, rates, result.lm_loss, result.recon_loss))
        if trainer.folder is not None:
            trainer.save(is_last=True)
        state = trainer.loader.state_dict()
        return {"rows": rows, "said": out.getvalue(), "data": state, "train_iters": trainer.train_iters}

    return with_trainer(flat, act)


def _train_as_before(rank: int, world_size: int, flat: dict[str, Any], steps: int) -> dict[str, Any]:
    """A checkpoint as versions wrote it that counted iterations: with a schedule, without a record of progress."""
    state_of, record_of = trainer_module.training_state, trainer_module.record_of
    scheduler = {
        "max_lr": flat["lr"],
        "lr_warmup_steps": 2,
        "num_steps": steps,
        "lr_decay_style": "cosine",
        "lr_decay_steps": flat["train_iters"],
        "min_lr": flat["min_lr"],
        "start_wd": 0.0,
        "end_wd": 0.0,
        "wd_incr_style": "constant",
        "wd_incr_steps": flat["train_iters"],
    }
    trainer_module.training_state = lambda *args, **kwargs: {**state_of(*args, **kwargs), "scheduler": scheduler}
    trainer_module.record_of = lambda *args: {}
    try:
        return _train(rank, world_size, flat, steps)
    finally:
        trainer_module.training_state, trainer_module.record_of = state_of, record_of


@pytest.fixture(scope="module")
def whole(settings: dict[str, Any]) -> dict[str, Any]:
    (result,) = run_ranks(_train, 1, settings | ONE)
    assert [row[0] for row in result["rows"]] == list(range(1, 11))
    return result


@pytest.fixture(scope="module", params=["now", "before"])
def stopped(request: pytest.FixtureRequest, settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped after four of ten steps, of this version and of those before."""
    folder = tmp_path_factory.mktemp("stopped")
    action = _train if request.param == "now" else _train_as_before
    run_ranks(action, 1, settings | ONE | {"save": str(folder)}, 4)
    saved = Manifest.read(resolve_checkpoint(folder / "checkpoints")).training["progress"]
    assert saved == ({"batch_sizes": [[0, 0, 4]]} if request.param == "now" else {})
    return folder


def test_nothing_changes_where_nothing_is_changed(
    stopped: Path, whole: dict[str, Any], settings: dict[str, Any]
) -> None:
    (got,) = run_ranks(_train, 1, settings | ONE | {"load": str(stopped), "init_from": ""})
    assert got["rows"] == whole["rows"][4:]
    assert got["data"] == whole["data"]
    assert "settings that differ" not in got["said"]


CHANGED = {
    "lr": 5e-4,
    "min_lr": 1e-4,
    "mm_projector_lr": 7e-4,
    "lr_decay_style": "linear",
    "lr_warmup_iters": 3,
    "train_iters": 12,
}


def test_the_schedule_is_that_of_the_settings_and_what_differs_is_printed(
    stopped: Path, settings: dict[str, Any]
) -> None:
    """Peak, minimum, warm-up, length, style and a module's own rate: none of them is the checkpoint's."""
    flat = settings | ONE | {"load": str(stopped), "init_from": ""} | CHANGED
    (got,) = run_ranks(_train, 1, flat)
    expected = []
    for iteration in range(4, 12):
        share = 1 - (iteration - 3) / (12 - 3)
        expected.append([1e-4 + share * (5e-4 - 1e-4), 1.4e-4 + share * (7e-4 - 1.4e-4)])
    assert [row[0] for row in got["rows"]] == list(range(5, 13))
    for (_, rates, *_), wanted in zip(got["rows"], expected, strict=True):
        assert rates == pytest.approx(wanted, rel=1e-9)
    (line,) = (line for line in got["said"].splitlines() if line.startswith("settings that differ"))
    assert line == (
        "settings that differ from the checkpoint's: lr 0.001 -> 0.0005; min_lr 1e-05 -> 0.0001; "
        "mm_projector_lr 0.003 -> 0.0007; lr_decay_style 'cosine' -> 'linear'; lr_warmup_iters None -> 3; "
        "train_iters 10 -> 12"
    )


def test_runs_that_change_no_weight_say_so(stopped: Path, settings: dict[str, Any]) -> None:
    """One at learning rate 0, unless a module has its own, and one that has nothing left to do."""
    flat = settings | ONE | {"load": str(stopped), "init_from": "", "min_lr": 0.0}
    still = flat | {"lr": 0.0, "mm_projector_lr": None, "train_iters": 4}
    (got,) = run_ranks(_train, 1, still)
    assert "nothing is left to train" in got["said"]
    assert "warning: lr=0: every learning rate is 0" in got["said"]
    assert got["rows"] == []
    (got,) = run_ranks(_train, 1, still | {"mm_projector_lr": 1e-4, "train_iters": 5})
    assert "warning" not in got["said"]
    assert "nothing is left" not in got["said"]
    assert len(got["rows"]) == 1


@pytest.mark.parametrize(
    ("ranks", "change"),
    [
        pytest.param(1, ONE | {"global_batch_size": 6, "micro_batch_size": 3}, id="one process"),
        pytest.param(2, ONE | {"global_batch_size": 10, "micro_batch_size": 1}, id="dp2"),
        pytest.param(2, {"global_batch_size": 2, "micro_batch_size": 2}, id="pp2"),
    ],
)
def test_batches_may_change_and_epochs_stay_epochs(
    ranks: int, change: dict[str, Any], settings: dict[str, Any], tmp_path: Path
) -> None:
    """Grouped by modality and length: neither samples nor their order change. Then back to the first sizes."""
    flat = {name: value for name, value in settings.items() if name != "train_iters"}
    flat |= {"num_epochs": 2, "group_by_modality_length": True, "micro_batch_size": 2}
    run_ranks(_train, 1, flat | ONE | {"save": str(tmp_path)}, 4)
    resumed = flat | change | {"save": str(tmp_path), "load": str(tmp_path)}
    size = change["global_batch_size"]
    first = run_ranks(_train, ranks, resumed, 2)[0]
    assert first["data"]["consumed_samples"] == 16 + 2 * size
    last = run_ranks(_train, 1, flat | ONE | {"save": str(tmp_path), "load": str(tmp_path)})[0]
    left = -(-(2 * NUM_SAMPLES - 16 - 2 * size) // 4)
    assert last["train_iters"] == 6 + left
    assert [row[0] for row in last["rows"]] == list(range(7, 7 + left))
    assert 2 * NUM_SAMPLES <= last["data"]["consumed_samples"] < 2 * NUM_SAMPLES + 4
    (straight,) = run_ranks(_train, 1, flat | ONE)
    if last["data"]["consumed_samples"] == straight["data"]["consumed_samples"]:
        assert last["data"]["digest"] == straight["data"]["digest"]
    assert all(min(row[1]) > 0 for row in first["rows"] + last["rows"])


def _ends(flat: dict[str, Any]) -> list[str]:
    """The last line of both ranks, which end with code 1 and write nothing to the run folder but their logs."""
    with started_ranks(2, flat) as ranks:
        for rank in range(2):
            code, _ = ranks.wait(rank, EXIT_S)
            assert code == 1, ranks.said(rank)
        lines = [ranks.said(rank).splitlines()[-1] for rank in range(2)]
        assert all("Traceback" not in ranks.said(rank) for rank in range(2))
    return lines


def _content(folder: Path) -> dict[str, bytes]:
    paths = (path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("log-"))
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def test_what_is_refused_is_refused_on_every_rank_before_anything_is_written(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    """A longer run without a learning rate for it, other trained parts, and another run in the same folder."""
    own = settings | {"train_iters": 2, "save": str(tmp_path), "load": str(tmp_path)}
    with started_ranks(2, own) as ranks:
        assert [ranks.wait(rank, EXIT_S)[0] for rank in range(2)] == [0, 0], ranks.said(0)
    before = _content(tmp_path)
    assert LEASE_NAME not in before
    for change, says in (
        ({"train_iters": 4}, "error: train_iters=4: the run to resume had ended after iteration 2"),
        (
            {"unfreeze_mm_vision_tower": True},
            "error: unfreeze_mm_vision_tower=True: the run to resume was trained",
        ),
        ({"load": ""}, f"error: save='{tmp_path}': holds checkpoints of another run"),
    ):
        flat = {name: value for name, value in (own | change).items() if value != ""}
        first, second = _ends(flat)
        assert first.startswith(says)
        assert second == f"rank 1: {first}"
        assert _content(tmp_path) == before
    with started_ranks(2, own | {"train_iters": 4, "lr_continue": "constant"}) as ranks:
        assert [ranks.wait(rank, EXIT_S)[0] for rank in range(2)] == [0, 0], ranks.said(0)
        assert "goes on after its end at iteration 2: learning rate by lr_continue=constant" in ranks.said(1)
    rates = [json.loads(line)["learning_rate"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rates[2:] == [settings["lr"]] * 2 or rates[2:] == [settings["mm_projector_lr"]] * 2


def test_two_runs_cannot_write_one_folder(settings: dict[str, Any], tmp_path: Path) -> None:
    """The second is refused while the first lives; when that was killed, nothing keeps it from starting."""
    flat = settings | {"train_iters": 100_000, "save": str(tmp_path), "load": str(tmp_path), "save_interval": 2}
    with started_ranks(2, flat) as first:
        first.wait_for_iteration(3)
        with started_ranks(2, flat, "log-second") as second:
            for rank in range(2):
                code, _ = second.wait(rank, EXIT_S)
                assert code == 1
            refused = [second.said(rank).splitlines()[-1] for rank in range(2)]
        assert f"error: cannot start in {tmp_path}: LeaseError: another run writes there, process " in refused[0]
        assert refused[1] == f"rank 1: {refused[0]}"
        assert all(process.is_alive() for process in first.processes)
        for rank in range(2):
            first.send(rank, signal.SIGKILL)
            first.wait(rank, EXIT_S)
    assert (tmp_path / LEASE_NAME).exists()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    with started_ranks(2, flat, "log-third") as third:
        third.wait_for_iteration(len(lines) + 2)
        third.send(0, signal.SIGTERM)
        assert third.wait(0, EXIT_S)[0] == 0, third.said(0)
    assert not (tmp_path / LEASE_NAME).exists()
