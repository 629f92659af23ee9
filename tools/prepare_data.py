"""Validate the data of a training run, and pack it into WebDataset shards: `megatron-ross prepare-data`.

python tools/prepare_data.py --config examples/shared/stage2.yaml --config my_data.yaml --out report
"""

from __future__ import annotations

import sys

from megatron_ross.cli.prepare_data import main

if __name__ == "__main__":
    sys.exit(main())
