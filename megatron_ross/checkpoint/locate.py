"""What a name of a model stands for, and where it is. Every tool asks here; needs no torch.

    runs/ross-7b                     RUN         a run folder, checkpoints/ in it
    runs/ross-7b/checkpoints         CHECKPOINT  Megatron format: its root, or one iteration
    exports/ross-7b                  ROSS        Hugging Face, the published composite format
    exports/llava-7b                 LLAVA       Hugging Face, stock LLaVA
    HaochenWang/ross-qwen2-7b        HUB         not looked up yet, see `look_up`

The other kinds are told apart so that a refusal can say what a folder is, and which command makes what is needed.
"""

from __future__ import annotations

import difflib
import os
import re
import shlex
import ssl
import urllib.error
import urllib.request
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from megatron_ross.checkpoint.manifest import (
    CHECKPOINTS_NAME,
    LATEST_NAME,
    MANIFEST_NAME,
    iteration_dir,
    resolve_checkpoint,
)
from megatron_ross.checkpoint.retention import complete_iterations
from megatron_ross.config.json_files import read_json
from megatron_ross.config.shown import shown

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_HUB_TIMEOUT_S = 10.0
_ROSS_TYPES = ("ross_qwen2", "ross_llama")
_TOWER_TYPES = ("clip", "siglip", "siglip2", "dinov2", "dinov2_with_registers")
_ADAPTER_FILES = (
    "mm_projector.bin",
    "mm_inv_projector.bin",
    "mm_projector.safetensors",
    "mm_inv_projector.safetensors",
)


class Kind(Enum):
    """Kinds of models; the value is what a message calls them."""

    RUN = "a run folder"
    CHECKPOINT = "a Megatron checkpoint"
    ROSS = "a Hugging Face checkpoint in the Ross format"
    LLAVA = "a stock LLaVA checkpoint"
    ORIGINAL_LLAVA = "a LLaVA checkpoint in the format of the original code"
    LANGUAGE_MODEL = "a language model alone"
    TOWER = "a vision tower alone"
    VAE = "an auto-encoder alone"
    PIPELINE = "a diffusion pipeline"
    LORA = "a LoRA adapter"
    ADAPTERS = "a folder of adapter files"
    OTHER = "a Hugging Face checkpoint of another architecture"
    HUB = "a hub id"


@dataclass(frozen=True)
class Located:
    """A model that was named: what it is and, unless it is a hub id, its folder."""

    name: str
    kind: Kind
    path: Path | None = None
    detail: str = ""
    """`model_type` where that helps."""

    def require(self, setting: str, *kinds: Kind) -> None:
        """Raises ValueError, with the command that makes what is needed, unless it is one of `kinds` or a hub id."""
        if self.kind not in (*kinds, Kind.HUB):
            raise ValueError(
                f"{setting}={shown(self.name, 300)}: is {self.kind.value}{self.detail}{self._advice(kinds)}"
            )

    def _advice(self, kinds: tuple[Kind, ...]) -> str:
        name, target = shlex.quote(self.name), f"checkpoints/{_last(self.name)}"
        parts = {
            Kind.LANGUAGE_MODEL: f"--llm {name} --vision-tower TOWER --vae VAE",
            Kind.TOWER: f"--llm LLM --vision-tower {name} --vae VAE",
            Kind.VAE: f"--llm LLM --vision-tower TOWER --vae {name}",
            Kind.PIPELINE: f"--llm LLM --vision-tower TOWER --vae {name}",
        }
        if self.kind in parts:
            return f"; make a whole model of it: megatron-ross import {parts[self.kind]} --output checkpoints/NAME"
        if self.kind in (Kind.ROSS, Kind.LLAVA) and Kind.ROSS not in kinds:
            return f"; import it first: megatron-ross import --checkpoint {name} --output {target}"
        if self.kind is Kind.LLAVA:
            return (
                "; it has no denoiser. Export the Megatron checkpoint it was made from: megatron-ross export "
                "--checkpoint RUN --format ross --output exports/NAME"
            )
        if self.kind in (Kind.RUN, Kind.CHECKPOINT):
            return f"; export it first: megatron-ross export --checkpoint {name} --output exports/{_last(self.name)}"
        if self.kind is Kind.ORIGINAL_LLAVA:
            return (
                f"; import it first: megatron-ross import --checkpoint {name}{self._tower()} --output {target}, or "
                "take the one that transformers has of it (config.json has a text_config, as llava-hf/llava-1.5-7b-hf)"
            )
        if self.kind is Kind.LORA:
            return "; merge it into its base model first, and name the merged folder"
        if self.kind is Kind.ADAPTERS:
            return (
                "; they go into a whole model: megatron-ross import --llm LLM --vision-tower TOWER --vae VAE "
                f"--mm-projector {name}/mm_projector.bin --output checkpoints/NAME"
            )
        return "; name a run folder, a Megatron checkpoint, a Ross or LLaVA export, or a hub id of one"

    def _tower(self) -> str:
        """The option for the tower that an original LLaVA names: its own folder seldom holds the weights."""
        tower = read_json(self.path / "config.json").get("mm_vision_tower") if self.path is not None else None
        return f" --vision-tower {shlex.quote(tower)}" if isinstance(tower, str) and tower else ""


def _last(name: str) -> str:
    """The last part of a path or hub id, for the name of what is made of it."""
    return shlex.quote(Path(name).name or "NAME")


def identify(name: str | os.PathLike[str], setting: str = "checkpoint") -> Located:
    """What `name` stands for; looks at local files only.

    Args:
        setting: what the name was given for, for the messages.

    Raises:
        ValueError: it is a file, a folder of something else, a run that has saved nothing yet, or nothing at all.
    """
    text = os.fspath(name)
    path = Path(text)
    if "\0" in text or not text:
        raise ValueError(f"{setting}={shown(text)}: {_WHAT_IS_MEANT}")
    if path.is_dir():
        return _folder(text, path, setting)
    if path.is_file():
        raise ValueError(f"{setting}={shown(text, 300)}: is a file; name the folder that it is in")
    if not _HUB_ID.fullmatch(text) or text.startswith(("./", "../", "~")):
        raise ValueError(f"{setting}={shown(text, 300)}: no such folder{_similar(path)}")
    return Located(text, Kind.HUB)


_WHAT_IS_MEANT = "name a run folder, a Megatron checkpoint, an exported folder or a hub id"


def _folder(name: str, path: Path, setting: str) -> Located:
    if any((path / file).is_file() for file in (MANIFEST_NAME, LATEST_NAME)) or complete_iterations(path):
        return Located(name, Kind.CHECKPOINT, path)
    root = path / CHECKPOINTS_NAME
    if root.is_dir():
        if (root / LATEST_NAME).is_file() or complete_iterations(root):
            return Located(name, Kind.RUN, path)
        if not (path / "config.json").is_file():
            raise ValueError(
                f"{setting}={shown(name, 300)}: is a run folder that has no checkpoint yet ({root} holds no complete "
                "one); wait for the first save (save_interval), or name another"
            )
    if (path / "adapter_config.json").is_file():  # the original LLaVA code saves config.json with it
        base = read_json(path / "adapter_config.json").get("base_model_name_or_path")
        return Located(name, Kind.LORA, path, f" of {shown(base, 100)}" if base else "")
    if (path / "config.json").is_file():
        kind, detail = kind_of_config(read_json(path / "config.json"))
        return Located(name, kind, path, detail)
    if (path / "model_index.json").is_file():
        return Located(name, Kind.PIPELINE, path)
    if any((path / file).is_file() for file in _ADAPTER_FILES):
        return Located(name, Kind.ADAPTERS, path)
    raise ValueError(
        f"{setting}={shown(name, 300)}: is no run folder with {CHECKPOINTS_NAME}/, no Megatron checkpoint (neither "
        f"{MANIFEST_NAME} nor {LATEST_NAME}) and no exported folder with config.json: name one of these, or a hub id"
    )


def kind_of_config(config: dict[str, Any]) -> tuple[Kind, str]:
    """What a config.json describes, and words on its `model_type` where a message needs them."""
    model_type = str(config.get("model_type"))
    if model_type in _ROSS_TYPES:
        return Kind.ROSS, ""
    if model_type == "llava" and isinstance(config.get("text_config"), dict):
        return Kind.LLAVA, ""
    if model_type == "llava" or "mm_vision_tower" in config:
        return Kind.ORIGINAL_LLAVA, f" (model_type {shown(model_type, 40)})"
    if config.get("_class_name") == "AutoencoderKL":
        return Kind.VAE, ""
    if model_type.removesuffix("_vision_model") in _TOWER_TYPES:
        return Kind.TOWER, ""
    detail = f" (model_type {shown(model_type, 40)})"
    architectures = config.get("architectures")
    if model_type in ("qwen2", "llama") or (isinstance(architectures, list) and "ForCausalLM" in str(architectures)):
        return Kind.LANGUAGE_MODEL, detail
    return Kind.OTHER, detail


def megatron_checkpoint(name: str | os.PathLike[str], setting: str) -> Path:
    """Folder of one iteration, the newest unless one is named.

    Raises:
        ValueError: it is another kind of model, and the message has the command that imports it; or it is incomplete.
    """
    found = identify(name, setting)
    found.require(setting, Kind.RUN, Kind.CHECKPOINT)
    if found.path is None:
        raise ValueError(
            f"{setting}={shown(found.name, 300)}: no such folder{_similar(Path(found.name))}; if it is a hub id, "
            f"import it first: megatron-ross import --checkpoint {found.name} --output checkpoints/{_last(found.name)}"
        )
    root = checkpoint_root(found)
    iterations = complete_iterations(root)
    if iterations and not any((root / file).exists() for file in (LATEST_NAME, MANIFEST_NAME)):
        return iteration_dir(root, iterations[-1])  # a run that was killed within its first save
    return resolve_checkpoint(root)


def checkpoint_root(found: Located) -> Path:
    """Folder of the iterations, or the one iteration that was named."""
    assert found.path is not None
    return found.path / CHECKPOINTS_NAME if found.kind is Kind.RUN else found.path


def look_up(found: Located, setting: str = "checkpoint") -> Located:
    """A hub id with the kind that its config.json tells; other models stay as they are. Fetches one small file.

    Raises:
        ValueError: the hub has no such model or cannot be reached, and the cache has none either.
    """
    if found.kind is not Kind.HUB:
        return found
    from huggingface_hub import hf_hub_download, try_to_load_from_cache  # takes a third of a second

    cached = try_to_load_from_cache(found.name, "config.json")
    if isinstance(cached, str):
        kind, detail = kind_of_config(read_json(Path(cached)))
        return Located(found.name, kind, None, detail)
    missing = f"{setting}={shown(found.name, 300)}: no such folder{_similar(Path(found.name))}, and as a hub id"
    if reason := unreachable_hub():
        raise ValueError(f"{missing} it cannot be downloaded: {reason}")
    try:
        config = hf_hub_download(found.name, "config.json")
    except Exception as error:  # the library has many error classes: rights, unknown id, no config.json, ...
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"{missing} it cannot be read: {type(error).__name__}: {reason}") from None
    kind, detail = kind_of_config(read_json(Path(config)))
    return Located(found.name, kind, None, detail)


def unreachable_hub() -> str:
    """Why the hub cannot be asked; empty if it answers. The library itself tries for half a minute."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    try:
        urllib.request.urlopen(constants.ENDPOINT, timeout=_HUB_TIMEOUT_S).close()
    except urllib.error.HTTPError:
        return ""  # it answers
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        if isinstance(reason, ssl.SSLError):
            return ""  # something answers; the library has certificates of its own
        return f"{constants.ENDPOINT} cannot be reached ({' '.join(str(reason).split())})"
    return ""


def _similar(path: Path) -> str:
    """Words that offer a neighbour of the same spelling."""
    try:
        names = [entry.name for entry in path.parent.iterdir() if entry.is_dir()]
    except OSError:
        return ""
    close = difflib.get_close_matches(path.name, names, n=1)
    return f" (did you mean {path.parent / close[0]}?)" if close else ""
