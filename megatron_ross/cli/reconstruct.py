"""Show what a Ross model remembers of images: input, auto-encoder round trip and reconstruction, side by side.

    megatron-ross reconstruct --checkpoint DIR --images FOLDER --output FOLDER --steps 100

Writes one picture per image and figures.csv (PSNR and SSIM against what the model saw).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from megatron_ross.cli.command import at_least_one, parse_options, run_command
from megatron_ross.cli.inference import add_model_options, check_model_options, load
from megatron_ross.config.timesteps import NUM_TRAIN_TIMESTEPS, respaced_timesteps
from megatron_ross.evaluation.options import image_files


def add_options(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("--images", type=str, required=True, help="folder of image files")
    add("--output", type=str, required=True, help="folder for pictures and figures.csv")
    steps = "sampling steps: a number (default 1000), or sections like 6,6,1"
    add("--steps", type=str | None, default=None, help=steps)
    add("--seed", type=int, default=0, help="of the noise")
    add("--prompt", type=str | None, default=None, help="text before the image; default: as in training")
    add("--limit", type=int | None, default=None, help="at most so many images")
    add("--batch-size", type=int, default=8, help="images at a time")
    add_model_options(parser)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0, or 1 after a one-line error."""
    return run_command(lambda: reconstruct(parse_options(__doc__.splitlines()[0], add_options, arguments)))


def reconstruct(options: Namespace) -> int:
    """Paint the images. Raises ValueError, OSError."""
    at_least_one(options, "batch_size", *(["limit"] if options.limit is not None else []))
    if options.steps is not None:
        respaced_timesteps(NUM_TRAIN_TIMESTEPS, options.steps)
    image_files(Path(options.images))
    check_model_options(options, reconstructs=True)
    from megatron_ross.evaluation.reconstruct import mean_figures, reconstruct_folder

    model, processor = load(options)
    results = reconstruct_folder(
        model,
        processor,
        Path(options.images),
        Path(options.output),
        steps=options.steps,
        seed=options.seed,
        prompt=options.prompt,
        batch_size=options.batch_size,
        limit=options.limit,
    )
    means = ", ".join(f"{name} {value:.2f}" for name, value in mean_figures(results).items())
    print(f"{len(results)} images in {options.output}; mean: {means}")
    return 0
