"""Random checkpoints of real size, written without ever holding more than one tensor."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from megatron_ross.convert.component_config import language_config
from megatron_ross.convert.hf_io import OutputTensor, write_safetensors
from megatron_ross.convert.names_language import head_mappings, language_mappings


def write_random_llm(folder: Path, tokenizer: Path, config: dict[str, object], max_shard_bytes: int = 4 << 30) -> int:
    """Write a language model with random bfloat16 weights and the tokenizer of the folder `tokenizer`.

    Returns:
        bytes of the largest tensor.
    """
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    for file in tokenizer.iterdir():
        if file.name not in ("config.json", "model.safetensors"):
            shutil.copy(file, folder)
    model = language_config(dict(config), "test")
    parts = [part for row in language_mappings(model) + head_mappings(model) for part in row.parts]
    tensors = [OutputTensor(part.name, part.shape, torch.bfloat16) for part in parts]
    write_safetensors(folder, tensors, _random(tensors), max_shard_bytes)
    return max(tensor.nbytes for tensor in tensors)


def _random(tensors: list[OutputTensor]) -> Iterator[tuple[str, Tensor]]:
    """Finite random values: 15 random bits, with an exponent that is not all ones."""
    generator = torch.Generator().manual_seed(0)
    for tensor in tensors:
        bits = torch.empty(tensor.shape, dtype=torch.int16).random_(0, 0x3F80, generator=generator)
        yield tensor.name, bits.view(torch.bfloat16)
