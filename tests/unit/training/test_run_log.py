"""What a run sends to Weights & Biases, told by a stand-in for its client."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image

from megatron_ross.config.cli import ConfigError
from megatron_ross.config.schema import RunConfig
from megatron_ross.data.run_files import RunFiles
from megatron_ross.training.metrics import BrokenDownLosses, IntervalMetrics, RunLog, ValidationMetrics
from megatron_ross.training.samples import Answer, Samples

STEP = 10
LOSSES = BrokenDownLosses(recon_loss_by_timestep={"000-499": 0.5, "500-999": 0.25})


class StandIn(ModuleType):
    """The part of `wandb` that is used, with its signatures; remembers every call."""

    class Error(Exception):
        pass

    class Table:
        def __init__(self, *, columns: list[str], data: list[list[str]]) -> None:
            self.columns, self.data = columns, data

    class Image:
        def __init__(self, data_or_path: Any) -> None:
            self.pixels = np.asarray(data_or_path)

    def __init__(self) -> None:
        super().__init__("wandb")
        self.inits: list[dict[str, Any]] = []
        self.logged: list[tuple[int, dict[str, Any]]] = []
        self.finished = 0
        self.fails = False

    def init(self, *, project: str, id: str, config: dict[str, Any], dir: str, resume: str) -> StandIn:
        if self.fails:
            raise self.Error("api_key not configured\n(no-tty)")
        self.inits.append({"project": project, "id": id, "config": config, "dir": dir, "resume": resume})
        return self

    def log(self, data: dict[str, Any], step: int) -> None:
        self.logged.append((step, data))

    def finish(self) -> None:
        self.finished += 1


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    stand_in = StandIn()
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    return stand_in


def open_log(folder: Path, start_iteration: int = 0) -> RunLog:
    flat = {"save": str(folder), "wandb_project": "ross", "tensorboard": False, "lr": 0.125}
    return RunLog(RunConfig.from_flat(flat), RunFiles(), train_iters=100, start_iteration=start_iteration)


def interval() -> IntervalMetrics:
    numbers = dict.fromkeys(
        ("grad_norm", "learning_rate", "samples_per_second", "tokens_per_second", "tflops_per_rank"), 1.0
    )
    numbers |= dict.fromkeys(("seconds_per_iteration", "data_wait_seconds", "memory_gib", "save_stall_seconds"), 1.0)
    return IntervalMetrics(
        iteration=STEP,
        consumed_samples=80,
        lm_loss=2.0,
        recon_loss=0.75,
        skipped_iterations=0,
        bad_samples={"bad": 3},
        samples_by_source={},
        losses=LOSSES,
        **numbers,
    )


def validation() -> ValidationMetrics:
    return ValidationMetrics(STEP, 80, 1.5, 0.5, LOSSES, 8, 64, 8, 1.0, {})


def test_everything_is_sent(wandb: StandIn, tmp_path: Path) -> None:
    log = open_log(tmp_path)
    answer = Answer(7, ["a.png"], "What | is it?", "A cat", "A dog")
    picture = tmp_path / "painted later.png"
    log.write_validation(validation())
    log.write_samples(STEP, Samples([answer], picture, 0.5))
    assert not any("samples/pictures" in values for _, values in wandb.logged)
    Image.new("RGB", (8, 4), "red").save(picture)
    log.write(interval())
    log.close(100)
    (init,) = wandb.inits
    assert (init["project"], init["dir"], init["resume"]) == ("ross", str(tmp_path), "allow")
    assert init["config"]["lr"] == 0.125
    assert init["id"] == (tmp_path / "wandb-id").read_text().strip()
    assert {step for step, _ in wandb.logged} == {STEP}  # one step there: it may not go back
    sent = {name: value for _, values in wandb.logged for name, value in values.items()}
    assert (sent["train/lm_loss"], sent["valid/lm_loss"]) == (2.0, 1.5)
    assert sent["train/recon_loss_by_timestep/500-999"] == 0.25
    assert sent["train/bad_samples/bad"] == 3
    table, image = sent["samples/answers"], sent["samples/pictures"]
    assert table.columns == ["sample_id", "images", "question", "expected", "answer"]
    assert table.data == [["7", "['a.png']", "What | is it?", "A cat", "A dog"]]
    assert image.pixels.shape[2] == 3
    assert wandb.finished == 1


def test_the_last_pictures_of_a_run_that_was_stopped(wandb: StandIn, tmp_path: Path) -> None:
    """They are of the step it came to: the resumed run could send nothing that is before another step."""
    log = open_log(tmp_path)
    picture = tmp_path / "painted later.png"
    log.write_samples(STEP, Samples([], picture, 0.5))
    Image.new("RGB", (8, 4), "red").save(picture)
    log.close(STEP + 1)
    assert [step for step, _ in wandb.logged] == [STEP + 1]


def test_a_resumed_run_goes_on_with_the_same_run(wandb: StandIn, tmp_path: Path) -> None:
    for folder, start in ((tmp_path / "a", 0), (tmp_path / "a", STEP), (tmp_path / "b", 0)):
        open_log(folder, start).close(start)
    first, second, other = (init["id"] for init in wandb.inits)
    assert first == second != other


def test_a_failed_start_is_one_line(wandb: StandIn, tmp_path: Path) -> None:
    wandb.fails = True
    with pytest.raises(ConfigError, match=r"^wandb_project='ross': .*api_key not configured \(no-tty\); log in .*$"):
        open_log(tmp_path)
