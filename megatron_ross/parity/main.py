"""The rows of tools/check_parity.py, of every model of a fixture, and the verdict."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch.distributed as dist

from megatron_ross.config.cli import ConfigError
from megatron_ross.config.schema import RunConfig
from megatron_ross.parity.checks import check_cases, check_generation, check_sampling, check_trajectories
from megatron_ross.parity.command_line import CheckName
from megatron_ross.parity.compare import HEADER, Row
from megatron_ross.parity.fixture import FixtureError, FixtureModel, load_fixture
from megatron_ross.parity.runner import ImportedModel
from megatron_ross.training.main import start_process_group

Check = Callable[[FixtureModel, ImportedModel, RunConfig], Iterator[Row]]
CHECKS: dict[CheckName, Check] = {
    "cases": check_cases,
    "trajectories": check_trajectories,
    "sampling": check_sampling,
    "generation": check_generation,
}


def compare(folder: Path, model: str | None, checks: Sequence[CheckName], run: RunConfig) -> int:
    """0 when every row is within its tolerance, 1 otherwise, on every rank alike.

    Args:
        model: check only this one of the fixture.
        run: its settings are the layout's.
    """
    try:
        fixtures = load_fixture(folder, model)
        start_process_group(run.parallel.distributed_timeout_minutes)
        rows = [row for fixture in fixtures for row in check_model(fixture, _complete(run), checks)]
    except (ConfigError, FixtureError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    failed = sum(not row.ok for row in rows)
    verdict = [failed, len(rows)]
    dist.broadcast_object_list(verdict)
    if dist.get_rank() == 0:
        print(f"{verdict[1] - verdict[0]} passed, {verdict[0]} failed", flush=True)
    dist.destroy_process_group()
    return 1 if verdict[0] or not verdict[1] else 0


def _complete(run: RunConfig) -> RunConfig:
    """Reference losses, and a global batch size that passes the rules of a run."""
    tp, pp = run.parallel.tensor_model_parallel_size, run.parallel.pipeline_model_parallel_size
    if dist.get_world_size() % (tp * pp):
        raise ConfigError(f"world size {dist.get_world_size()}: must be a multiple of {tp} x {pp} (tensor x pipeline)")
    dp = dist.get_world_size() // (tp * pp)
    return replace(
        run,
        loss=replace(run.loss, loss_mode="reference"),
        data=replace(run.data, global_batch_size=run.data.micro_batch_size * dp * pp),
    )


def check_model(fixture: FixtureModel, run: RunConfig, checks: Sequence[CheckName] = tuple(CHECKS)) -> list[Row]:
    """All rows of one model, printed as they come; rows are on rank 0 only."""
    imported = ImportedModel(fixture)
    rows: list[Row] = []
    if dist.get_rank() == 0:
        print(HEADER, flush=True)
    for name in checks:
        for row in CHECKS[name](fixture, imported, run):
            rows.append(row)
            print(row, flush=True)
    imported.close()
    return rows
