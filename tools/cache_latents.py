"""Compute the VAE posterior moments of a data set once, so that training needs neither the VAE nor its images' pixels.

    python tools/cache_latents.py --config examples/shared/stage1.yaml \\
        --config examples/ross/pretrain_siglip_qwen2.yaml --latent-cache latents/siglip-384 --processes 8

All settings of pretrain_ross.py are understood: they name the data and the checkpoint (`init_from`) whose VAE and image
preprocessing count. Run it again to go on where it was stopped, or to add another data set to the same folder; then
train with `latent_cache: latents/siglip-384`. Exits 1 if images are broken.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_ross.config.cli import ConfigError, parse_run_config
from megatron_ross.platform import quieten
from megatron_ross.training.latents import CachingOptions, cache_data_set


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--processes", type=int, default=1, help="worker processes; with GPUs, one per GPU")
    parser.add_argument("--encode-batch-size", type=int, default=8, help="images that go through the VAE at a time")
    parser.add_argument("--samples-per-shard", type=int, default=500, help="samples whose images share a file")
    return parser.parse_known_args(argv)


def main(argv: Sequence[str]) -> int:
    """0; 1 if images are broken, or after one line that says what is wrong."""
    quieten()
    options, rest = parse(argv)
    try:
        for name in ("processes", "encode_batch_size", "samples_per_shard"):
            if getattr(options, name) < 1:
                raise ConfigError(f"{name}={getattr(options, name)}: must be at least 1")
        run = parse_run_config(rest)
        if not run.data.latent_cache:
            raise ConfigError("latent_cache='': name the folder to write to")
        report = cache_data_set(
            run,
            Path(run.data.latent_cache),
            CachingOptions(options.processes, options.encode_batch_size, options.samples_per_shard),
        )
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{report.encoded:,} images encoded, {report.kept_blocks:,} files kept, {report.broken:,} images broken")
    for example in report.examples:
        print(f"    {example}")
    return 1 if report.broken else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
