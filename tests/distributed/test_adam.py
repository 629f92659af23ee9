"""The fused AdamW takes the steps of torch's plain one, keeps Megatron's groups, and is the one that was asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ross.checkpoint.optimizer_state import distributed_optimizers, parameter_slices
from tests.helpers.batches import make_batch
from tests.helpers.distributed import run_ranks
from tests.helpers.runs import open_session
from tests.helpers.variants import make_variant

RATES = {"lr": 1e-2, "mm_projector_lr": 2e-3, "weight_decay": 0.1, "adam_eps": 1e-3, "adam_beta2": 0.95}


def against_plain_adam(rank: int, world_size: int, path: Path, flat: dict[str, Any]) -> dict[str, Any]:
    """Two updates, also by torch's AdamW one tensor at a time; the largest difference, and what was used."""
    session = open_session(path, RATES | flat)
    try:
        (distributed,) = distributed_optimizers(session.optimizer)
        batches = session.microbatches(make_batch("mixed", session.model))
        pieces = {id(piece.main): piece.main for piece in parameter_slices(session.optimizer)}
        copies = {key: main.detach().clone() for key, main in pieces.items()}
        plain = torch.optim.AdamW(
            [
                {
                    "params": [copies[id(p)] for p in group["params"]],
                    "lr": group["lr"],
                    "weight_decay": group["weight_decay"],
                }
                for group in session.optimizer.param_groups
            ],
            betas=(0.9, 0.95),
            eps=1e-3,
            foreach=False,
        )
        for _ in range(2):
            session.losses_and_gradients(batches)
            session.optimizer.prepare_grads()
            for key, main in pieces.items():
                copies[key].grad = main.grad.detach().clone()
            plain.step()
            session.optimizer.step_with_ready_grads()
        return {
            "class": type(distributed.optimizer).__name__,
            "fused": distributed.optimizer.defaults.get("fused"),
            "rates": sorted({(group["max_lr"], group["wd_mult"]) for group in session.optimizer.param_groups}),
            "error": max(float((pieces[key] - copies[key]).abs().max()) for key in pieces),
        }
    finally:
        session.close()


@pytest.mark.distributed
@pytest.mark.parametrize("bf16", [False, True])
def test_fused_torch(bf16: bool, tmp_path: Path) -> None:
    path = make_variant(tmp_path, "qwen2_siglip").path
    for got in run_ranks(against_plain_adam, 2, path, {"bf16": bf16, "optimizer_impl": "torch"}):
        assert (got["class"], got["fused"]) == ("AdamW", True)
        assert got["rates"] == [(2e-3, 0.0), (2e-3, 1.0), (1e-2, 0.0), (1e-2, 1.0)]
        assert got["error"] < 1e-6
