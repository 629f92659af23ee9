"""Rank parallel layouts by predicted step time, without a GPU, weights or torch.

megatron-ross plan --config FILE --model qwen2-7b+siglip-so400m --world-size 64 --gpu h100

All settings of `megatron-ross train` are understood, too. The model comes from --model or from the checkpoint that the
configuration names; the table starts with the configuration as it is.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from megatron_ross.cli.command import at_least_one, run_command
from megatron_ross.cli.models import MODEL_OPTION_HELP, model_of
from megatron_ross.config.cli import ConfigError, parse_command
from megatron_ross.config.schema import RunConfig
from megatron_ross.planner.hardware import GPUS, known_gpu
from megatron_ross.planner.report import as_dict, table
from megatron_ross.planner.search import plan_run, search
from megatron_ross.planner.workload import Workload, default_workload

WORKLOAD = ("text_tokens", "supervised_tokens", "images", "padding")


def add_options(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("--world-size", type=int, required=True, help="number of GPUs")
    add("--gpu", type=str, required=True, help=", ".join(GPUS))
    add("--model", type=str | None, default=None, help=MODEL_OPTION_HELP)
    add("--llava", action="store_true", help="with --model LLM+TOWER: the baseline without reconstruction")
    add("--top", type=int, default=10, help="how many plans to print")
    add("--json", type=Path | None, default=None, help="write the printed plans to this file")
    workload = parser.add_argument_group("means over the data, per sample (default: assumed from the template)")
    texts = ("tokens of text", "tokens that are trained on", "images")
    padding = "computed tokens per real token; 1 when samples are packed"
    for name, text in zip(WORKLOAD, (*texts, padding), strict=True):
        workload.add_argument(f"--{name.replace('_', '-')}", type=float | None, default=None, help=text)


def workload_of(options: Namespace, run: RunConfig) -> Workload:
    given = {name: getattr(options, name) for name in WORKLOAD}
    for name, value in given.items():
        if value is not None and value < (1 if name == "padding" else 0):
            raise ConfigError(f"{name}={value}: must be at least {1 if name == 'padding' else 0}")
    return replace(default_workload(run), **{name: value for name, value in given.items() if value is not None})


def main(arguments: Sequence[str] | None = None) -> int:
    """0, or 1 after one line that says what is wrong."""
    argv = sys.argv[1:] if arguments is None else arguments
    return run_command(lambda: plan(*parse_command(__doc__.splitlines()[0], add_options, argv)))


def plan(options: Namespace, run: RunConfig) -> int:
    """Print the tables. Raises ValueError, OSError."""
    at_least_one(options, "world_size", "top")
    gpu = known_gpu(options.gpu)
    model, workload = model_of(run, options.model, llava=options.llava), workload_of(options, run)
    plans = search(run, model, options.world_size, gpu, workload)[: options.top]
    print(f"predicted for {options.world_size} x {gpu.name}, {workload}")
    try:
        print("as configured:\n" + table([plan_run(run, model, options.world_size, gpu, workload)], first_rank=0))
    except ConfigError as error:
        print(f"as configured: {error}")
    print(f"fastest that fit:\n{table(plans)}")
    if options.json:
        options.json.write_text(json.dumps([as_dict(plan) for plan in plans], indent=1) + "\n")
    return 0
