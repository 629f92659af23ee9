"""Validate the data of a training run before anyone rents GPUs, and pack it into WebDataset shards.

    megatron-ross prepare-data --config recipe:shared/stage2 --config my_data.yaml --out report

All settings of `megatron-ross train` are understood: they name the data (`data_path` or `blend`), template, length,
batch size and packing. Tokenizer and image size are those of the checkpoint to start from, or, before there is one, of
`--model` and `--tokenizer`. Prints, for all sources together and for each, exact counts of what training will drop and
why, histograms, and the steps of the run; writes `report.json` and `histograms.png` to `--out`. Run it again to go on
where it was stopped. Exits 1 where training would stop because of its data, and says why and at which iteration:
settings, tokenizer and records that do not fit, more broken samples than `max_bad_sample_share` and
`max_mismatch_share` allow, or steps that train nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from megatron_ross.cli.command import at_least_one, run_command
from megatron_ross.cli.models import MODEL_OPTION_HELP
from megatron_ross.config.cli import parse_command
from megatron_ross.config.schema import RunConfig
from megatron_ross.config.validate import check_settings
from megatron_ross.training.start import start_of


def add_options(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder for the report and the progress")
    add("--model", type=str | None, default=None, help=MODEL_OPTION_HELP)
    tokenizer = "folder of a Hugging Face tokenizer; default: the checkpoint's"
    add("--tokenizer", type=str | None, default=None, help=tokenizer)
    add("--skip-images", action="store_true", help="check texts only, open no image")
    shards = "folder for WebDataset tars of all samples that can be used"
    add("--write-shards", type=Path | None, default=None, help=shards)
    add("--samples-per-shard", type=int, default=2000, help="samples in each of them")


def main(arguments: Sequence[str] | None = None) -> int:
    """0; 1 if training would stop because of its data, or after one line that says what is wrong."""
    argv = sys.argv[1:] if arguments is None else arguments
    return run_command(lambda: prepare_data(*parse_command(__doc__.splitlines()[0], add_options, argv)))


def prepare_data(options: Namespace, run: RunConfig) -> int:
    """Check the options, then the data. Raises ValueError, OSError."""
    at_least_one(options, "samples_per_shard")
    check_settings(run)
    if not (options.model and options.tokenizer) and (run.training.init_from or run.training.load):
        start_of(run)  # refused before the libraries below are imported
    from megatron_ross.platform import quieten

    quieten()
    from megatron_ross.cli.data_report import prepare

    return prepare(options, run)
