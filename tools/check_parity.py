"""Compare this stack with recorded reference cases: torchrun --nproc-per-node N tools/check_parity.py --fixture DIR"""

from __future__ import annotations

import sys

if __name__ == "__main__":
    from megatron_ross.parity.command_line import main

    sys.exit(main())
