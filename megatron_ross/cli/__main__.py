"""`python -m megatron_ross.cli COMMAND ...`, the same as `megatron-ross COMMAND ...`."""

from __future__ import annotations

import sys

if __name__ == "__main__":
    # Guarded, because checkpoint writers start helper processes that read this file again.
    from megatron_ross.cli.main import main

    sys.exit(main())
