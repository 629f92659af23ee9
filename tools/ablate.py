"""Train matched arms of an experiment and compare them: `megatron-ross ablate`.

python tools/ablate.py --config examples/ablation/ablation.yaml --seeds 3 --jobs 2
"""

from __future__ import annotations

import sys

from megatron_ross.cli.ablate import main

if __name__ == "__main__":
    sys.exit(main())
