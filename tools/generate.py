"""Ask a Ross checkpoint about an image, or chat with it in the terminal.

python tools/generate.py --checkpoint DIR --image cat.jpg --question "What is it?"
python tools/generate.py --checkpoint DIR            # interactive
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from jsonargparse import ArgumentParser, Namespace
from transformers import TextStreamer

from megatron_ross.evaluation.generate import ChatSession, Decoding, chat_loop, load_for_inference, open_image


def parse(arguments: Sequence[str] | None) -> Namespace:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=str, required=True, help="folder or hub id of a composite Ross checkpoint")
    parser.add_argument("--image", type=str, default=[], nargs="*", help="image files shown with the question")
    parser.add_argument("--question", type=str | None, default=None, help="ask once; without it, chat")
    parser.add_argument("--max-new-tokens", type=int, default=512, help="longest answer")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 = greedy")
    parser.add_argument("--top-p", type=float, default=1.0, help="nucleus sampling")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling")
    parser.add_argument("--template", type=str | None, default=None, help="qwen_2, v1, llama3 or plain")
    parser.add_argument("--device", type=str | None, default=None, help="default: the GPU if there is one")
    parser.add_argument("--dtype", type=str, default="auto", help="auto, bf16, fp16 or fp32")
    parser.add_argument("--vision-tower", type=str | None, default=None, help="folder with the tower's config")
    parser.add_argument("--vae", type=str | None, default=None, help="folder with the auto-encoder's config")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0, or 1 after a one-line error."""
    args = parse(arguments)
    try:
        decoding = Decoding(args.max_new_tokens, args.temperature, args.top_p)
        images = [open_image(path) for path in args.image]
        model, processor = load_for_inference(
            args.checkpoint,
            device=args.device,
            dtype=args.dtype,
            template=args.template,
            vision_tower=args.vision_tower,
            vae=args.vae,
        )
        torch.manual_seed(args.seed)
        session = ChatSession(model, processor, decoding)
        streamer = TextStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        if args.question is None:
            chat_loop(session, lambda: input("> "), print, streamer, images)
        else:
            session.ask(args.question, images, streamer)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
