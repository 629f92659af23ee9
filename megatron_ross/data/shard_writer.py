"""A data set as WebDataset tars, in the form that `shards.ShardFile` reads. Can be stopped and run again."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tarfile
from pathlib import Path

from tqdm import tqdm

from megatron_ross.data.dataset import RossDataset
from megatron_ross.data.errors import ImageError
from megatron_ross.data.shards import IMAGE_TYPES, write_sample
from megatron_ross.text_files import replace_text

_CONTENT = "content.json"


def write_shards(dataset: RossDataset, skipped: set[int], folder: Path, samples_per_shard: int) -> int:
    """Write all samples but the `skipped` ones to `folder`/000000.tar and so on; returns the number of tars.

    A tar appears when it is complete, and is kept when this is run again for the same samples.

    Raises:
        ValueError: the folder holds tars of other samples.
    """
    folder.mkdir(parents=True, exist_ok=True)
    usable = [i for i in range(len(dataset)) if i not in skipped]
    _claim(folder, f"{dataset.records_fingerprint} {dataset.images_fingerprint} {samples_per_shard} {usable}")
    starts = range(0, len(usable), samples_per_shard)
    for number, start in enumerate(tqdm(starts, desc=f"writing {folder}", unit="shard")):
        target = folder / f"{number:06}.tar"
        if target.exists():
            continue
        temporary = target.with_suffix(".tmp")
        with tarfile.open(temporary, "w") as tar:
            for index in usable[start : start + samples_per_shard]:
                _add_sample(tar, dataset, index)
        os.replace(temporary, target)
    return len(starts)


def _claim(folder: Path, content: str) -> None:
    """Note what the folder's tars are made of, or compare with what was noted. Raises ValueError."""
    digest = hashlib.blake2b(content.encode(), digest_size=16).hexdigest()
    note = folder / _CONTENT
    if not note.exists():
        replace_text(note, json.dumps({"content": digest}) + "\n")
    elif json.loads(note.read_text())["content"] != digest:
        raise ValueError(f"{folder} holds shards of other samples or of another size; name an empty folder")


def _add_sample(tar: tarfile.TarFile, dataset: RossDataset, index: int) -> None:
    """Append one sample. One whose files cannot be read (that was not looked at before) is left out, and named."""
    record = dataset.record(index)
    images = []
    for number, name in enumerate(record.images):
        kind = Path(name).suffix[1:].lower()
        try:
            images.append((kind if kind in IMAGE_TYPES else "img", dataset.read_image(index, number, name)))
        except ImageError as error:
            print(f"left out: {record.where}: {error}", file=sys.stderr)
            return
    turns = [{"from": turn.role, "value": turn.text} for turn in record.turns]
    write_sample(tar, f"{index:09}", {"id": record.id, "conversations": turns}, images)
