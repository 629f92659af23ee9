"""Both implementations store weights in the same dtype: in bf16, too, their losses stay together as they train."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from megatron_ross.platform import ensure_platform, quieten
from tests.helpers.distributed import run_ranks

NUM_STEPS = 3


def losses(rank: int, world_size: int, stage: int) -> list[list[tuple[float, float]]]:
    """(lm, reconstruction) of every step, of our row and of the peer's."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "benchmarks"))
    from step_rows import SEED, build_rows
    from step_samples import plan_steps
    from step_sizes import CAPTIONS, step_size

    quieten()
    ensure_platform()
    size = step_size("tiny")
    steps = plan_steps(size, size.seq_length[stage], CAPTIONS, NUM_STEPS, SEED)
    rows = build_rows(("ours", "peer"), size, stage, "bf16", False, 4, {}, steps)
    for packs in steps:
        for row in rows:
            row.run(packs, timed=False)
    return [row.losses for row in rows]


@pytest.mark.parametrize("stage", [1, 2])
def test_losses_in_bf16_stay_together(stage: int) -> None:
    ours, peer = run_ranks(losses, 1, stage)[0]
    assert len(ours) == NUM_STEPS
    assert ours[0] != ours[1]
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(peer), rtol=3e-5, atol=0)
