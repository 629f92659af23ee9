"""Activations that are computed again give the gradients of activations that are kept, and fewer are kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.batches import make_batch
from tests.helpers.distributed import run_ranks
from tests.helpers.runs import Outcome, one_step, open_session, worst_gradient
from tests.helpers.variants import Stored, make_variant

FULL = {"recompute_granularity": "full", "recompute_num_layers": 1}
SELECTIVE = {"recompute_granularity": "selective"}
WAYS = {
    "uniform": FULL | {"recompute_method": "uniform"},
    "uniform, by two": FULL | {"recompute_method": "uniform", "recompute_num_layers": 2},
    "block": FULL | {"recompute_method": "block"},
    "selective": SELECTIVE,
    "mlp": SELECTIVE | {"recompute_modules": ["mlp"]},
    "both parts": SELECTIVE | {"recompute_modules": ["core_attn", "mlp"]},
}
MEMORY_SAVERS = ("uniform", "block", "mlp", "both parts")
TP2PP2 = {
    "tensor_model_parallel_size": 2,
    "sequence_parallel": True,
    "pipeline_model_parallel_size": 2,
    "layout": "VEt*2|t*2NDH",
}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made: Stored = make_variant(tmp_path_factory.mktemp("model"), "qwen2_siglip")
    return made.path


def kept_bytes(rank: int, world_size: int, path: Path, flat: dict[str, Any]) -> tuple[Outcome, int]:
    """One step, and the bytes that autograd kept for its backward passes."""
    session = open_session(path, flat)
    storages: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    try:
        batches = session.microbatches(make_batch("mixed", session.model))
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            session.stages[0].backbone(batches[0])
        return session.step(batches), sum(storages.values())
    finally:
        session.close()


@pytest.fixture(scope="module")
def kept(path: Path) -> tuple[Outcome, int]:
    return run_ranks(kept_bytes, 1, path, {"micro_batch_size": 4})[0]


@pytest.mark.distributed
@pytest.mark.parametrize("way", WAYS)
def test_same_gradients_from_fewer_kept_bytes(way: str, path: Path, kept: tuple[Outcome, int]) -> None:
    expected, bytes_without = kept
    got, bytes_with = run_ranks(kept_bytes, 1, path, {"micro_batch_size": 4, **WAYS[way]})[0]
    assert (got.lm_loss, got.recon_loss) == (expected.lm_loss, expected.recon_loss)
    error, name = worst_gradient(got.gradients, expected.gradients)
    assert error < 1e-6, name
    if way in MEMORY_SAVERS:
        assert bytes_with < 0.97 * bytes_without


@pytest.mark.distributed
def test_stage_1_recomputes_frozen_layers(path: Path) -> None:
    flat = {"micro_batch_size": 4, "freeze_language_model": True}
    (plain,), (ours,) = (run_ranks(one_step, 1, path, "mixed", flat | way) for way in ({}, WAYS["uniform"]))
    error, name = worst_gradient(ours.gradients, plain.gradients)
    assert error < 1e-6, name


@pytest.mark.distributed
def test_recompute_in_a_layout(path: Path, kept: tuple[Outcome, int]) -> None:
    got = run_ranks(one_step, 4, path, "mixed", TP2PP2 | {"micro_batch_size": 4} | WAYS["uniform"])[0]
    error, name = worst_gradient(got.gradients, kept[0].gradients)
    assert error < 1e-4, name
