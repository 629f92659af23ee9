"""Looks at a torch file before torch does: its parts may be packed, and unfold to anything."""

from __future__ import annotations

import zipfile
from pathlib import Path


def check_torch_file(path: Path) -> None:
    """A zipped torch file holds its parts as they are, so that it needs no more memory than it has bytes.

    Raises:
        ValueError: a part is compressed or claims more bytes than the file has, or the list of parts is damaged.
        OSError: the file cannot be read.
    """
    if not zipfile.is_zipfile(path):
        return
    size = path.stat().st_size
    try:
        with zipfile.ZipFile(path) as file:
            parts = file.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise ValueError(f"{path} is a damaged torch file: {error}") from None
    for part in parts:
        if part.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"{path}: its part {part.filename!r:.80} is compressed, as torch never writes it; refused")
    if sum(part.file_size for part in parts) > size:
        raise ValueError(f"{path}: its parts claim more bytes than the {size:,} of the file; refused")
