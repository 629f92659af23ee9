"""Ask a model about an image, or chat with it in the terminal.

megatron-ross generate --checkpoint DIR --image cat.jpg --question "What is it?"
megatron-ross generate --checkpoint DIR            # interactive
"""

from __future__ import annotations

from collections.abc import Sequence

from jsonargparse import ArgumentParser, Namespace

from megatron_ross.cli.command import MODEL_HELP, parse_options, run_command


def add_options(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("--checkpoint", type=str, required=True, help=MODEL_HELP)
    add("--image", type=str, default=[], nargs="*", help="image files shown with the question")
    add("--question", type=str | None, default=None, help="ask once; without it, chat")
    add("--max-new-tokens", type=int, default=512, help="longest answer")
    add("--temperature", type=float, default=0.0, help="0 = greedy")
    add("--top-p", type=float, default=1.0, help="nucleus sampling")
    add("--seed", type=int, default=0, help="of the sampling")
    add("--template", type=str | None, default=None, help="qwen_2, v1, llama3 or plain")
    add("--device", type=str | None, default=None, help="default: the GPU if there is one")
    add("--dtype", type=str, default="auto", help="auto, bf16, fp16 or fp32")
    add("--vision-tower", type=str | None, default=None, help="folder with the tower's config")
    add("--vae", type=str | None, default=None, help="folder with the auto-encoder's config")


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0, or 1 after a one-line error."""
    return run_command(lambda: generate(parse_options(__doc__.splitlines()[0], add_options, arguments)))


def generate(options: Namespace) -> int:
    """Answer the question, or chat. Raises ValueError, OSError."""
    from megatron_ross.evaluation.exports import check_model, exported_folder

    check_model(options.checkpoint)  # refused before the libraries below are imported
    import torch
    from transformers import TextStreamer

    from megatron_ross.evaluation.generate import ChatSession, Decoding, chat_loop, load_for_inference, open_image

    decoding = Decoding(options.max_new_tokens, options.temperature, options.top_p)
    images = [open_image(path) for path in options.image]
    model, processor = load_for_inference(
        str(exported_folder(options.checkpoint)),
        device=options.device,
        dtype=options.dtype,
        template=options.template,
        vision_tower=options.vision_tower,
        vae=options.vae,
    )
    torch.manual_seed(options.seed)
    session = ChatSession(model, processor, decoding)
    streamer = TextStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    if options.question is None:
        chat_loop(session, lambda: input("> "), print, streamer, images)
    else:
        session.ask(options.question, images, streamer)
    return 0
