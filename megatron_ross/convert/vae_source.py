"""An auto-encoder to import: a diffusers folder, or FLUX weights in their original format (`ae.safetensors`)."""

from __future__ import annotations

import re
from pathlib import Path

from torch import Tensor

from megatron_ross.config.model import VaeConfig
from megatron_ross.convert.component_config import vae_config, vae_folder_config
from megatron_ross.convert.hf_io import SafetensorsFile, TensorInfo, WeightFolder
from megatron_ross.convert.read_off import described, known_vae, shapes_below, vae_sizes
from megatron_ross.convert.sources import resolve_source

ORIGINAL_FILE = "ae.safetensors"
"""The auto-encoder in the repositories of FLUX.1, outside the diffusers folders."""

_LINEAR = re.compile(r".*\.attentions\.0\.to_(q|k|v|out\.0)\.weight")


class OriginalWeights(WeightFolder):
    """Original names and 1x1 convolutions of the attention, under the names and shapes that diffusers gives them.

    Raises:
        ValueError: the file is damaged, or holds something else.
    """

    def __init__(self, path: Path) -> None:
        file = SafetensorsFile(path)
        stored = file.tensors()
        num_blocks = 1 + max(
            (int(m[1]) for name in stored if (m := re.match(r"decoder\.up\.(\d+)\.", name))), default=-1
        )
        if not num_blocks:
            raise ValueError(
                f"{path} holds no auto-encoder in FLUX's own format ({ORIGINAL_FILE}: decoder.up.*); "
                "weights of diffusers are given as their folder"
            )
        self.directory, self.files = path.parent, [file]
        self._stored = {diffusers_name(name, num_blocks): name for name in stored}
        self.tensors: dict[str, TensorInfo] = {}
        for name, original in self._stored.items():
            info = stored[original]
            shape = info.shape[:2] if _LINEAR.fullmatch(name) and info.shape[2:] == (1, 1) else info.shape
            self.tensors[name] = TensorInfo(shape, info.dtype, path)

    def read(self, name: str) -> Tensor:
        return self.files[0].read(self._stored[name]).view(self.tensors[name].shape)


def diffusers_name(name: str, num_blocks: int) -> str:
    """diffusers' name of a tensor of the original format, which numbers the decoder's blocks from the image inwards."""
    for pattern, replacement in (
        (r"encoder\.down\.(\d+)\.block\.", r"encoder.down_blocks.\1.resnets."),
        (r"encoder\.down\.(\d+)\.downsample\.", r"encoder.down_blocks.\1.downsamplers.0."),
        (r"(encoder|decoder)\.mid\.block_1\.", r"\1.mid_block.resnets.0."),
        (r"(encoder|decoder)\.mid\.block_2\.", r"\1.mid_block.resnets.1."),
        (r"(encoder|decoder)\.mid\.attn_1\.norm\.", r"\1.mid_block.attentions.0.group_norm."),
        (r"(encoder|decoder)\.mid\.attn_1\.proj_out\.", r"\1.mid_block.attentions.0.to_out.0."),
        (r"(encoder|decoder)\.mid\.attn_1\.([qkv])\.", r"\1.mid_block.attentions.0.to_\2."),
        (r"(encoder|decoder)\.norm_out\.", r"\1.conv_norm_out."),
    ):
        name = re.sub("^" + pattern, replacement, name)
    if match := re.match(r"decoder\.up\.(\d+)\.(block|upsample)\.", name):
        kind = {"block": "resnets", "upsample": "upsamplers.0"}[match[2]]
        name = f"decoder.up_blocks.{num_blocks - 1 - int(match[1])}.{kind}.{name[match.end() :]}"
    return name.replace(".nin_shortcut.", ".conv_shortcut.")


def resolve_vae(name: str, weights: bool = True) -> Path:
    """Folder or file that `--vae` names: a weight file, else as `resolve_source` with the pipeline's folder `vae`."""
    return Path(name) if Path(name).is_file() else resolve_source(name, subfolder="vae", weights=weights)


def current_name(name: str) -> str:
    """Name that diffusers gives a tensor now; files from before 0.17 name the attention's projections otherwise."""
    old = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
    return re.sub(r"(?<=\.attentions\.0\.)(query|key|value|proj_attn)(?=\.)", lambda match: old[match[1]], name)


def open_vae(path: Path) -> WeightFolder:
    """Weights of an auto-encoder: a diffusers folder, a folder with `ae.safetensors`, or such a file.

    Raises:
        ValueError: it is none of these, or damaged.
    """
    if path.is_file():
        return OriginalWeights(path)
    original = path / ORIGINAL_FILE
    is_diffusers = any(path.glob("diffusion_pytorch_model*"))
    return OriginalWeights(original) if original.is_file() and not is_diffusers else WeightFolder(path)


def read_vae_config(path: Path) -> VaeConfig:
    """Config of the auto-encoder at `path`: from its config.json, else from its tensors if they are FLUX's.

    Raises:
        ValueError: there is neither, or a field is wrong.
    """
    if path.is_dir() and ((path / "config.json").is_file() or not (path / ORIGINAL_FILE).is_file()):
        return vae_folder_config(path)
    sizes = vae_sizes(shapes_below(open_vae(path).tensors, ""))
    known = known_vae(sizes)
    if known is None:
        raise ValueError(
            f"{path}: the auto-encoder is not FLUX.1's ({described(sizes)}), and its scaling factor is in no tensor: "
            f"give a folder with {ORIGINAL_FILE} and its diffusers config.json as --vae"
        )
    return vae_config(known, "built-in config of the FLUX auto-encoder")
