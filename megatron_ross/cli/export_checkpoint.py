"""Convert a Megatron checkpoint of any layout into a Hugging Face folder. See docs/checkpoints.md."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from jsonargparse import ArgumentParser

from megatron_ross.cli.command import EXIT_INTERRUPTED, parse_options, run_command
from megatron_ross.text_files import check_vacant


def add_options(parser: ArgumentParser) -> None:
    add = parser.add_argument
    checkpoint = "run folder, root of the checkpoint (newest iteration) or one iteration folder"
    add("--checkpoint", type=Path, required=True, help=checkpoint)
    add("--output", type=Path, required=True, help="folder to create")
    formats = "ross: the published composite; llava: stock transformers class; adapters: projector and denoiser files"
    add("--format", choices=("ross", "llava", "adapters"), default="ross", help=formats)
    dtypes = ("stored", "float32", "bfloat16", "float16")
    add("--dtype", choices=dtypes, default="stored", help="of the written tensors; stored changes nothing")


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0, 75 if interrupted (nothing is written then), or 1 after a one-line error."""

    def body() -> int:
        options = parse_options(__doc__, add_options, arguments)
        from megatron_ross.checkpoint.locate import megatron_checkpoint

        check_vacant(options.output)
        megatron_checkpoint(options.checkpoint, "checkpoint")  # refused before the libraries below are imported
        from megatron_ross.convert.cli import export_checkpoint
        from megatron_ross.huggingface.chat_templates import chat_template

        export_checkpoint(**vars(options), templates=chat_template)
        return 0

    status = run_command(body, "interrupted: nothing was written")
    return os.EX_TEMPFAIL if status == EXIT_INTERRUPTED else status
