"""Processor of Ross models: images and prompts -> model inputs, by the same code that prepares training data.

Images are padded to a square (or not, as the config says) and resized with Pillow; text is split at `<image>` and its
pieces are tokenised on their own; every `<image>` becomes as many image tokens (id -200) as the tower has patches.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoTokenizer, BatchFeature, ProcessorMixin

from megatron_ross.config.json_files import read_json
from megatron_ross.config.model import IMAGE_TOKEN_ID, VisionConfig
from megatron_ross.config.model_limits import RESAMPLE_FILTERS
from megatron_ross.convert.checked_fields import Fields
from megatron_ross.convert.component_config import image_statistics, vision_config
from megatron_ross.data.images import ImageProcessor, decode_image
from megatron_ross.data.tokenizer import IMAGE_PLACEHOLDER, TextTokenizer
from megatron_ross.huggingface.chat_templates import chat_template as training_template
from megatron_ross.huggingface.configuration_ross import read_model_config
from megatron_ross.huggingface.hub import local_folder

_PROCESSOR_FILE = "processor_config.json"
_DOWNLOAD_SECONDS = 30


def expand_image_tokens(input_ids: Sequence[int], num_image_tokens: int) -> list[int]:
    """Replace every single IMAGE_TOKEN_ID by `num_image_tokens` of them."""
    expanded: list[int] = []
    for token in input_ids:
        expanded += [IMAGE_TOKEN_ID] * num_image_tokens if token == IMAGE_TOKEN_ID else [token]
    return expanded


class RossProcessor(ProcessorMixin):
    """Tokenizer and image preprocessing of one checkpoint.

    Args:
        tokenizer: Hugging Face tokenizer of the checkpoint.
        vision: `dataclasses.asdict` of the tower's VisionConfig.
        chat_template: Jinja text; see `chat_templates.py`.
    """

    def __init__(self, tokenizer: Any, vision: dict[str, Any], chat_template: str | None = None, **kwargs: Any) -> None:
        super().__init__(tokenizer, chat_template=chat_template)
        self.vision = vision
        config = VisionConfig(
            **{**vision, "image_mean": tuple(vision["image_mean"]), "image_std": tuple(vision["image_std"])}
        )
        self.num_image_tokens = config.num_image_tokens
        self.image_transform = ImageProcessor.from_config(config)
        self.text_tokenizer = TextTokenizer(tokenizer)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        template: str | None = None,
        vision_tower: str | Path | None = None,
        vae: str | Path | None = None,
        **kwargs: Any,
    ) -> RossProcessor:
        """Processor of a composite checkpoint, or one saved by `save_pretrained`.

        Args:
            pretrained_model_name_or_path: folder or hub id.
            template: chat template to use: "qwen_2", "v1", "llama3" or "plain". Default: the one stored in the
                checkpoint, else the one the model family is trained with.
            vision_tower, vae: see `read_model_config`.

        Raises:
            ValueError: files are missing or wrong.
        """
        folder = local_folder(pretrained_model_name_or_path, **kwargs)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        vision = _stored_vision(folder)
        if vision is None:
            vision = read_model_config(folder, vision_tower, vae).to_dict()["vision"]
        stored = folder / "chat_template.jinja"
        if template is None and stored.is_file():
            return cls(tokenizer, vision, chat_template=stored.read_text(encoding="utf-8"))
        return cls(tokenizer, vision, chat_template=training_template(template or default_template(tokenizer)))

    def to_dict(self) -> dict[str, Any]:
        """What `save_pretrained` writes to processor_config.json."""
        return {"processor_class": type(self).__name__, "vision": self.vision}

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        padding_side: str = "left",
        **kwargs: Any,
    ) -> BatchFeature:
        """Model inputs of one prompt or a batch of prompts.

        Args:
            images: PIL images, paths, `http(s)` or `data:` URLs (any nesting), in the order in which `<image>` appears
                in the texts. Files are decoded as in training.
            text: one prompt or several.
            padding_side: where shorter prompts of a batch are padded; "left" for generation.
            kwargs: accepted and ignored (`return_tensors`, `padding`, ...): the result is padded PyTorch tensors.

        Returns:
            `input_ids` and `attention_mask` int64 [b, s] and, with images, `pixel_values` float32 [n, 3, P, P].

        Raises:
            ValueError: the number of images and of placeholders differ, one cannot be read, or there is nothing to
                process.
        """
        flat = flatten_images(images)
        data: dict[str, Tensor] = {}
        if text is not None:
            texts = [text] if isinstance(text, str) else list(text)
            placeholders = sum(t.count(IMAGE_PLACEHOLDER) for t in texts)
            if placeholders != len(flat):
                raise ValueError(
                    f"the text has {placeholders} {IMAGE_PLACEHOLDER} placeholders for {len(flat)} images; put one in "
                    "the text for every image"
                )
            data.update(self._pad([self.encode(t) for t in texts], padding_side))
        elif not flat:
            raise ValueError("give text, images or both")
        if flat:
            data["pixel_values"] = self.pixels(flat)
        return BatchFeature(data)

    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt, every `<image>` expanded to its image tokens."""
        return expand_image_tokens(self.text_tokenizer.encode_with_images(text), self.num_image_tokens)

    def pixels(self, images: Sequence[Image.Image]) -> Tensor:
        """Preprocess images: float32 [n, 3, P, P].

        They become RGB as the model was trained (`image_conversion`), so give them as they were opened, not converted.
        """
        return torch.stack([self.image_transform(image) for image in images])

    def text_before_image(self) -> str:
        """What the chat template puts in front of the image of a first question."""
        question = [{"role": "user", "content": [{"type": "image"}]}]
        return self.apply_chat_template(question).partition(IMAGE_PLACEHOLDER)[0]

    def decode(self, token_ids: Any, **kwargs: Any) -> str:
        """Text of one sequence; image tokens are left out."""
        ids = token_ids.tolist() if isinstance(token_ids, Tensor) else list(token_ids)
        return self.tokenizer.decode([i for i in ids if i != IMAGE_TOKEN_ID], **kwargs)

    def batch_decode(self, sequences: Any, **kwargs: Any) -> list[str]:
        """Texts of several sequences; image tokens are left out."""
        return [self.decode(sequence, **kwargs) for sequence in sequences]

    def post_process_image_text_to_text(
        self, generated_outputs: Any, skip_special_tokens: bool = True, **kwargs: Any
    ) -> list[str]:
        """Texts of generated sequences, for transformers' pipelines."""
        return self.batch_decode(generated_outputs, skip_special_tokens=skip_special_tokens, **kwargs)

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", "pixel_values"]

    def _pad(self, rows: list[list[int]], side: str) -> dict[str, Tensor]:
        if side not in ("left", "right"):
            raise ValueError(f"padding_side {side!r} must be 'left' or 'right'")
        width = max(map(len, rows))
        ids = torch.full((len(rows), width), self.text_tokenizer.pad_id)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            place = slice(width - len(row), width) if side == "left" else slice(0, len(row))
            ids[i, place] = torch.tensor(row)
            mask[i, place] = 1
        return {"input_ids": ids, "attention_mask": mask}


def default_template(tokenizer: Any) -> str:
    """Training template of the model family that the tokenizer belongs to."""
    vocabulary = tokenizer.get_vocab()
    if "<|eot_id|>" in vocabulary:
        return "llama3"
    return "qwen_2" if "<|im_end|>" in vocabulary else "v1"


def flatten_images(images: Any) -> list[Image.Image]:
    """One image, a list of images or lists of images (None for no image) -> flat list; see `RossProcessor`.

    Raises:
        ValueError: something in it is no image, or cannot be read.
    """
    if images is None:
        return []
    if isinstance(images, Image.Image):
        return [images]
    if isinstance(images, str | Path):
        return [read_image(images)]
    if isinstance(images, list | tuple):
        return [image for group in images for image in flatten_images(group)]
    raise ValueError(f"images must be PIL images, paths, URLs or lists of them, not {type(images).__name__}")


def read_image(source: str | Path) -> Image.Image:
    """Image of a path, an `http(s)` URL or a `data:` URL, as RGB.

    Raises:
        ValueError: it cannot be read, or is no image.
    """
    text = str(source)
    shown = text if len(text) <= 200 else text[:197] + "..."
    try:
        if text.startswith(("http://", "https://")):
            with urlopen(text, timeout=_DOWNLOAD_SECONDS) as answer:
                data = answer.read()
        elif text.startswith("data:"):
            data = base64.b64decode(text.partition(",")[2], validate=True)
        else:
            data = Path(source).read_bytes()
    except (OSError, binascii.Error) as error:  # also what urllib raises
        raise ValueError(f"image {shown!r} cannot be read: {error}") from None
    return decode_image(data, shown)


def _stored_vision(folder: Path) -> dict[str, Any] | None:
    """`vision` of a processor_config.json written by `save_pretrained`, checked; None if there is none."""
    path = folder / _PROCESSOR_FILE
    if not path.is_file():
        return None
    stored = Fields(read_json(path), str(path))
    if not stored.has("vision"):
        return None
    vision = stored.table("vision")
    checked = vision_config(
        vision.table("hf_config").values,
        vision.where,
        *image_statistics(vision.values, vision.where),
        select_layer=vision.integer("select_layer", -1024, 1024, -2),
        image_aspect_ratio=vision.choice("image_aspect_ratio", ("pad", "square"), "pad"),
        image_conversion=vision.choice("image_conversion", ("published", "viewer"), "published"),
    )
    filters = {"resample": vision.choice("resample", RESAMPLE_FILTERS, checked.resample)}
    crop = vision.boolean("do_center_crop") if vision.has("do_center_crop") else None
    return asdict(checked) | filters | {"do_center_crop": crop}
