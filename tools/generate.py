"""Ask a model about an image, or chat with it: `megatron-ross generate`.

python tools/generate.py --checkpoint DIR --image cat.jpg --question "What is it?"
"""

from __future__ import annotations

import sys

from megatron_ross.cli.generate import main

if __name__ == "__main__":
    sys.exit(main())
