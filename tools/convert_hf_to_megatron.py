"""Hugging Face checkpoints -> a Megatron checkpoint: `megatron-ross import`. See docs/checkpoints.md."""

from __future__ import annotations

import sys

from megatron_ross.cli.import_checkpoint import main

if __name__ == "__main__":
    sys.exit(main())
