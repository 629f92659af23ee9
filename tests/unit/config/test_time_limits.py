"""Time limits of a run, from the shortest to the longest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_ross.config.cli import ConfigError
from megatron_ross.config.schema import RunConfig
from megatron_ross.config.validate import validate_run


def check(tmp_path: Path, **flat: Any) -> None:
    data = tmp_path / "a.json"
    data.touch()
    validate_run(RunConfig.from_flat({"data_path": str(data), "init_from": "x", **flat}), world_size=1)


@pytest.mark.parametrize(
    "flat",
    [
        {},
        {"hang_timeout_minutes": 0, "distributed_timeout_minutes": 0.1},
        {"hang_timeout_minutes": 0.5, "distributed_timeout_minutes": 0.6, "preemption_grace_seconds": 30},
    ],
)
def test_limits_that_fit(flat: dict[str, Any], tmp_path: Path) -> None:
    check(tmp_path, **flat)


@pytest.mark.parametrize(
    ("flat", "message"),
    [
        ({"hang_timeout_minutes": 30}, r"hang_timeout_minutes=30.*below distributed_timeout_minutes=30"),
        ({"distributed_timeout_minutes": 10}, r"hang_timeout_minutes=20.*below distributed_timeout_minutes=10"),
        ({"distributed_timeout_minutes": 0, "hang_timeout_minutes": 0}, r"distributed_timeout_minutes=0.*above 0"),
        ({"hang_timeout_minutes": 1}, r"hang_timeout_minutes=1.*at least preemption_grace_seconds=120"),
    ],
)
def test_limits_that_do_not_fit(flat: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        check(tmp_path, **flat)
