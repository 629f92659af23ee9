"""Rank parallel layouts by predicted step time: `megatron-ross plan`.

python tools/plan.py --config FILE --model qwen2-7b+siglip-so400m --world-size 64 --gpu h100
"""

from __future__ import annotations

import sys

from megatron_ross.cli.plan import main

if __name__ == "__main__":
    sys.exit(main())
