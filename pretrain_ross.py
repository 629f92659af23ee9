"""Train Ross or LLaVA: torchrun --nproc-per-node N pretrain_ross.py --config FILE [--any-setting VALUE]

The same as `megatron-ross train`.
"""

from __future__ import annotations

import sys

from megatron_ross.programs import end_with_launcher

if __name__ == "__main__":
    end_with_launcher()  # before the imports, which take seconds
    # Imported here, because checkpoint writers start helper processes that read this file again.
    from megatron_ross.cli.train import main

    sys.exit(main())
