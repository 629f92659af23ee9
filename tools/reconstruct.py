"""Show what a Ross model remembers of images: input, auto-encoder round trip and reconstruction, side by side.

    python tools/reconstruct.py --checkpoint DIR --images FOLDER --output FOLDER --steps 100

Writes one picture per image and figures.csv (PSNR and SSIM against what the model saw).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from megatron_ross.evaluation.generate import load_for_inference
from megatron_ross.evaluation.reconstruct import mean_figures, reconstruct_folder


def parse(arguments: Sequence[str] | None) -> Namespace:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=str, required=True, help="folder or hub id of a composite Ross checkpoint")
    parser.add_argument("--images", type=str, required=True, help="folder of image files")
    parser.add_argument("--output", type=str, required=True, help="folder for pictures and figures.csv")
    parser.add_argument(
        "--steps", type=str | None, default=None, help="sampling steps: a number (default 1000), or sections like 6,6,1"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the noise")
    parser.add_argument(
        "--prompt", type=str | None, default=None, help="text before the image; default: as in training"
    )
    parser.add_argument("--limit", type=int | None, default=None, help="at most so many images")
    parser.add_argument("--batch-size", type=int, default=8, help="images at a time")
    parser.add_argument("--template", type=str | None, default=None, help="qwen_2, v1, llama3 or plain")
    parser.add_argument("--device", type=str | None, default=None, help="default: the GPU if there is one")
    parser.add_argument("--dtype", type=str, default="auto", help="of LLM and tower: auto, bf16, fp16 or fp32")
    parser.add_argument("--vision-tower", type=str | None, default=None, help="folder with the tower's config")
    parser.add_argument("--vae", type=str | None, default=None, help="folder with the auto-encoder's config")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0, or 1 after a one-line error."""
    args = parse(arguments)
    try:
        model, processor = load_for_inference(
            args.checkpoint,
            device=args.device,
            dtype=args.dtype,
            template=args.template,
            vision_tower=args.vision_tower,
            vae=args.vae,
        )
        results = reconstruct_folder(
            model,
            processor,
            Path(args.images),
            Path(args.output),
            steps=args.steps,
            seed=args.seed,
            prompt=args.prompt,
            batch_size=args.batch_size,
            limit=args.limit,
        )
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    means = ", ".join(f"{name} {value:.2f}" for name, value in mean_figures(results).items())
    print(f"{len(results)} images in {args.output}; mean: {means}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
