"""Train matched arms of an experiment, evaluate them all, and report paired differences.

    megatron-ross ablate --config examples/ablation/ablation.yaml --seeds 3 --jobs 2

Arms differ in named settings only; runs of one seed share fresh weights, order of samples, noise and steps. Finished
runs are kept: the same command again goes on where it stopped. What was run under another recipe is refused. Paths in
the experiment's file start where the command is started.
"""

from __future__ import annotations

import signal
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from jsonargparse import ArgumentParser, Namespace

from megatron_ross.cli.command import at_least_one, parse_options, run_command


def add_options(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("--config", type=Path, required=True, help="the arms, see examples/ablation/ablation.yaml")
    add("--seeds", type=int, default=3, help="runs per arm")
    add("--jobs", type=int, default=1, help="runs at a time")
    report = "Markdown file; numbers go beside it as JSON; default: in output"
    add("--report", type=Path | None, default=None, help=report)
    add("--images", type=Path | None, default=None, help="folder for pictures; default: beside it")


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0, 130 if interrupted, or 1 after a one-line error."""
    signal.signal(signal.SIGTERM, _interrupt)
    return run_command(
        lambda: ablate(parse_options(__doc__.splitlines()[0], add_options, arguments)),
        "interrupted; the same command goes on from here",
    )


def ablate(options: Namespace) -> int:
    """Bring every run to its result and write the report. Raises ValueError, OSError."""
    at_least_one(options, "jobs")
    from megatron_ross.evaluation.ablation.execute import AblationError, execute
    from megatron_ross.evaluation.ablation.plan import read_ablation, runs_of
    from megatron_ross.evaluation.ablation.report import write_report

    config = read_ablation(options.config)
    try:
        runs = runs_of(config, options.seeds)
        execute(config, runs, options.jobs, Path.cwd(), lambda text: print(text, flush=True))
        document = options.report or Path(config.output) / "report.md"
        images = options.images or document.parent / "images"
        command = f"python tools/ablate.py --config {options.config} --seeds {options.seeds} --jobs {options.jobs}"
        if options.report is not None:
            command += f" --report {options.report} --images {images}"
        write_report(config, options.seeds, command, document, images, document.with_suffix(".json"))
    except AblationError as error:
        raise ValueError(str(error)) from error
    print(document)
    return 0


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
