"""Command line of tools/check_parity.py: options of the fixture, and any setting of a run for the layout."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

from jsonargparse import ArgumentParser

from megatron_ross.config.cli import ConfigError, parse_command

CheckName = Literal["cases", "trajectories", "sampling", "generation"]


def add_options(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("--fixture", type=Path, required=True, help="directory with metadata.json and goldens/")
    add("--model", type=str | None, default=None, help="check only this model of the fixture")
    add("--checks", type=list[CheckName], default=list(get_args(CheckName)), help="which checks, as [a,b]")


def main(argv: Sequence[str] | None = None) -> int:
    """0 when every row is within its tolerance, 1 otherwise, on every rank alike."""
    arguments = sys.argv[1:] if argv is None else argv
    try:
        options, run = parse_command(
            "Compare this stack with recorded reference cases, in any layout.", add_options, arguments
        )
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    from megatron_ross.platform import quieten

    quieten()
    from megatron_ross.parity.main import compare

    return compare(options.fixture, options.model, options.checks, run)
