"""Compare text, images and sampler order with a folder of golden preprocessing files, and print a row per file.

    python tools/check_preprocessing.py --fixture tests/golden

The folder holds `metadata.json`, tokenizer folders and `preprocess/` as tests/golden/README.md describes them. Exits
1 on a difference.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from jsonargparse import ArgumentParser

from megatron_ross.cli.command import parse_options, run_command


def add_options(parser: ArgumentParser) -> None:
    parser.add_argument("--fixture", type=Path, required=True, help="folder in the golden format")


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0, 1 if anything differs or after a one-line error."""

    def body() -> int:
        options = parse_options(__doc__.splitlines()[0], add_options, arguments)
        from megatron_ross.parity.preprocessing import check_preprocessing

        return check_preprocessing(options.fixture)

    return run_command(body)


if __name__ == "__main__":
    sys.exit(main())
