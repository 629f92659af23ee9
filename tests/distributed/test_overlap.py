"""Overlapped communication changes no number: losses of several steps and weights equal those without it.

Buckets of one parameter each put every gather and reduction on its own, as large models do: a gather that is forgotten,
late, or out of order on one rank then shows as a stale weight, a mismatched message or an assertion of Megatron's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ross.parity.gather import gather_parameters
from tests.helpers.batches import make_batch
from tests.helpers.distributed import run_ranks
from tests.helpers.runs import open_session
from tests.helpers.variants import Stored, make_variant, tied

STEPS = 3
REDUCE = {"overlap_grad_reduce": True}
BOTH = REDUCE | {"overlap_param_gather": True, "ddp_bucket_size": 1}
NO_IMAGE_ON_ONE_RANK = {"micro_batch_size": 4}
VPP2 = {"pipeline_model_parallel_size": 2, "layout": "VEt|t|t|tNDH", "micro_batch_size": 2}


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Stored:
    return make_variant(tmp_path_factory.mktemp("model"), "qwen2_siglip")


def several_steps(rank: int, world_size: int, path: Path, kind: str, flat: dict[str, Any]) -> dict[str, Any] | None:
    """Losses of each step and the weights after the last one, on rank 0."""
    session = open_session(path, flat)
    try:
        batches = session.microbatches(make_batch(kind, session.model))
        losses = []
        for _ in range(STEPS):
            losses.append(session.losses_and_gradients(batches))
            session.optimizer.prepare_grads()
            session.optimizer.step_with_ready_grads()
        losses.append(session.losses_and_gradients(batches))
        parameters = gather_parameters(session.stages, session.model, trainable_only=True)
    finally:
        session.close()
    return {"losses": losses, "parameters": parameters} if rank == 0 else None


def assert_same(ours: dict[str, Any], plain: dict[str, Any]) -> None:
    assert plain["losses"][-1] != plain["losses"][0]  # it does train
    for step, (got, expected) in enumerate(zip(ours["losses"], plain["losses"], strict=True)):
        assert got == pytest.approx(expected, rel=1e-6), f"step {step}"
    assert sorted(ours["parameters"]) == sorted(plain["parameters"])
    for name, expected in plain["parameters"].items():
        torch.testing.assert_close(ours["parameters"][name], expected, rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("kind", "flat"),
    [
        pytest.param("mixed", {}, id="stage 2"),
        pytest.param("mixed", {"freeze_language_model": True}, id="stage 1"),
        pytest.param("text_only_microbatches", NO_IMAGE_ON_ONE_RANK, id="a rank without images"),
        pytest.param(
            "text_only_microbatches",
            NO_IMAGE_ON_ONE_RANK | {"unfreeze_mm_vision_tower": True},
            id="a rank without images, trained tower",
        ),
    ],
)
def test_data_parallel(kind: str, flat: dict[str, Any], stored: Stored) -> None:
    plain = run_ranks(several_steps, 2, stored.path, kind, flat)[0]
    assert_same(run_ranks(several_steps, 2, stored.path, kind, flat | BOTH)[0], plain)
    if not flat:
        assert_same(run_ranks(several_steps, 2, stored.path, kind, REDUCE)[0], plain)


@pytest.mark.distributed
def test_interleaved_pipeline_with_tied_embeddings(tmp_path: Path) -> None:
    path = make_variant(tmp_path, "qwen2_siglip", tied).path
    plain = run_ranks(several_steps, 4, path, "text_only_microbatches", VPP2)[0]
    assert_same(run_ranks(several_steps, 4, path, "text_only_microbatches", VPP2 | BOTH)[0], plain)
