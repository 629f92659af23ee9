"""Compute the VAE posterior moments of a data set once, so that training needs neither the VAE nor its images' pixels.

    megatron-ross cache-latents --config recipe:shared/stage1 --config recipe:ross/pretrain_siglip_qwen2 \\
        --latent-cache latents/siglip-384 --processes 8

All settings of `megatron-ross train` are understood: they name the data and the checkpoint (`init_from`) whose VAE and
image preprocessing count. Run it again to go on where it was stopped, to encode images that could not be read or were
replaced since, or to add another data set to the same folder; then train with `latent_cache: latents/siglip-384`.
Exits 1 if more images are missing than `max_bad_sample_share` lets training skip.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from megatron_ross.cli.command import at_least_one, run_command
from megatron_ross.config.cli import ConfigError, parse_command
from megatron_ross.config.schema import RunConfig
from megatron_ross.training.start import start_of


def add_options(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("--processes", type=int, default=1, help="worker processes; with GPUs, one per GPU")
    add("--encode-batch-size", type=int, default=8, help="images that go through the VAE at a time")
    add("--samples-per-shard", type=int, default=500, help="samples whose images share a file")
    add(
        "--verify-images",
        action="store_true",
        help="read all images and compare their bytes with what was cached; else only files of another size or time",
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """0; 1 if too many images are missing, or after one line that says what is wrong."""
    argv = sys.argv[1:] if arguments is None else arguments
    return run_command(lambda: cache(*parse_command(__doc__.splitlines()[0], add_options, argv)))


def cache(options: Namespace, run: RunConfig) -> int:
    """Fill the run's `latent_cache`. Raises ValueError, OSError."""
    at_least_one(options, "processes", "encode_batch_size", "samples_per_shard")
    if not run.data.latent_cache:
        raise ConfigError("latent_cache='': name the folder to write to")
    start_of(run)  # refused before the libraries below are imported
    from megatron_ross.platform import quieten

    quieten()
    from megatron_ross.training.latents import CachingOptions, cache_data_set

    folder = Path(run.data.latent_cache)
    report = cache_data_set(
        run,
        folder,
        CachingOptions(
            options.processes, options.encode_batch_size, options.samples_per_shard, verify=options.verify_images
        ),
    )
    print(
        f"{report.encoded:,} images encoded, {report.kept_blocks:,} blocks kept, {report.repaired_blocks:,} repaired; "
        f"of {report.num_images:,} images {report.replaced:,} were replaced since, {report.broken:,} are missing"
    )
    for example in report.examples:
        print(f"    {example}")
    if report.incomplete:
        raise ValueError(
            f"latent_cache={str(folder)!r}: more images of {', '.join(report.incomplete)} are missing than "
            f"max_bad_sample_share={run.data.max_bad_sample_share} allows; mend them and run this command again, which "
            "encodes only these"
        )
    return 0
