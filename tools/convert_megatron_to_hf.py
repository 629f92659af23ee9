"""A Megatron checkpoint of any layout -> a Hugging Face folder. See docs/checkpoints.md."""

from __future__ import annotations

import sys
from pathlib import Path

from megatron_ross.convert.cli import DtypeName, ExportFormat, export_checkpoint, run


def export(checkpoint: Path, output: Path, format: ExportFormat = "ross", dtype: DtypeName = "stored") -> None:
    """Convert a Megatron checkpoint into a Hugging Face folder.

    Args:
        checkpoint: root of the checkpoint (newest iteration) or one iteration folder.
        output: folder to create.
        format: ross: the published composite; llava: stock transformers class; adapters: projector and denoiser files.
        dtype: dtype of the written tensors; `stored` changes nothing.
    """
    from megatron_ross.huggingface.chat_templates import chat_template  # imports transformers, which takes seconds

    export_checkpoint(checkpoint, output, format, dtype, chat_template)


if __name__ == "__main__":
    run(export, sys.argv[1:])
