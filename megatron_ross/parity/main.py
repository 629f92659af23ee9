"""Command line of tools/check_parity.py: options of the fixture, and any setting of a run for the layout."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch.distributed as dist
from jsonargparse import ArgumentParser

from megatron_ross.config.cli import ConfigError, build_parser, parse_flat
from megatron_ross.config.schema import RunConfig
from megatron_ross.parity.checks import check_cases, check_generation, check_sampling, check_trajectories
from megatron_ross.parity.compare import HEADER, Row
from megatron_ross.parity.fixture import FixtureError, FixtureModel, load_fixture
from megatron_ross.parity.runner import ImportedModel
from megatron_ross.training.main import start_process_group

Check = Callable[[FixtureModel, ImportedModel, RunConfig], Iterator[Row]]
CheckName = Literal["cases", "trajectories", "sampling", "generation"]
CHECKS: dict[str, Check] = {
    "cases": check_cases,
    "trajectories": check_trajectories,
    "sampling": check_sampling,
    "generation": check_generation,
}


def main(argv: Sequence[str]) -> int:
    """0 when every row is within its tolerance, 1 otherwise, on every rank alike."""
    try:
        settings = parse_flat(_parser(), argv)
        folder, model, checks = (settings.pop(name) for name in ("fixture", "model", "checks"))
        run = RunConfig.from_flat(settings)
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


def _parser() -> ArgumentParser:
    parser = build_parser("Compare this stack with recorded reference cases, in any layout.")
    parser.add_argument("--fixture", type=Path, required=True, help="directory with metadata.json and goldens/")
    parser.add_argument("--model", type=str | None, default=None, help="check only this model of the fixture")
    parser.add_argument("--checks", type=list[CheckName], default=list(CHECKS), help="which checks, as [a,b]")
    return parser


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


def check_model(fixture: FixtureModel, run: RunConfig, checks: Sequence[str] = tuple(CHECKS)) -> list[Row]:
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
