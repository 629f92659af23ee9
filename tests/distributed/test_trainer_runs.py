"""Runs of the real Trainer: random draws belong to samples, and a resumed run goes on as if it had not stopped.

Timesteps, noise and posterior noise are functions of seed, epoch, sample and image, so the loss curve of a run is the
same in every layout, for every data-parallel size and microbatch size, and across a change of layout at a checkpoint.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ross.checkpoint.manifest import resolve_checkpoint
from megatron_ross.checkpoint.reader import MODEL_PREFIXES, open_checkpoint, read_index
from tests.helpers.distributed import run_ranks
from tests.helpers.runs import relative
from tests.helpers.toy_run import curve, write_data
from tests.helpers.variants import Stored, make_variant

STEPS, SAVED_AT = 20, 3
RESUMED_STEPS = 3

TP1PP1 = {"layout": "VEt*4NDH"}
TP2PP2 = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "layout": "V|Et*4NDH"}
PP4 = {"pipeline_model_parallel_size": 4, "layout": "VE|t*2|t*2ND|H"}
TP2SP = {"tensor_model_parallel_size": 2, "sequence_parallel": True, "layout": "VEt*4NDH"}
VPP2 = {"pipeline_model_parallel_size": 2, "layout": "VEt|t|t|tNDH"}
STAGE1_TP2PP2 = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "layout": "VEt*2|t*2NDH"}


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Stored:
    return make_variant(tmp_path_factory.mktemp("model"), "qwen2_siglip")


@pytest.fixture(scope="module")
def settings(stored: Stored, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return {
        **write_data(tmp_path_factory.mktemp("data")),
        "init_from": str(stored.path),
        "seq_length": 256,
        "micro_batch_size": 1,
        "global_batch_size": 8,
        "lr": 2e-4,
        "lr_warmup_fraction": 0.1,
        "train_iters": STEPS,
        "seed": 5,
        "tensorboard": False,
    }


@pytest.fixture(scope="module")
def alone(settings: dict[str, Any]) -> dict[str, Any]:
    """The run that all others are compared with: one process."""
    (result,) = run_ranks(curve, 1, settings | TP1PP1, STEPS)
    losses = torch.tensor(result["losses"])
    assert losses[0, :2].min() > 0.5
    assert losses[-1, 0] < 0.98 * losses[0, 0]  # it does train
    assert len(set(losses[:, 1].tolist())) == STEPS  # the draws do change
    return result


@pytest.mark.parametrize(
    ("ranks", "flat"),
    [
        pytest.param(1, TP1PP1 | {"micro_batch_size": 4}, id="micro_batch_size 4"),
        pytest.param(2, TP1PP1 | {"micro_batch_size": 2}, id="dp2"),
        pytest.param(4, TP2PP2, id="tp2pp2"),
        pytest.param(4, PP4, id="pp4"),
    ],
)
def test_random_runs_are_the_same_in_every_layout(
    ranks: int,
    flat: dict[str, Any],
    alone: dict[str, Any],
    settings: dict[str, Any],
) -> None:
    got = run_ranks(curve, ranks, settings | flat, STEPS)[0]
    assert got["digest"] == alone["digest"]
    for step, (ours, expected) in enumerate(zip(got["losses"], alone["losses"], strict=True)):
        assert ours[:2] == pytest.approx(expected[:2], rel=1e-5), f"step {step}"


@pytest.fixture(scope="module", params=["stage1", "stage2"])
def saved(
    request: pytest.FixtureRequest,
    settings: dict[str, Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """A run on TP2 x PP2 that saves and goes on: (its layout, settings to resume with, what it did after the save).

    Stage 1 saves what it trains, asynchronously; stage 2 saves everything, in the foreground.
    """
    folder = tmp_path_factory.mktemp("run")
    is_stage1 = request.param == "stage1"
    layout = STAGE1_TP2PP2 if is_stage1 else TP2PP2
    flat = settings | {"freeze_language_model": is_stage1, "lr": 1e-3}
    flat |= {"async_save": is_stage1, "save_trainable_only": is_stage1}
    run_ranks(curve, 4, flat | layout | {"save": str(folder)}, SAVED_AT, save=True)
    whole = run_ranks(curve, 4, flat | layout, SAVED_AT + RESUMED_STEPS)[0]
    return layout, flat | {"load": str(folder), "init_from": ""}, whole


def test_resume_in_the_same_layout_is_bitwise(saved: Any) -> None:
    layout, flat, whole = saved
    got = run_ranks(curve, 4, flat | layout, RESUMED_STEPS)[0]
    assert got["iteration"] == SAVED_AT + RESUMED_STEPS
    assert got["losses"] == whole["losses"][SAVED_AT:]
    assert got["digest"] == whole["digest"]
    assert sorted(got["parameters"]) == sorted(whole["parameters"])
    assert all(torch.equal(got["parameters"][name], t) for name, t in whole["parameters"].items())


@pytest.mark.parametrize(
    ("ranks", "flat"),
    [
        pytest.param(4, PP4, id="pp4"),
        pytest.param(4, TP2SP, id="tp2 sp dp2"),
        pytest.param(2, TP1PP1, id="dp2"),
        pytest.param(2, VPP2, id="pp2 vpp2"),
        pytest.param(1, TP1PP1 | {"micro_batch_size": 2}, id="one process"),
    ],
)
def test_resume_in_another_layout(ranks: int, flat: dict[str, Any], saved: Any) -> None:
    _, resume, whole = saved
    got = run_ranks(curve, ranks, resume | flat, RESUMED_STEPS)[0]
    assert got["digest"] == whole["digest"]
    for ours, expected in zip(got["losses"], whole["losses"][SAVED_AT:], strict=True):
        assert ours == pytest.approx(expected, rel=1e-4)
        assert ours[:2] == pytest.approx(expected[:2], rel=2e-5)
    assert sorted(got["parameters"]) == sorted(whole["parameters"])
    for name, expected in whole["parameters"].items():
        # Adam turns the rounding noise of the k part of this bias, whose gradient is zero, into updates.
        if not name.endswith("attn.qkv.bias"):
            assert relative(got["parameters"][name], expected) < 1e-3, name


def test_resume_with_more_tensor_parallelism(alone: dict[str, Any], settings: dict[str, Any], tmp_path: Path) -> None:
    """Saved by one process, resumed on TP2 with sequence parallelism."""
    run_ranks(curve, 1, settings | TP1PP1 | {"save": str(tmp_path)}, SAVED_AT, save=True)
    got = run_ranks(curve, 2, settings | TP2SP | {"load": str(tmp_path), "init_from": ""}, RESUMED_STEPS)[0]
    assert got["iteration"] == SAVED_AT + RESUMED_STEPS
    for ours, expected in zip(got["losses"], alone["losses"][SAVED_AT : got["iteration"]], strict=True):
        assert ours == pytest.approx(expected, rel=1e-4)
        assert ours[:2] == pytest.approx(expected[:2], rel=2e-5)


def test_the_layout_of_stage_1_has_a_rank_without_trainable_parameters(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    """Saved by PP4 in stage 1, whose middle ranks have nothing to save, and resumed there bitwise."""
    flat = settings | PP4 | {"layout": "VE|t*2|t*2|NDH", "freeze_language_model": True, "lr": 1e-3}
    run_ranks(curve, 4, flat | {"save": str(tmp_path)}, 2, save=True)
    whole = run_ranks(curve, 4, flat, 4)[0]
    resumed = run_ranks(curve, 4, flat | {"load": str(tmp_path), "init_from": ""}, 2)[0]
    assert resumed["losses"] == whole["losses"][2:]
    assert all(torch.equal(resumed["parameters"][name], t) for name, t in whole["parameters"].items())


def test_trainable_only_checkpoint_is_small_whole_and_resumes(settings: dict[str, Any], tmp_path: Path) -> None:
    """Stage 1 may leave the frozen weights to the checkpoint it started from."""
    flat = settings | STAGE1_TP2PP2 | {"freeze_language_model": True, "lr": 1e-3, "save_trainable_only": True}
    run_ranks(curve, 4, flat | {"save": str(tmp_path)}, 2, save=True)
    directory = resolve_checkpoint(tmp_path / "checkpoints")
    held = {key for key in read_index(directory).state_dict_metadata if key.startswith(MODEL_PREFIXES)}
    assert held
    assert all(key.startswith(("vision.projector.", "denoiser.")) for key in held)
    assert set(open_checkpoint(directory).keys()) == set(open_checkpoint(settings["init_from"]).keys())
    whole = run_ranks(curve, 4, flat, 4)[0]
    resumed = run_ranks(curve, 4, flat | {"load": str(tmp_path), "init_from": ""}, 2)[0]
    assert resumed["losses"] == whole["losses"][2:]
    assert all(torch.equal(resumed["parameters"][name], t) for name, t in whole["parameters"].items())


def test_stage_2_starts_from_a_trainable_only_checkpoint_of_stage_1(settings: dict[str, Any], tmp_path: Path) -> None:
    """`init_from` the run of stage 1: its projector and denoiser, all other weights of its base, a new optimizer."""
    stage1 = settings | STAGE1_TP2PP2 | {"freeze_language_model": True, "lr": 1e-3}
    stage1 |= {"async_save": True, "save_trainable_only": True, "save": str(tmp_path)}
    trained = run_ranks(curve, 4, stage1, 2, save=True)[0]["parameters"]
    # Stage 2 freezes the denoiser's position table, which stage 1 trains; `curve` returns what is trained.
    stage2 = settings | VPP2 | {"train_denoiser_position_table": True}
    untrained = run_ranks(curve, 2, stage2, 0)[0]["parameters"]
    start = run_ranks(curve, 2, stage2 | {"init_from": str(tmp_path)}, 0)[0]
    assert start["iteration"] == 0
    assert trained.keys() < start["parameters"].keys() == untrained.keys()
    for name, got in start["parameters"].items():
        assert torch.equal(got, trained.get(name, untrained[name])), name
    assert any(not torch.equal(t, untrained[name]) for name, t in trained.items())
