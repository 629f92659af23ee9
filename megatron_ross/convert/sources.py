"""Where a conversion reads from: a local folder, or a model id on the Hugging Face hub.

Only weights, configs and tokenizer files are ever fetched; no code, and nothing that a config merely mentions.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import list_repo_files, snapshot_download

from megatron_ross.checkpoint.locate import unreachable_hub
from megatron_ross.config.json_files import read_json
from megatron_ross.config.shown import shown
from megatron_ross.convert.hf_io import WEIGHT_NAMES

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
)
CHAT_TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json")
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
GENERATION_FILES = ("generation_config.json",)
SOURCE_CONFIG = "source_config.json"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_WANTED_NAMES = {
    "config.json",
    "adapter_config.json",
    *TOKENIZER_FILES,
    *CHAT_TEMPLATE_FILES,
    *PROCESSOR_FILES,
    *GENERATION_FILES,
}
_STEMS = "|".join(WEIGHT_NAMES)
_WEIGHT_PATTERNS = (
    re.compile(rf"(?:{_STEMS})(?:-\d+-of-\d+)?\.safetensors(?:\.index\.json)?"),
    re.compile(rf"(?:{_STEMS})(?:-\d+-of-\d+)?\.bin(?:\.index\.json)?"),
)


def resolve_source(name: str, subfolder: str | None = None, weights: bool = True) -> Path:
    """Folder of a local model, or of a downloaded snapshot of a hub model.

    Args:
        name: path or hub id.
        subfolder: folder below it that holds the component if there is one (`vae` of a diffusion pipeline).
        weights: False to fetch configs and tokenizer files only.

    Raises:
        ValueError: neither a folder nor a hub id, or the download failed.
    """
    directory = Path(name)
    if not directory.is_dir():
        if not _HUB_ID.fullmatch(name) or name.startswith("."):
            raise ValueError(f"{name} is neither a folder nor a hub id (owner/name)")
        directory = _download(name, subfolder, weights)
    if subfolder and (directory / subfolder / "config.json").is_file():
        return directory / subfolder
    return directory


def _download(name: str, subfolder: str | None, weights: bool) -> Path:
    """The needed files of a hub model; without network, what an earlier download has left in the cache."""
    try:
        if reason := unreachable_hub():  # the library itself would try for half a minute
            raise ConnectionError(reason)
        wanted = wanted_files(list_repo_files(name), subfolder, weights)
        return Path(snapshot_download(name, allow_patterns=wanted))
    except Exception as error:  # the library has many error classes: network, rights, unknown id, ...
        try:
            return Path(snapshot_download(name, local_files_only=True))
        except Exception:
            reason = str(error).strip().split("\n")[0]
            raise ValueError(
                f"{name}: no such folder, and as a hub id it cannot be downloaded: {type(error).__name__}: {reason}"
            ) from error


def wanted_files(files: Sequence[str], subfolder: str | None, weights: bool) -> list[str]:
    """Files to fetch of those in a hub repository: one folder's configs and, unless turned off, its weights.

    Pickled weights are taken only if there are no safetensors; other formats, code and other folders never.

    Raises:
        ValueError: there are no weights.
    """
    prefix = f"{subfolder}/" if subfolder and f"{subfolder}/config.json" in files else ""
    names = [file.removeprefix(prefix) for file in files if file.startswith(prefix)]
    chosen = [name for name in names if name in _WANTED_NAMES]
    if weights:
        stored = [[name for name in names if pattern.fullmatch(name)] for pattern in _WEIGHT_PATTERNS]
        if not any(stored):
            raise ValueError("the repository has neither safetensors nor .bin weights")
        chosen += next(found for found in stored if found)
    return [prefix + name for name in chosen]


def source_name(name: str) -> str:
    """Name to record: the hub id, or the last component of a path."""
    path = Path(name)
    return path.resolve().name if path.is_dir() else name


def copy_assets(directory: Path, names: tuple[str, ...], target: Path) -> None:
    """Copy those of the named files that exist in `directory`, byte for byte."""
    for name in names:
        if (directory / name).is_file():
            shutil.copyfile(directory / name, target / name)


def check_tokenizer(directory: Path, vocab_size: int) -> None:
    """The tokenizer in `directory` has no id that the embedding lacks.

    Raises:
        ValueError: there is no tokenizer, or it does not fit.
    """
    highest = _highest_token_id(directory)
    if highest >= vocab_size:
        raise ValueError(
            f"{directory}: the tokenizer's largest id is {shown(highest)}, but vocab_size is {vocab_size}: "
            "this tokenizer belongs to another model"
        )


def _highest_token_id(directory: Path) -> int:
    ids = []
    for name in ("tokenizer.json", "vocab.json", "added_tokens.json", "tokenizer_config.json"):
        if (directory / name).is_file():
            ids += _ids(read_json(directory / name), name)
    if (directory / "tokenizer.model").is_file() and not (directory / "tokenizer.json").is_file():
        ids.append(_sentencepiece_size(directory / "tokenizer.model") - 1)
    if not ids:
        raise ValueError(f"{directory} has no tokenizer: expected tokenizer.json, vocab.json or tokenizer.model")
    return max(ids)


def _ids(content: dict, name: str) -> list[int]:
    """All token ids in one tokenizer file."""
    try:
        if name == "tokenizer.json":
            vocabulary = content["model"]["vocab"]
            ids = list(vocabulary.values()) if isinstance(vocabulary, dict) else [len(vocabulary) - 1]
            ids += [token["id"] for token in content.get("added_tokens", [])]
        elif name == "tokenizer_config.json":
            ids = list(content.get("added_tokens_decoder", {}))
        else:
            ids = list(content.values())
        return [int(value) for value in ids]
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
        raise ValueError(f"{name} is not a tokenizer file: {type(error).__name__} {error}") from None


def _sentencepiece_size(path: Path) -> int:
    from sentencepiece import SentencePieceProcessor

    try:
        return SentencePieceProcessor(model_file=str(path)).vocab_size()
    except (RuntimeError, OSError) as error:
        raise ValueError(f"{path} is not a sentencepiece model: {error}") from None


def write_json(path: Path, values: dict) -> None:
    """Write a config the way transformers does: indented by two, keys sorted."""
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
