"""Recorded numbers of the published code, through the project's converter and the pipeline schedule, in many layouts.

The same rows as tools/check_parity.py prints: losses, hidden states and gradients of every case, ten optimizer steps,
sampling, greedy generation; `reference` losses.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch.distributed as dist

from megatron_ross.config.schema import RunConfig
from megatron_ross.parity.fixture import load_fixture
from megatron_ross.parity.main import CHECKS, check_model
from megatron_ross.platform import ensure_platform, quieten
from tests.helpers import golden
from tests.helpers.distributed import run_ranks

QUICK = ("cases", "trajectories")
LEAST_ROWS = {"cases": 400, "trajectories": 200, "sampling": 4, "generation": 2}

LAYOUTS: dict[str, tuple[int, tuple[str, ...], dict[str, Any]]] = {
    # name: (ranks, checks, settings)
    "tp1pp1": (1, tuple(CHECKS), {"layout": "VEt*4NDH"}),
    "tp1pp1, both samples in a microbatch": (1, ("cases",), {"layout": "VEt*4NDH", "micro_batch_size": 2}),
    "dp2": (2, QUICK, {"layout": "VEt*4NDH"}),
    "vpp2": (2, QUICK, {"layout": "VEt|t|t|tNDH", "pipeline_model_parallel_size": 2}),
    "tp2pp2": (
        4,
        (*QUICK, "generation"),
        {"layout": "V|Et*4NDH", "pipeline_model_parallel_size": 2, "tensor_model_parallel_size": 2},
    ),
    "tp2pp2 with sequence parallelism": (
        4,
        QUICK,
        {
            "layout": "VEt*3|tNDH",
            "pipeline_model_parallel_size": 2,
            "tensor_model_parallel_size": 2,
            "sequence_parallel": True,
            "micro_batch_size": 2,
        },
    ),
    "pp4, D and H apart": (4, (*QUICK, "generation"), {"layout": "VE|t*2|t*2ND|H", "pipeline_model_parallel_size": 4}),
}


def compare_with_recorded(
    rank: int, world_size: int, model: str, flat: dict[str, Any], checks: tuple[str, ...]
) -> list[tuple[str, bool, str]]:
    """(name, ok, row) of everything compared; on rank 0."""
    quieten()
    ensure_platform()
    run = RunConfig.from_flat({"loss_mode": "reference", **flat})
    parallel = run.parallel
    dp = dist.get_world_size() // (parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size)
    size = run.data.micro_batch_size * dp * parallel.pipeline_model_parallel_size
    run = replace(run, data=replace(run.data, global_batch_size=size))
    (fixture,) = load_fixture(golden.GOLDEN, model)
    return [(row.name, row.ok, str(row)) for row in check_model(fixture, run, checks)]


@pytest.mark.parametrize("model", golden.MODELS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_recorded_numbers(layout: str, model: str) -> None:
    ranks, checks, flat = LAYOUTS[layout]
    rows = run_ranks(compare_with_recorded, ranks, model, flat, checks, timeout_s=300)[0]
    assert [text for _, ok, text in rows if not ok] == []
    assert len({name for name, _, _ in rows}) == len(rows) >= sum(LEAST_ROWS[check] for check in checks)
