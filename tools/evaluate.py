"""Evaluate a checkpoint on benchmarks: `megatron-ross evaluate`. See docs/evaluation.md.

python tools/evaluate.py --checkpoint runs/NAME --tasks gqa,mmlu --output results
"""

from __future__ import annotations

import sys

from megatron_ross.cli.evaluate import main

if __name__ == "__main__":
    sys.exit(main())
