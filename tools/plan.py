"""Rank parallel layouts by predicted step time, without a GPU, weights or torch.

python tools/plan.py --config FILE --model qwen2-7b+siglip-so400m --world-size 64 --gpu h100

All settings of pretrain_ross.py are understood, too. The model comes from --model or from the checkpoint that the
configuration names; the table starts with the configuration as it is.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from megatron_ross.checkpoint.manifest import Manifest, resolve_checkpoint
from megatron_ross.config.cli import ConfigError, parse_run_config
from megatron_ross.config.model import RossModelConfig
from megatron_ross.config.schema import RunConfig
from megatron_ross.convert.known_models import known_model
from megatron_ross.planner.hardware import GPUS, known_gpu
from megatron_ross.planner.report import as_dict, table
from megatron_ross.planner.search import plan_run, search
from megatron_ross.planner.workload import Workload, default_workload
from megatron_ross.training.start import checkpoints_of


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--world-size", type=int, required=True, help="number of GPUs")
    parser.add_argument("--gpu", required=True, help=", ".join(GPUS))
    parser.add_argument("--model", help="LLM+TOWER, e.g. qwen2-7b+siglip-so400m; default: the configured checkpoint's")
    parser.add_argument("--llava", action="store_true", help="with --model: the baseline without reconstruction")
    parser.add_argument("--top", type=int, default=10, help="how many plans to print")
    parser.add_argument("--json", type=Path, help="write the printed plans to this file")
    workload = parser.add_argument_group("means over the data, per sample (default: assumed from the template)")
    workload.add_argument("--text-tokens", type=float)
    workload.add_argument("--supervised-tokens", type=float)
    workload.add_argument("--images", type=float)
    workload.add_argument("--padding", type=float, help="computed tokens per real token; 1 when samples are packed")
    return parser.parse_known_args(argv)


def model_of(options: argparse.Namespace, run: RunConfig) -> RossModelConfig:
    """The named model, or that of the checkpoint the run would start from."""
    if options.model:
        return known_model(options.model, reconstructs=not options.llava)
    start = run.training.load or run.training.init_from
    if not start:
        raise ConfigError("init_from='': name a checkpoint whose model to plan for, or give --model")
    return Manifest.read(resolve_checkpoint(checkpoints_of(start))).model


def workload_of(options: argparse.Namespace, run: RunConfig) -> Workload:
    given = {name: getattr(options, name) for name in ("text_tokens", "supervised_tokens", "images", "padding")}
    for name, value in given.items():
        if value is not None and value < (1 if name == "padding" else 0):
            raise ConfigError(f"{name}={value}: must be at least {1 if name == 'padding' else 0}")
    return replace(default_workload(run), **{name: value for name, value in given.items() if value is not None})


def main(argv: Sequence[str]) -> int:
    """0, or 1 after one line that says what is wrong."""
    options, rest = parse(argv)
    try:
        if options.world_size < 1 or options.top < 1:
            raise ConfigError(f"world_size={options.world_size}, top={options.top}: must be at least 1")
        run, gpu = parse_run_config(rest), known_gpu(options.gpu)
        model, workload = model_of(options, run), workload_of(options, run)
        plans = search(run, model, options.world_size, gpu, workload)[: options.top]
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"predicted for {options.world_size} x {gpu.name}, {workload}")
    try:
        print("as configured:\n" + table([plan_run(run, model, options.world_size, gpu, workload)], first_rank=0))
    except ConfigError as error:
        print(f"as configured: {error}")
    print(f"fastest that fit:\n{table(plans)}")
    if options.json:
        options.json.write_text(json.dumps([as_dict(plan) for plan in plans], indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
