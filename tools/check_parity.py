"""Compare this stack with recorded reference cases: torchrun --nproc-per-node N tools/check_parity.py --fixture DIR"""

from __future__ import annotations

import sys

if __name__ == "__main__":
    from megatron_ross.platform import quieten

    quieten()
    from megatron_ross.parity.main import main

    sys.exit(main(sys.argv[1:]))
