"""Conversations about images with a loaded model: one question, or a chat in the terminal."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoProcessor, LlavaForConditionalGeneration

from megatron_ross.checkpoint.locate import Kind, identify
from megatron_ross.convert.inference_files import template_end_ids, with_ends
from megatron_ross.convert.unsupported import readable_weights
from megatron_ross.data.images import open_decodable
from megatron_ross.data.rgb import Picture
from megatron_ross.evaluation.options import DTYPES, Decoding, check_device
from megatron_ross.huggingface import RossForConditionalGeneration, RossProcessor
from megatron_ross.huggingface.chat_templates import chat_template, training_template
from megatron_ross.huggingface.hub import local_folder

CHAT_HELP = "/image FILE shows a picture with the next question, /reset starts over, /quit ends"

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass
class ChatSession:
    """One conversation: what was said and shown so far."""

    model: Any
    processor: Any
    decoding: Decoding = field(default_factory=Decoding)
    messages: list[dict[str, Any]] = field(default_factory=list)
    images: list[Image.Image] = field(default_factory=list)

    def ask(self, question: str, images: list[Image.Image] | None = None, streamer: Any = None) -> str:
        """Ask, show `images` with the question, and remember both the question and the answer.

        Args:
            streamer: transformers streamer that gets the tokens as they come.

        Returns:
            The answer without special tokens.
        """
        content: list[dict[str, Any]] = [{"type": "image"} for _ in images or []]
        messages = [*self.messages, {"role": "user", "content": [*content, {"type": "text", "text": question}]}]
        shown = [*self.images, *(images or [])]
        text = self.processor.apply_chat_template(messages, add_generation_prompt=True)
        pictures = [model_rgb(self.model, image) for image in shown]
        inputs = self.processor(text=text, images=pictures or None, return_tensors="pt").to(self.model.device)
        output = self.model.generate(**inputs, streamer=streamer, **self.decoding.options())
        answer = self.processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        self.messages = [*messages, {"role": "assistant", "content": [{"type": "text", "text": answer}]}]
        self.images = shown
        return answer

    def reset(self) -> None:
        """Forget the conversation and its images."""
        self.messages, self.images = [], []


def chat_loop(
    session: ChatSession,
    read: Callable[[], str],
    write: Callable[[str], None],
    streamer: Any = None,
    images: list[Image.Image] | None = None,
) -> None:
    """Answer questions until the input ends or asks to quit. Mistakes in commands are told, not raised.

    Args:
        read: next line; raises EOFError at the end of the input.
        write: shows a line. Answers go to `streamer` if there is one, else here.
        images: shown with the first question.
    """
    pending = list(images or [])
    write(CHAT_HELP)
    while True:
        try:
            line = read().strip()
        except (EOFError, KeyboardInterrupt):
            return
        command, _, argument = line.partition(" ")
        if command == "/quit":
            return
        if command == "/reset":
            session.reset()
            pending = []
        elif command == "/image":
            try:
                pending.append(open_image(argument.strip()))
            except (ValueError, OSError) as error:
                write(f"error: {error}")
        elif command.startswith("/"):
            write(f"unknown command {command}; {CHAT_HELP}")
        elif line:
            answer = session.ask(line, pending, streamer)
            pending = []
            if streamer is None:
                write(answer)


def open_image(path: str | Path) -> Image.Image:
    """An image file in its own mode, which `model_rgb` or a RossProcessor turns into RGB.

    Raises:
        ValueError: it is not an image.
        OSError: it cannot be read.
    """
    return open_decodable(Path(path).read_bytes(), str(path))


def model_rgb(model: Any, image: Image.Image) -> Image.Image:
    """The image in RGB as a loaded model was trained (its config's `image_conversion`)."""
    return Picture(image).rgb(getattr(model.config, "image_conversion", "published"))


def load_for_inference(
    checkpoint: str,
    *,
    device: str | None = None,
    dtype: str = "auto",
    template: str | None = None,
    vision_tower: str | None = None,
    vae: str | None = None,
) -> tuple[Any, Any]:
    """Model (in evaluation mode) and processor of a composite checkpoint, or of a LLaVA export.

    Args:
        checkpoint: folder or hub id.
        device: default: the GPU if there is one.
        dtype: "bf16", "fp16", "fp32", or "auto": the checkpoint's on a GPU, float32 on a CPU.
        template: chat template; see `RossProcessor.from_pretrained`.
        vision_tower, vae: see `read_model_config`; a LLaVA export has no use for them.

    Raises:
        ValueError: unknown dtype, no such device, or the checkpoint cannot be loaded.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is unknown; use {', '.join(map(repr, DTYPES))}")
    device = _usable(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    stored = "auto" if torch.device(device).type == "cuda" else torch.float32
    chosen = _DTYPES.get(dtype, stored)
    folder = local_folder(checkpoint)
    found = identify(folder)
    found.require("checkpoint", Kind.ROSS, Kind.LLAVA)
    if found.kind is Kind.LLAVA:
        model, processor = _load_llava(folder, chosen, template)
    else:
        model = RossForConditionalGeneration.from_pretrained(folder, dtype=chosen, vision_tower=vision_tower, vae=vae)
        processor = RossProcessor.from_pretrained(folder, template=template, vision_tower=vision_tower, vae=vae)
    end_with_template(model, processor)
    return model.eval().to(device), processor


def _usable(device: str) -> str:
    """The device. Raises ValueError, before any weight is read, if there is none of that name."""
    check_device(device)
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch was built without CUDA
        raise ValueError(f"device={device}: cannot be used: {str(error).splitlines()[0]}") from None
    return device


def end_with_template(model: Any, processor: Any) -> None:
    """Answers end where the training template ends them, besides where the checkpoint says.

    The files of a base model name another token, and older exports passed that on.
    """
    ends = template_end_ids(training_template(processor.chat_template), processor.tokenizer)
    model.generation_config.eos_token_id = with_ends(model.generation_config.eos_token_id, ends)


def _load_llava(folder: Path, dtype: Any, template: str | None) -> tuple[Any, Any]:
    """Stock LLaVA, complete."""
    readable_weights(folder)  # refuses damaged or missing files, by name
    model, info = LlavaForConditionalGeneration.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    missing = sorted(info.get("missing_keys") or ())
    if missing:
        raise ValueError(f"{folder} lacks {len(missing)} tensors of its config, e.g. {missing[0]}: export it again")
    processor = AutoProcessor.from_pretrained(folder)
    # Where torchvision is installed, transformers would resize with it: up to 2/255 off what the model was trained on.
    processor.image_processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    if processor.tokenizer.pad_token is None:  # batches need one; what is padded is masked
        processor.tokenizer.pad_token = processor.tokenizer.unk_token or processor.tokenizer.eos_token
    if template is not None:
        processor.chat_template = chat_template(template)
    return model, processor
