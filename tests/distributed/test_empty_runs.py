"""Runs whose data has nothing to train on end with the reason, on every rank alike; what is legitimate goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_ross.config.limits import LIMITS
from tests.helpers.distributed import run_ranks
from tests.helpers.toy_run import curve, train, two_stage_settings, with_trainer

FROZEN = {"freeze_language_model": True}
TP2 = {"pipeline_model_parallel_size": 1, "tensor_model_parallel_size": 2, "layout": "VEt*4NDH"}
LENIENT = {"max_mismatch_share": 1.0, "max_bad_sample_share": 1.0}


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return two_stage_settings(tmp_path_factory.mktemp("empty"))


def with_records(settings: dict[str, Any], path: Path, edit: Any) -> dict[str, Any]:
    """The same run on edited records."""
    records = json.loads(Path(settings["data_path"]).read_text())
    path.write_text(json.dumps([edit(record) for record in records]))
    return settings | {"data_path": str(path)}


def text_only(record: dict[str, Any]) -> dict[str, Any]:
    question, answer = record["conversations"]
    return {"conversations": [question | {"value": "What is it?"}, answer]}


def without_answer(record: dict[str, Any]) -> dict[str, Any]:
    question, answer = record["conversations"]
    return record | {"conversations": [question, answer | {"value": ""}]}


@pytest.mark.distributed
@pytest.mark.parametrize("layout", [{}, TP2], ids=["pp2", "tp2"])
@pytest.mark.parametrize("mode", ["token_mean", "reference"])
def test_text_alone_trains_nothing_in_stage_1(
    layout: dict[str, Any], mode: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    """29 samples, a batch of 4: an epoch of 8 steps, all with a gradient norm of exactly 0."""
    flat = with_records(settings, tmp_path / "text.json", text_only) | layout | FROZEN
    (tmp_path / "run").mkdir()  # as the entry point makes it
    flat |= {"loss_mode": mode, "max_empty_steps": 3, "num_epochs": 2, "save": str(tmp_path / "run")}
    errors = run_ranks(train, 2, flat)
    assert errors[0] == errors[1]
    assert "iterations 1 to 3 trained nothing" in errors[0]
    assert "gradient norm of exactly 0" in errors[0]
    assert not list((tmp_path / "run" / "checkpoints").glob("iter_*"))


@pytest.mark.distributed
def test_text_alone_trains_in_stage_2_and_now_and_then_in_stage_1(settings: dict[str, Any], tmp_path: Path) -> None:
    """The warm-up's first step, with learning rate 0, has a gradient; one sample in five has no image."""
    text = with_records(settings, tmp_path / "text.json", text_only)
    assert run_ranks(train, 2, text | {"train_iters": 3, "max_empty_steps": 1, "lr_warmup_iters": 2}) == ["", ""]
    (tmp_path / "run").mkdir()
    mixed = settings | FROZEN | {"global_batch_size": 1, "train_iters": 29, "save": str(tmp_path / "run")}
    assert run_ranks(train, 2, mixed | {"log_interval": 29}) == ["", ""]
    (line,) = (json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert line["empty_iterations"] == 6


@pytest.mark.distributed
def test_answers_that_are_all_masked_stop_although_images_train(settings: dict[str, Any], tmp_path: Path) -> None:
    flat = with_records(settings, tmp_path / "masked.json", without_answer) | LENIENT
    errors = run_ranks(train, 2, flat | {"num_epochs": 1})
    assert "iterations 1 to 8 trained nothing: the last one had no supervised token" in errors[0]
    assert errors[0] == errors[1]


def resumed_count(rank: int, world_size: int, flat: dict[str, Any]) -> int:
    return with_trainer(flat, lambda trainer: trainer.empty.total)


@pytest.mark.distributed
def test_the_count_survives_a_resume(settings: dict[str, Any], tmp_path: Path) -> None:
    flat = with_records(settings, tmp_path / "text.json", text_only) | FROZEN
    flat |= {"save": str(tmp_path / "run"), "load": str(tmp_path / "run"), "num_epochs": 2}
    run_ranks(curve, 2, flat, 5, True)
    assert run_ranks(resumed_count, 2, flat) == [5, 5]


@pytest.mark.distributed
def test_a_validation_without_anything_to_measure_stops(settings: dict[str, Any], tmp_path: Path) -> None:
    valid = with_records(settings, tmp_path / "valid.json", lambda record: without_answer(text_only(record)))
    flat = settings | {"valid_data_path": valid["data_path"], "eval_interval": 1, "train_iters": 2} | LENIENT
    errors = run_ranks(train, 2, flat)
    assert "validation has nothing to measure: its 29 held-out samples" in errors[0]
    assert errors[0] == errors[1]


@pytest.mark.distributed
@pytest.mark.parametrize("layout", [{}, TP2], ids=["pp2", "tp2"])
def test_the_largest_seed_trains(layout: dict[str, Any], settings: dict[str, Any]) -> None:
    """Orders, Megatron's random states, timesteps, noise, validation and a resume take it."""
    seed = int(LIMITS["seed"].high)
    grouped = {
        "group_by_modality_length": True,
        "valid_split": 0.2,
        "eval_interval": 1,
        "unfreeze_mm_vision_tower": True,
    }
    flat = settings | layout | grouped | {"train_iters": 2}
    assert run_ranks(train, 2, flat | {"seed": seed}) == ["", ""]
    ours, others = (run_ranks(curve, 2, flat | {"seed": s}, 1)[1]["losses"] for s in (seed, seed - 2**40))
    assert ours != others
