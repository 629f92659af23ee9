"""Checkpoints that people have and that hold no plain weights: recognised by their files and tensor names."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_ross.config.json_files import read_json
from megatron_ross.config.shown import shown

if TYPE_CHECKING:
    from megatron_ross.convert.hf_io import WeightFolder

_LORA = "merge it into its base model first (peft: merge_and_unload(), then save_pretrained())"
_QUANTISED = "quantised weights are not read: give the original checkpoint in bfloat16, float16 or float32"
_WRAPPED = "save the state dict of the module inside"

_NAMES = (
    (r"(?:^|\.)lora_(?:A|B|embedding_A|embedding_B|magnitude_vector)\b", f"are a LoRA adapter's: {_LORA}"),
    (r"^base_model\.model\.|\.base_layer\.|\.modules_to_save\.", f"are those of an unmerged PEFT model: {_LORA}"),
    (
        r"\.(?:qweight|qzeros|g_idx|SCB|weight_packed|weight_scale|weight_scale_inv|absmax|quant_map)$|\.quant_state\.",
        f"are those of a quantised model: {_QUANTISED}",
    ),
    (r"^module\.", f"are those of a model inside DistributedDataParallel or DeepSpeed: {_WRAPPED}"),
    (r"^_orig_mod\.", f"are those of a compiled model: {_WRAPPED}"),
    (r"\b_fsdp_wrapped_module\.", f"are those of a model inside FSDP: {_WRAPPED}"),
)
"""Pattern of a tensor's name -> what such names are."""


def check_supported(directory: Path) -> None:
    """Refuse a folder whose weights are an adapter, quantised, or shards of an optimizer's format.

    Raises:
        ValueError: says which, and what to do.
    """
    if not directory.is_dir():
        return
    if (directory / "adapter_config.json").is_file():
        base = read_json(directory / "adapter_config.json").get("base_model_name_or_path")
        of = f" of {shown(base)}" if isinstance(base, str) and base else ""
        raise ValueError(f"{directory} is a LoRA adapter{of} (adapter_config.json): {_LORA}")
    config = read_json(directory / "config.json") if (directory / "config.json").is_file() else {}
    for name in ("quantization_config", "compression_config"):
        if config.get(name):
            method = config[name].get("quant_method") if isinstance(config[name], dict) else None
            raise ValueError(f"{directory}/config.json has {name} (method {shown(method)}): {_QUANTISED}")
    if any(directory.glob("*.gguf")) and not any(directory.glob("*.safetensors")):
        raise ValueError(f"{directory} holds GGUF files: {_QUANTISED}")
    if (directory / "zero_to_fp32.py").is_file() and not any(_weights(directory)):
        raise ValueError(
            f"{directory} holds DeepSpeed ZeRO shards: run `python zero_to_fp32.py . pytorch_model.bin` in it first"
        )


def recognised(names: Iterable[str]) -> str | None:
    """What kind of checkpoint has such tensor names, if it is one that cannot be read."""
    names = list(names)
    for pattern, kind in _NAMES:
        found = next((name for name in names if re.search(pattern, name)), None)
        if found is not None:
            return f"its tensors ({found}, ...) {kind}"
    return None


def readable_weights(directory: Path) -> WeightFolder:
    """The tensors of a folder.

    Raises:
        ValueError: files are damaged or missing, or the names are those of an adapter, a quantised or a wrapped model.
    """
    from megatron_ross.convert.hf_io import WeightFolder  # imports torch; `check_supported` needs none

    folder = WeightFolder(directory)
    if (kind := recognised(folder.tensors)) is not None:
        raise ValueError(f"{directory}: {kind}")
    return folder


def _weights(directory: Path) -> list[Path]:
    return [*directory.glob("*.safetensors"), *directory.glob("*.bin"), *directory.glob("*.bin.index.json")]
