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

from jsonargparse import ArgumentParser, Namespace

from megatron_ross.checkpoint.manifest import CHECKPOINTS_NAME, Manifest, iteration_dir
from megatron_ross.checkpoint.retention import complete_iterations
from megatron_ross.convert.cli import export_checkpoint
from megatron_ross.evaluation.generate import load_for_inference
from megatron_ross.evaluation.quality import QualityPoint, measure, plot_quality, write_quality
from megatron_ross.huggingface.chat_templates import chat_template


def parse(arguments: Sequence[str] | None) -> Namespace:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, required=True, help="run folder with several checkpoints (save_interval)")
    parser.add_argument("--images", type=Path, required=True, help="folder of image files that were not trained on")
    parser.add_argument("--output", type=Path, required=True, help="folder for quality.json, quality.png and pictures")
    parser.add_argument(
        "--steps", nargs="+", default=["10", "25", "50", "100", "250"], help="respacings; not for regress"
    )
    parser.add_argument("--limit", type=int | None, default=None, help="at most so many images")
    parser.add_argument("--batch-size", type=int, default=8, help="images at a time")
    parser.add_argument("--device", type=str | None, default=None, help="default: the GPU if there is one")
    return parser.parse_args(arguments)


def measure_run(args: Namespace) -> list[QualityPoint]:
    """One point per checkpoint, and for the newest one per respacing.

    Raises:
        ValueError: the run has no checkpoint, or its model has no denoiser.
    """
    root = args.run / CHECKPOINTS_NAME
    iterations = complete_iterations(root)
    if not iterations:
        raise ValueError(f"{root} holds no complete checkpoint; give a run folder")
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
    args = parse(arguments)
    try:
        points = measure_run(args)
        write_quality(points, args.output / "quality.json")
        plot_quality(points, args.output / "quality.png")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{len(points)} points in {args.output / 'quality.json'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
