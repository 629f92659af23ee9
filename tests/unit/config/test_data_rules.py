"""Rules between data settings: one line each, before any process group exists."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_ross.config.cli import ConfigError
from megatron_ross.config.schema import RunConfig
from megatron_ross.config.validate import validate_run

PACKED = {"packing": True, "sequence_parallel": True, "tensor_model_parallel_size": 4}


def check(folder: Path, **settings: Any) -> None:
    (folder / "a.json").touch()
    flat = {"data_path": str(folder / "a.json"), "init_from": "x", "global_batch_size": 8}
    validate_run(RunConfig.from_flat(flat | settings), world_size=4)


@pytest.mark.parametrize("change", [{"seq_length": 2048}, {"sequence_parallel": False}, {"packing": False}])
def test_packs_that_can_be_split_are_accepted(tmp_path: Path, change: dict[str, Any]) -> None:
    check(tmp_path, **PACKED | {"seq_length": 2046} | change)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            PACKED | {"seq_length": 2046},
            "seq_length=2046: packs of this length are split over tensor_model_parallel_size=4 ranks by "
            "sequence_parallel, so it must be a multiple; use 2044 or 2048",
        ),
        ({"packing_lookahead": 0}, "packing_lookahead=0: must be at least 1"),
        ({"num_workers": 0}, "num_workers=0: must be at least 1"),
        ({"num_prefetch_steps": -1}, "num_prefetch_steps=-1: must not be negative"),
        ({"max_bad_sample_share": 1.5}, "max_bad_sample_share=1.5: must be a share of the samples, from 0 to 1"),
        ({"max_mismatch_share": -0.1}, "max_mismatch_share=-0.1: must be a share of the samples, from 0 to 1"),
    ],
)
def test_every_mistake_is_one_line(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check(tmp_path, **settings)
    assert str(caught.value) == message
