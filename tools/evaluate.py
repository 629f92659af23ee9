"""Evaluate a checkpoint on benchmarks, with built-in evaluators, lmms-eval or VLMEvalKit. See docs/evaluation.md.

python tools/evaluate.py --checkpoint runs/NAME --tasks gqa,mmlu --output results
"""

from __future__ import annotations

import sys

from megatron_ross.evaluation.main import main

if __name__ == "__main__":
    sys.exit(main())
