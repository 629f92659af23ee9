"""Export as stock `LlavaForConditionalGeneration`, with processor and chat template, for code that does not know Ross.

The image token must be a real id here. If the vocabulary has no spare row, one is added: a copy of the padding token's,
which is never looked up, and generation suppresses it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from megatron_ross.checkpoint.reader import CheckpointReader
from megatron_ross.convert.atomic import atomic_directory
from megatron_ross.convert.exporter import MAX_SHARD_BYTES, TensorExport, check_complete, language_dtype, with_progress
from megatron_ross.convert.hf_io import OutputTensor, write_safetensors
from megatron_ross.convert.inference_files import (
    chosen_template,
    complete_tokenizer,
    load_source_tokenizer,
    special_token_ids,
)
from megatron_ross.convert.layouts import llava_mappings
from megatron_ross.convert.llava_config import (
    IMAGE_TOKEN,
    PILLOW_FILE,
    PILLOW_PROCESSOR,
    generation_config,
    image_processor_config,
    llava_config,
    processor_config,
)
from megatron_ross.convert.llava_tokenizer import (
    SERVING_TEMPLATE,
    add_image_token,
    write_serving_template,
    write_tokenizer,
)
from megatron_ross.convert.model_card import model_card
from megatron_ross.convert.sources import write_json
from megatron_ross.convert.trained_template import check_trained_template
from megatron_ross.data.tokenizer import TextTokenizer

_VIEWER = (
    "Trained on pictures as a viewer shows them (`image_conversion: viewer`): transparent ones on white, 16-bit and "
    "float ones scaled. Stock processors drop transparency and clip: give them such pictures as 8-bit RGB."
)
_VOCABULARY_NAMES = ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight")


def export_llava(
    reader: CheckpointReader,
    output: Path,
    templates: Callable[[str], str],
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write a folder that transformers and vLLM load as LLaVA.

    Args:
        reader: the checkpoint.
        output: folder to create.
        templates: name of a training template -> Jinja text (`huggingface.chat_templates.chat_template`).
        dtype: dtype to cast to; None keeps what is stored.
        max_shard_bytes: largest safetensors file.

    Raises:
        ValueError: the checkpoint is incomplete, its projector is not two layers, or `output` exists.
        OSError: writing failed.
    """
    check_complete(reader)
    check_trained_template(reader)
    manifest = reader.manifest
    export = TensorExport(reader, llava_mappings(manifest.model), dtype)
    tokenizer = load_source_tokenizer(reader)
    training_ids = TextTokenizer(tokenizer)
    template = chosen_template(reader, tokenizer, templates)
    token_ids = special_token_ids(reader, tokenizer, template.name)
    complete_tokenizer(tokenizer, template, token_ids)
    image_token_id = add_image_token(tokenizer)
    extra_rows = max(0, image_token_id + 1 - manifest.model.language.vocab_size)
    tensors = [_extended(tensor, extra_rows) for tensor in export.tensors()]
    total = sum(tensor.nbytes for tensor in tensors)
    with atomic_directory(output, total) as directory:
        write_json(
            directory / "config.json", llava_config(manifest, token_ids, image_token_id, language_dtype(reader, dtype))
        )
        write_tokenizer(directory, tokenizer, training_ids)
        has_serving_template = write_serving_template(directory)
        write_json(directory / "generation_config.json", generation_config(token_ids, image_token_id))
        write_json(directory / "preprocessor_config.json", image_processor_config(manifest.model))
        (directory / PILLOW_FILE).write_text(PILLOW_PROCESSOR, "utf-8")
        write_json(directory / "processor_config.json", processor_config(manifest.model))
        serving_template = SERVING_TEMPLATE if has_serving_template else None
        notes = _notes(image_token_id, extra_rows, manifest.model.vision.image_conversion)
        card = model_card(reader, "llava", notes, serving_template)
        (directory / "README.md").write_text(card, "utf-8")
        with tqdm(total=total, unit="B", unit_scale=True, desc="writing safetensors") as bar:
            data = _extended_data(export.data(), extra_rows, token_ids["pad_token_id"])
            write_safetensors(directory, tensors, with_progress(data, bar), max_shard_bytes)


def _extended(tensor: OutputTensor, rows: int) -> OutputTensor:
    if tensor.name not in _VOCABULARY_NAMES:
        return tensor
    return replace(tensor, shape=(tensor.shape[0] + rows, *tensor.shape[1:]))


def _extended_data(data: Iterator[tuple[str, Tensor]], rows: int, copied_row: int) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in data:
        if rows and name in _VOCABULARY_NAMES:
            tensor = torch.cat([tensor, tensor[copied_row].expand(rows, -1)])
        yield name, tensor


def _notes(image_token_id: int, extra_rows: int, image_conversion: str) -> tuple[str, ...]:
    added = f", in {extra_rows} added row(s) of the vocabulary" if extra_rows else ""
    return (
        f"`{IMAGE_TOKEN}` has id {image_token_id}{added}; generation suppresses it.",
        "SGLang 0.5.23 refuses the `default` feature selection that CLIP towers need; SigLIP exports load there.",
        *([_VIEWER] if image_conversion == "viewer" else []),
    )
