"""Hugging Face checkpoints -> a Megatron checkpoint that every parallel layout can load. See docs/checkpoints.md."""

from __future__ import annotations

import sys

from megatron_ross.convert.cli import import_checkpoint, run

if __name__ == "__main__":
    run(import_checkpoint, sys.argv[1:])
