"""Write a torch_dist checkpoint tensor by tensor.

PyTorch's and Megatron's own writers keep every tensor of a file in memory until the file is closed. The format itself
is simple: data files hold one `torch.save` record per tensor chunk, and `.metadata` is a pickle that says where each
is.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_ross.checkpoint.reader import COMMON_NAME
from megatron_ross.convert.atomic import create_file, save_torch

MAX_FILE_BYTES = 5_000_000_000
BACKENDS = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
"""Content of metadata.json, by which Megatron recognises the format."""


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that exists once `load` is called."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def write_torch_dist(
    directory: Path, tensors: Mapping[str, LazyTensor], progress: Callable[[int], None] = lambda _: None
) -> None:
    """Write `tensors` as a complete torch_dist checkpoint that `megatron.core.dist_checkpointing.load` reads.

    Args:
        directory: existing empty folder.
        tensors: checkpoint key -> tensor; loaded one at a time, in this order.
        progress: called with the number of bytes after each tensor.
    """
    storage: dict[MetadataIndex, _StorageInfo] = {}
    for number, keys in enumerate(_files(tensors)):
        name = f"__0_{number}.distcp"
        with create_file(directory / name) as file:
            for key in keys:
                start = file.tell()
                save_torch(_loaded(key, tensors[key]), file)
                storage[_index(key, tensors[key])] = _StorageInfo(name, start, file.tell() - start)
                progress(tensors[key].nbytes)
    torch.save({}, directory / COMMON_NAME)
    _write_metadata(directory, tensors, storage)
    (directory / "metadata.json").write_text(json.dumps(BACKENDS))


def _files(tensors: Mapping[str, LazyTensor]) -> list[list[str]]:
    files: list[list[str]] = [[]]
    size = 0
    for key, tensor in tensors.items():
        if files[-1] and size + tensor.nbytes > MAX_FILE_BYTES:
            files.append([])
            size = 0
        files[-1].append(key)
        size += tensor.nbytes
    return files


def _loaded(key: str, lazy: LazyTensor) -> Tensor:
    tensor = lazy.load().detach().contiguous()
    if (tuple(tensor.shape), tensor.dtype) != (lazy.shape, lazy.dtype):
        raise AssertionError(f"{key}: planned {lazy.shape} {lazy.dtype}, got {tuple(tensor.shape)} {tensor.dtype}")
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def _index(key: str, tensor: LazyTensor) -> MetadataIndex:
    return MetadataIndex(key, torch.Size([0] * len(tensor.shape)), index=0)


def _write_metadata(
    directory: Path, tensors: Mapping[str, LazyTensor], storage: dict[MetadataIndex, _StorageInfo]
) -> None:
    entries = {}
    for key, tensor in tensors.items():
        size = torch.Size(tensor.shape)
        chunk = ChunkStorageMetadata(offsets=torch.Size([0] * len(size)), sizes=size)
        entries[key] = TensorStorageMetadata(TensorProperties(dtype=tensor.dtype), size, [chunk])
    index = Metadata(
        state_dict_metadata=dict(entries),
        storage_data=storage,
        storage_meta=StorageMeta(),
        version=CURRENT_DCP_VERSION,
    )
    with create_file(directory / ".metadata") as file:
        pickle.dump(index, file)
