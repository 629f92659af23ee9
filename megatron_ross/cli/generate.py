"""Ask a model about an image, or chat with it in the terminal.

megatron-ross generate --checkpoint DIR --image cat.jpg --question "What is it?"
megatron-ross generate --checkpoint DIR            # interactive
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from megatron_ross.cli.command import parse_options, run_command
from megatron_ross.cli.inference import add_model_options, check_model_options, load
from megatron_ross.config.shown import shown
from megatron_ross.evaluation.options import Decoding


def add_options(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("--image", type=str, default=[], nargs="*", help="image files shown with the question")
    add("--question", type=str | None, default=None, help="ask once; without it, chat")
    add("--max-new-tokens", type=int, default=512, help="longest answer")
    add("--temperature", type=float, default=0.0, help="0 = greedy")
    add("--top-p", type=float, default=1.0, help="nucleus sampling")
    add("--seed", type=int, default=0, help="of the sampling")
    add_model_options(parser)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0, or 1 after a one-line error."""
    return run_command(lambda: generate(parse_options(__doc__.splitlines()[0], add_options, arguments)))


def generate(options: Namespace) -> int:
    """Answer the question, or chat. Raises ValueError, OSError."""
    decoding = Decoding(options.max_new_tokens, options.temperature, options.top_p)
    for path in options.image:
        if not Path(path).is_file():
            raise ValueError(f"image={shown(path, 300)}: no such file")
    check_model_options(options)
    import torch
    from transformers import TextStreamer

    from megatron_ross.evaluation.generate import ChatSession, chat_loop, open_image

    images = [open_image(path) for path in options.image]
    model, processor = load(options)
    torch.manual_seed(options.seed)
    session = ChatSession(model, processor, decoding)
    streamer = TextStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    if options.question is None:
        chat_loop(session, lambda: input("> "), print, streamer, images)
    else:
        session.ask(options.question, images, streamer)
    return 0
