"""The planner's shares of peak rates against the benchmark that measured them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_ross.planner.hardware import GPUS
from megatron_ross.planner.timing import EFFICIENCY

RUN = "benchmarks/results/step_2_deep_h200.json"
DTYPES = {"denoiser": "tf32", "vae": "tf32"}


@pytest.mark.parametrize("part", EFFICIENCY)
def test_shares_of_the_peak_are_the_measured_ones(part: str, repository: Path) -> None:
    """Within 0.04: the parts of one step, with the GPU waited for at every border."""
    figures = json.loads((repository / RUN).read_text())["stages"]["2"]
    seconds = figures["rows"]["ours"]["part_seconds"][part]
    share = figures["part_flops"][part] / seconds / GPUS["h200"].peak_flops(DTYPES.get(part, "bf16"))
    assert pytest.approx(share, abs=0.04) == EFFICIENCY[part]
