"""Train Ross or LLaVA on Megatron Core: one rank, or as many as torchrun starts. Settings are flags and YAML keys.

    torchrun --nproc-per-node 8 -m megatron_ross.cli train --config recipe:shared/stage1 \\
        --config recipe:ross/pretrain_siglip_qwen2 --config recipe:layouts/8xh100-stage1
    megatron-ross train --dry-run --world-size 8 --gpu h100 --config ...

A dry run is one process for any number of ranks: it checks configuration, checkpoint,
data and memory, prints the tables, and trains nothing; it exits 1 if something would stop the training.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from jsonargparse import ArgumentParser, Namespace

from megatron_ross.config.cli import ConfigError, parse_command
from megatron_ross.config.schema import RunConfig
from megatron_ross.planner.hardware import GPUS
from megatron_ross.training.main import main as train

DRY_RUN_SAMPLES = 1000
_ONLY_DRY = ("world_size", "gpu", "dry_run_samples")


def add_options(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("check a run without training (one process, no torchrun, no GPU)")
    add = group.add_argument
    add("--dry-run", action="store_true", help="check configuration, checkpoint, data and memory; train nothing")
    ranks = "ranks to check for; default: tensor- times pipeline-parallel size"
    add("--world-size", type=int | None, default=None, help=ranks)
    gpu = f"GPU whose memory must suffice: {', '.join(GPUS)}; default: the one that is here"
    add("--gpu", type=str | None, default=None, help=gpu)
    samples = f"samples to look at, spread over each source; 0 looks at all; default: {DRY_RUN_SAMPLES}"
    add("--dry-run-samples", type=int | None, default=None, help=samples)


def parse(argv: Sequence[str]) -> tuple[Namespace, RunConfig]:
    """Options of the dry run, and the run.

    Raises:
        ConfigError: as `parse_command`; or an option of the dry run without it.
    """
    options, run = parse_command(__doc__.splitlines()[0], add_options, argv)
    if options.dry_run and not asks_for_dry_run(argv):
        raise ConfigError("dry_run=true: is no setting of a file; give the flag --dry-run")
    for name in _ONLY_DRY:
        value = getattr(options, name)
        if value is not None and not options.dry_run:
            raise ConfigError(f"{name}={value}: belongs to --dry-run; a training has the ranks that torchrun starts")
    return options, run


def asks_for_dry_run(argv: Sequence[str]) -> bool:
    return any(argument.replace("_", "-") == "--dry-run" for argument in argv)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0, 1 after one line that says what is wrong, or 130 if interrupted."""
    argv = list(sys.argv[1:] if arguments is None else arguments)
    if asks_for_dry_run(argv):
        from megatron_ross.cli.dry_run import check

        return check(argv)
    return train(argv, lambda words: parse(words)[1])
