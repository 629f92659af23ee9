"""Show what a Ross model remembers of images: `megatron-ross reconstruct`.

python tools/reconstruct.py --checkpoint DIR --images FOLDER --output FOLDER --steps 100
"""

from __future__ import annotations

import sys

from megatron_ross.cli.reconstruct import main

if __name__ == "__main__":
    sys.exit(main())
