"""PSNR and SSIM of reconstructions against training steps and sampling steps, for all checkpoints of a run.

    python tools/reconstruction_quality.py --run RUN --images FOLDER --output FOLDER --steps 10 25 100

Every checkpoint is reconstructed with the last of --steps, the newest one with each of them. Writes quality.json,
quality.png and the pictures.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from jsonargparse import ArgumentParser, Namespace

from megatron_ross.checkpoint.locate import Kind, checkpoint_root, identify
from megatron_ross.checkpoint.manifest import Manifest, iteration_dir
from megatron_ross.checkpoint.retention import complete_iterations
from megatron_ross.cli.command import parse_options, run_command

if TYPE_CHECKING:
    from megatron_ross.evaluation.quality import QualityPoint


def add_options(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("--run", type=str, required=True, help="run folder with several checkpoints (save_interval)")
    add("--images", type=Path, required=True, help="folder of image files that were not trained on")
    add("--output", type=Path, required=True, help="folder for quality.json, quality.png and pictures")
    steps = ["10", "25", "50", "100", "250"]
    add("--steps", nargs="+", type=str, default=steps, help="respacings; not for regress")
    add("--limit", type=int | None, default=None, help="at most so many images")
    add("--batch-size", type=int, default=8, help="images at a time")
    add("--device", type=str | None, default=None, help="default: the GPU if there is one")


def iterations_of(name: str) -> tuple[Path, list[int]]:
    """Folder of a run's checkpoints, and the complete ones. Raises ValueError: it is no run, or there are none."""
    found = identify(name, "run")
    found.require("run", Kind.RUN, Kind.CHECKPOINT)
    if found.path is None:
        raise ValueError(f"run={name!r}: no such folder; give a run folder")
    root = checkpoint_root(found)
    iterations = complete_iterations(root)
    if not iterations:
        raise ValueError(f"{root} holds no complete checkpoint; give a run folder")
    return root, iterations


def measure_run(args: Namespace) -> list[QualityPoint]:
    """One point per checkpoint, and for the newest one per respacing.

    Raises:
        ValueError: the run has no checkpoint, or its model has no denoiser.
    """
    root, iterations = iterations_of(args.run)
    from megatron_ross.convert.cli import export_checkpoint
    from megatron_ross.evaluation.generate import load_for_inference
    from megatron_ross.evaluation.quality import measure
    from megatron_ross.huggingface.chat_templates import chat_template

    points = []
    for iteration in iterations:
        checkpoint = iteration_dir(root, iteration)
        denoiser = Manifest.read(checkpoint).model.denoiser
        respacings: list[str | None] = [None]
        if denoiser is None or denoiser.objective == "denoise":  # without a denoiser, reconstruct says so
            respacings = args.steps if iteration == iterations[-1] else args.steps[-1:]
        with tempfile.TemporaryDirectory() as temporary:
            exported = Path(temporary) / "hf"
            export_checkpoint(checkpoint, exported, "ross", "stored", chat_template)
            model, processor = load_for_inference(str(exported), device=args.device)
            for steps in respacings:
                pictures = args.output / f"step{iteration}" / (steps or "one_pass")
                points.append(
                    measure(
                        model,
                        processor,
                        args.images,
                        pictures,
                        iteration=iteration,
                        steps=steps,
                        limit=args.limit,
                        batch_size=args.batch_size,
                    )
                )
    return points


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0, or 1 after a one-line error."""

    def body() -> int:
        args = parse_options(__doc__.splitlines()[0], add_options, arguments)
        points = measure_run(args)
        from megatron_ross.evaluation.quality import plot_quality, write_quality

        write_quality(points, args.output / "quality.json")
        plot_quality(points, args.output / "quality.png")
        print(f"{len(points)} points in {args.output / 'quality.json'}")
        return 0

    return run_command(body)


if __name__ == "__main__":
    sys.exit(main())
