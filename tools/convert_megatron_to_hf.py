"""A Megatron checkpoint of any layout -> a Hugging Face folder: `megatron-ross export`. See docs/checkpoints.md."""

from __future__ import annotations

import sys

from megatron_ross.cli.export_checkpoint import main

if __name__ == "__main__":
    sys.exit(main())
