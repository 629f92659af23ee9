"""Train matched arms of an experiment, evaluate them all, and report paired differences.

    python tools/ablate.py --config examples/ablation/ablation.yaml --seeds 3 --jobs 2

Arms differ in named settings only; runs of one seed share fresh weights, order of samples, noise and steps. Finished
runs are kept: the same command again goes on where it stopped. What was run under another recipe is refused.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from jsonargparse import ArgumentParser, Namespace

from megatron_ross.evaluation.ablation.execute import AblationError, execute
from megatron_ross.evaluation.ablation.plan import read_ablation, runs_of
from megatron_ross.evaluation.ablation.report import write_report

ROOT = Path(__file__).resolve().parents[1]
EXIT_INTERRUPTED = 130


def parse(arguments: Sequence[str] | None) -> Namespace:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, required=True, help="the arms, see examples/ablation/ablation.yaml")
    parser.add_argument("--seeds", type=int, default=3, help="runs per arm")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument(
        "--report",
        type=Path | None,
        default=None,
        help="Markdown file; numbers go beside it as JSON; default: in output",
    )
    parser.add_argument("--images", type=Path | None, default=None, help="folder for pictures; default: beside it")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0, or 1 after a one-line error."""
    args = parse(arguments)
    try:
        if args.jobs < 1:
            raise ValueError(f"jobs is {args.jobs}, it must be at least 1")
        config = read_ablation(args.config)
        execute(config, runs_of(config, args.seeds), args.jobs, ROOT, lambda text: print(text, flush=True))
        document = args.report or Path(config.output) / "report.md"
        images = args.images or document.parent / "images"
        command = f"python tools/ablate.py --config {args.config} --seeds {args.seeds} --jobs {args.jobs}"
        if args.report is not None:
            command += f" --report {args.report} --images {images}"
        write_report(config, args.seeds, command, document, images, document.with_suffix(".json"))
    except (ValueError, OSError, AblationError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return EXIT_INTERRUPTED
    print(document)
    return 0


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _interrupt)
    sys.exit(main())
