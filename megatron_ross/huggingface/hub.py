"""Folder of a checkpoint that is given as a path or as a hub id."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

from megatron_ross.checkpoint.locate import Kind, Located, kind_of_config
from megatron_ross.config.json_files import read_json
from megatron_ross.convert.unsupported import check_supported

_WANTED_FILES = ["*.json", "*.safetensors", "*.bin", "*.model", "*.txt", "*.jinja"]
_CONFIG_FILES = ["config.json", "adapter_config.json"]
"""Fetched first: they tell whether the weights can be used at all."""

_DOWNLOAD_OPTIONS = ("revision", "cache_dir", "token", "local_files_only", "force_download")


def local_folder(name_or_path: str | Path, **options: Any) -> Path:
    """The folder itself, or a downloaded snapshot of the hub repository.

    Args:
        name_or_path: existing folder, or hub id.
        options: transformers' download options; others are ignored. No code is downloaded.

    Raises:
        ValueError: neither a folder nor a repository that can be reached, or a checkpoint to be converted first.
    """
    if Path(name_or_path).is_dir():
        return _loadable(Path(name_or_path))
    chosen = {key: options[key] for key in _DOWNLOAD_OPTIONS if options.get(key) is not None}
    try:
        _loadable(Path(snapshot_download(str(name_or_path), allow_patterns=_CONFIG_FILES, **chosen)))
        folder = Path(snapshot_download(str(name_or_path), allow_patterns=_WANTED_FILES, **chosen))
    except (HFValidationError, RepositoryNotFoundError, LocalEntryNotFoundError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"checkpoint {str(name_or_path)!r} is neither a folder nor a reachable hub id: {reason}"
        ) from error
    return _loadable(folder)


def _loadable(folder: Path) -> Path:
    """The folder, unless it holds what no class here can load. Raises ValueError."""
    check_supported(folder)
    if (folder / "config.json").is_file():
        kind, detail = kind_of_config(read_json(folder / "config.json"))
        if kind is Kind.ORIGINAL_LLAVA:
            Located(str(folder), kind, folder, detail).require("checkpoint", Kind.ROSS, Kind.LLAVA)
    return folder
