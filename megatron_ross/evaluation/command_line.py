"""The options of `evaluate`, apart from what carries them out, so that `--help` and mistakes need no framework."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from megatron_ross.config.cli import parse_flat
from megatron_ross.evaluation.benchmarks import benchmarks
from megatron_ross.evaluation.options import DTYPES, TEMPLATES
from megatron_ross.evaluation.presets import FRAMEWORKS, PRESETS

MMVP_DECODINGS = ("greedy", "published")
POPE_PROMPTS = ("short", "plain")


def parse(arguments: Sequence[str] | None = None) -> Namespace:
    """The command line.

    Raises:
        ConfigError: an unknown option, a wrong value, or one that is missing. SystemExit: after --help.
    """
    parser = ArgumentParser(description="Evaluate a checkpoint on benchmarks.", exit_on_error=False, allow_abbrev=False)
    add = parser.add_argument
    add("--checkpoint", type=str, required=True, help="run folder, Megatron checkpoint, exported folder or hub id")
    add("--tasks", type=str, required=True, help=f"comma-separated: {', '.join(benchmarks())}; or a framework's own")
    add("--framework", choices=FRAMEWORKS, default=None, help="default: the one of the published figures")
    add("--preset", choices=tuple(PRESETS), default="default", help="how questions are put; see docs/evaluation.md")
    add(
        "--output",
        type=Path,
        default=Path("results"),
        help="folder for the table and the answers; calls for one checkpoint add to it",
    )
    add("--export-format", choices=("ross", "llava"), default="ross", help="of training checkpoints")
    add("--reuse", type=bool, default=True, help="take up what an earlier call into --output has scored or answered")
    add("--batch-size", type=int, default=8, help="questions at a time (VLMEvalKit: always one)")
    add("--limit", type=int | None, default=None, help="ask only so many questions of each task, for a try")
    add("--template", choices=TEMPLATES, default=None, help="default: the preset's")
    add("--device", type=str | None, default=None, help="default: the GPU if there is one")
    add("--dtype", choices=DTYPES, default=None, help="default: the preset's")
    add("--seed", type=int, default=42, help="of sampling, in built-in tasks")
    add("--mmvp-data", type=Path | None, default=None, help="built-in mmvp: the data set's folder")
    add("--decoding", choices=MMVP_DECODINGS, default=None, help="built-in mmvp; default: the preset's")
    add("--corrected-labels", type=bool, default=False, help="built-in mmvp: mend four published labels")
    add("--lenient", type=bool, default=False, help="built-in mmvp: accept a letter anywhere in the answer")
    add("--pope-data", type=Path | None, default=None, help="built-in pope: a file of JSON lines")
    add("--pope-images", type=Path | None, default=None, help="built-in pope: the folder of its pictures")
    add("--pope-prompt", choices=POPE_PROMPTS, default="short", help="built-in pope: wording")
    add("--reconstruction-images", type=Path | None, default=None, help="reconstruction: folder of pictures")
    add("--reconstruction-steps", type=str, default="250", help="reconstruction: sampling steps")
    add("--include-path", type=Path | None, default=None, help="lmms-eval: folder with more task definitions")
    add(
        "--lmms-interface",
        choices=("simple", "chat"),
        default="simple",
        help="lmms-eval: chat scores no candidates",
    )
    add("--vlmevalkit", type=Path | None, default=None, help="VLMEvalKit's source folder, if it cannot be found")
    return Namespace(**parse_flat(parser, sys.argv[1:] if arguments is None else arguments))
