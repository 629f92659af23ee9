"""Compute the VAE posterior moments of a data set once: `megatron-ross cache-latents`.

python tools/cache_latents.py --config FILE --latent-cache latents/siglip-384 --processes 8
"""

from __future__ import annotations

import sys

from megatron_ross.cli.cache_latents import main

if __name__ == "__main__":
    sys.exit(main())
