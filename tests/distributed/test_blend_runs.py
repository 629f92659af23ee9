"""Blends in real runs: the same samples for every data-parallel size and across a resume, counted by source."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_ross.training.trainer import Trainer
from tests.helpers.distributed import run_ranks
from tests.helpers.toy_run import curve, with_trainer, write_data
from tests.helpers.variants import make_variant

STEPS, SAVED_AT = 5, 2


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    stored = make_variant(tmp_path_factory.mktemp("model"), "qwen2_siglip")
    folders = [tmp_path_factory.mktemp(name) for name in ("first", "second")]
    sources = [write_data(folder, num_samples=n) for folder, n in zip(folders, (7, 16), strict=True)]
    return {
        "blend": [source | {"epochs": epochs} for source, epochs in zip(sources, (2, 0.5), strict=True)],
        "init_from": str(stored.path),
        "layout": "VEt*4NDH",
        "seq_length": 256,
        "micro_batch_size": 1,
        "global_batch_size": 4,
        "lr": 2e-4,
        "train_iters": STEPS,
        "seed": 5,
        "tensorboard": False,
    }


@pytest.mark.distributed
@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
def test_same_samples_with_another_data_parallel_size_and_after_a_resume(
    packing: bool, settings: dict[str, Any], tmp_path: Path
) -> None:
    flat = settings | {"packing": packing}
    (whole,) = run_ranks(curve, 1, flat, STEPS)
    run_ranks(curve, 1, flat | {"save": str(tmp_path)}, SAVED_AT, save=True)
    resumed = run_ranks(curve, 2, flat | {"load": str(tmp_path), "init_from": ""}, STEPS - SAVED_AT)[0]
    assert resumed["digest"] == whole["digest"]
    for ours, expected in zip(resumed["losses"], whole["losses"][SAVED_AT:], strict=True):
        assert ours[:2] == pytest.approx(expected[:2], rel=2e-5)


def logged(rank: int, world_size: int, flat: dict[str, Any]) -> list[int]:
    """A whole run; samples consumed by source."""

    def act(trainer: Trainer) -> list[int]:
        trainer.train()
        return trainer.loader.consumed_by_source

    return with_trainer(flat, act)


@pytest.mark.distributed
def test_samples_of_each_source_are_logged(settings: dict[str, Any], tmp_path: Path) -> None:
    flat = settings | {"save": str(tmp_path), "log_interval": 1, "tensorboard": True}
    (consumed,) = run_ranks(logged, 1, flat)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [sum(line["samples_by_source"].values()) for line in lines] == [4, 8, 12, 16, 20]
    assert lines[-1]["samples_by_source"] == {"0_data": consumed[0], "1_data": consumed[1]}
    assert all(count > 0 for count in consumed)
    assert lines[-1]["bad_samples"] == {}


@pytest.mark.distributed
def test_a_resume_with_another_blend_is_refused(settings: dict[str, Any], tmp_path: Path) -> None:
    run_ranks(curve, 1, settings | {"save": str(tmp_path)}, 1, save=True)
    blend = [source | {"epochs": 1} for source in settings["blend"]]
    with pytest.raises(RuntimeError, match="consumed other samples"):
        run_ranks(curve, 1, settings | {"blend": blend, "load": str(tmp_path), "init_from": ""}, 1)
