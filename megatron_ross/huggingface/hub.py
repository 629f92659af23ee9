"""Folder of a checkpoint that is given as a path or as a hub id."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

_WANTED_FILES = ["*.json", "*.safetensors", "*.bin", "*.model", "*.txt", "*.jinja"]
_DOWNLOAD_OPTIONS = ("revision", "cache_dir", "token", "local_files_only", "force_download")


def local_folder(name_or_path: str | Path, **options: Any) -> Path:
    """The folder itself, or a downloaded snapshot of the hub repository.

    Args:
        name_or_path: existing folder, or hub id.
        options: transformers' download options; others are ignored. No code is downloaded.

    Raises:
        ValueError: neither a folder nor a repository that can be reached.
    """
    if Path(name_or_path).is_dir():
        return Path(name_or_path)
    chosen = {key: options[key] for key in _DOWNLOAD_OPTIONS if options.get(key) is not None}
    try:
        return Path(snapshot_download(str(name_or_path), allow_patterns=_WANTED_FILES, **chosen))
    except (HFValidationError, RepositoryNotFoundError, LocalEntryNotFoundError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"checkpoint {str(name_or_path)!r} is neither a folder nor a reachable hub id: {reason}"
        ) from error
