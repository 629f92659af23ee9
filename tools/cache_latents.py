"""Compute the VAE posterior moments of a data set once, so that training needs neither the VAE nor its images' pixels.

    python tools/cache_latents.py --config examples/shared/stage1.yaml \\
        --config examples/ross/pretrain_siglip_qwen2.yaml --latent-cache latents/siglip-384 --processes 8

All settings of pretrain_ross.py are understood: they name the data and the checkpoint (`init_from`) whose VAE and image
preprocessing count. Run it again to go on where it was stopped, to encode images that could not be read or were
replaced since, or to add another data set to the same folder; then train with `latent_cache: latents/siglip-384`.
Exits 1 if more images are missing than `max_bad_sample_share` lets training skip.
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
    parser.add_argument(
        "--verify-images",
        action="store_true",
        help="read all images and compare their bytes with what was cached; else only files of another size or time",
    )
    return parser.parse_known_args(argv)


def main(argv: Sequence[str]) -> int:
    """0; 1 if too many images are missing, or after one line that says what is wrong."""
    quieten()
    options, rest = parse(argv)
    try:
        for name in ("processes", "encode_batch_size", "samples_per_shard"):
            if getattr(options, name) < 1:
                raise ConfigError(f"{name}={getattr(options, name)}: must be at least 1")
        run = parse_run_config(rest)
        if not run.data.latent_cache:
            raise ConfigError("latent_cache='': name the folder to write to")
        folder = Path(run.data.latent_cache)
        report = cache_data_set(
            run,
            folder,
            CachingOptions(
                options.processes,
                options.encode_batch_size,
                options.samples_per_shard,
                verify=options.verify_images,
            ),
        )
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(
        f"{report.encoded:,} images encoded, {report.kept_blocks:,} blocks kept, {report.repaired_blocks:,} repaired; "
        f"of {report.num_images:,} images {report.replaced:,} were replaced since, {report.broken:,} are missing"
    )
    for example in report.examples:
        print(f"    {example}")
    if not report.incomplete:
        return 0
    print(
        f"error: latent_cache={str(folder)!r}: more images of {', '.join(report.incomplete)} are missing than "
        f"max_bad_sample_share={run.data.max_bad_sample_share} allows; mend them and run this command again, which "
        "encodes only these",
        file=sys.stderr,
    )
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
