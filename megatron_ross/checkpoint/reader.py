"""Read a checkpoint's model tensors one at a time, in any process, whatever layout wrote them.

Megatron's torch_dist format is PyTorch's distributed checkpoint format: tensors cut into chunks, with a pickled index
(`.metadata`). Here the index is unpickled with an allow-list, chunks are loaded with `weights_only`, and tensors that
a partial checkpoint does not hold come from its `base`.
"""

from __future__ import annotations

import io
import math
import os
import pickle
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

from megatron_ross.checkpoint.manifest import ASSETS_NAME, Manifest, resolve_checkpoint
from megatron_ross.checkpoint.pickle_sizes import check_pickle_sizes
from megatron_ross.checkpoint.torch_files import check_torch_file
from megatron_ross.config.shown import shown

MODEL_PREFIXES = ("embedding.", "decoder.", "final_layernorm.", "output_layer.", "vision.", "denoiser.", "vae.")
"""First parts of the keys that belong to the model; everything else (optimizer.*, rng, ...) is not read here."""

_METADATA_NAME = ".metadata"
_MAX_INDEX_BYTES = 1 << 30
COMMON_NAME = "common.pt"
_MAX_CHAIN = 16
_SAFE_MODULES = {
    "torch.distributed.checkpoint.metadata",
    "torch.distributed.checkpoint.planner",
    "torch.distributed.checkpoint.filesystem",
}
_SAFE_NAMES = {
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("collections", "OrderedDict"),
    ("builtins", "set"),
    ("pathlib", "Path"),
    ("pathlib", "PosixPath"),
    ("pathlib", "PurePosixPath"),
    ("pathlib._local", "PosixPath"),
    ("megatron.core.dist_checkpointing.strategies.torch", "MCoreMetadata"),
    ("megatron.core.dist_checkpointing.strategies.torch", "MCoreSavePlan"),
}


class _MetadataUnpickler(pickle.Unpickler):
    """Unpickles the index of a checkpoint and nothing else: a foreign class or function is refused, not imported."""

    def find_class(self, module: str, name: str) -> Any:
        value = None
        if (module, name) in _SAFE_NAMES or module in _SAFE_MODULES:
            value = super().find_class(module, name)
        elif module == "torch":
            value = getattr(torch, name, None)
        allowed = (module, name) in _SAFE_NAMES or isinstance(value, torch.dtype)
        if module in _SAFE_MODULES:
            allowed = isinstance(value, type) and value.__module__ == module
        if not allowed:
            raise pickle.UnpicklingError(f"{module}.{name} does not belong into a checkpoint index")
        return value


def read_index(directory: Path) -> Metadata:
    """Read `directory/.metadata`, PyTorch's index of a distributed checkpoint.

    Raises:
        ValueError: the index is missing, damaged, or contains anything but an index; or a data file that it names is
            missing or shorter than it should be.
    """
    path = Path(directory) / _METADATA_NAME
    try:
        if path.stat().st_size > _MAX_INDEX_BYTES:
            raise ValueError(f"{path.stat().st_size:,} bytes are too many for an index")
        data = path.read_bytes()
        check_pickle_sizes(data)
        index = _MetadataUnpickler(io.BytesIO(data)).load()
    except FileNotFoundError:
        raise ValueError(f"{path} is missing: the checkpoint is incomplete") from None
    except Exception as error:  # unpickling damaged bytes raises nearly anything
        raise ValueError(f"{path} is not a readable checkpoint index: {type(error).__name__}: {error}") from None
    if not isinstance(index, Metadata) or not isinstance(index.storage_data, dict):
        raise ValueError(f"{path} is not an index of a distributed checkpoint")
    try:
        _check_files(Path(directory), index)
        _check_claims(path, index)
    except (AttributeError, TypeError, KeyError) as error:  # an index of other things than it should hold
        raise ValueError(f"{path} is not an index of a distributed checkpoint: {error}") from None
    return index


def _check_files(directory: Path, index: Metadata) -> None:
    needed: dict[str, int] = {}
    for info in index.storage_data.values():
        if Path(info.relative_path).name != info.relative_path:
            raise ValueError(f"{directory / _METADATA_NAME} names {info.relative_path!r}, outside of its folder")
        needed[info.relative_path] = max(needed.get(info.relative_path, 0), info.offset + info.length)
    for name, size in needed.items():
        path = directory / name
        if not path.is_file():
            raise ValueError(f"{path} is missing: the checkpoint is incomplete")
        if path.stat().st_size < size:
            raise ValueError(f"{path} is truncated: {path.stat().st_size} bytes, the index needs {size}")


def _check_claims(path: Path, index: Metadata) -> None:
    """No tensor claims more bytes than its chunks have in the files; whoever reads it allocates what it claims."""
    stored: Counter[str] = Counter()
    for place, info in index.storage_data.items():
        stored[place.fqn] += info.length
    for key, entry in index.state_dict_metadata.items():
        if not isinstance(entry, TensorStorageMetadata):
            continue
        if not all(isinstance(size, int) and size >= 0 for size in entry.size):
            raise ValueError(f"{path}: {shown(key)} has the impossible shape {shown(tuple(entry.size))}")
        claimed = math.prod(entry.size) * entry.properties.dtype.itemsize
        if claimed > stored[key]:
            raise ValueError(f"{path}: {shown(key)} claims {shown(claimed)} bytes, its chunks hold {stored[key]}")


def check_loadable(directory: Path) -> Metadata:
    """The index of a checkpoint that may be given to Megatron's loader, which unpickles every object in it freely.

    Ours hold tensors, and beside them `common.pt`, which is loaded with `weights_only`.

    Raises:
        ValueError: as `read_index`; the checkpoint holds a pickled object; or `common.pt` is not what it should be.
    """
    index = read_index(directory)
    for key, entry in index.state_dict_metadata.items():
        if not isinstance(entry, TensorStorageMetadata):
            raise ValueError(f"{directory}: {shown(key)} is not a tensor but a pickled object, which is not loaded")
    check_torch_file(Path(directory) / COMMON_NAME)
    return index


class _Storage(dcp.FileSystemReader):
    """PyTorch's reader with an index that is read once, through the allow-list."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.index = read_index(directory)
        self.index.storage_meta = StorageMeta()

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self.index

    def tensors(self) -> dict[str, TensorStorageMetadata]:
        return {
            key: value
            for key, value in self.index.state_dict_metadata.items()
            if isinstance(value, TensorStorageMetadata) and key.startswith(MODEL_PREFIXES)
        }


class CheckpointReader:
    """Model tensors of a checkpoint and of the checkpoints below it (`manifest.base`); the upper one wins.

    Attributes:
        directory: the iteration folder.
        manifest: its manifest.
        assets: the nearest `assets/` folder of the chain.
    """

    def __init__(self, chain: list[tuple[Path, Manifest]]) -> None:
        self.directory, self.manifest = chain[0]
        self._storages = [_Storage(directory) for directory, _ in chain]
        self._owner: dict[str, _Storage] = {}
        self._tensors: dict[str, TensorStorageMetadata] = {}
        for storage in reversed(self._storages):
            for key, entry in storage.tensors().items():
                self._owner[key], self._tensors[key] = storage, entry
        assets = [directory / ASSETS_NAME for directory, _ in chain if (directory / ASSETS_NAME).is_dir()]
        if not assets:
            raise ValueError(f"{self.directory / ASSETS_NAME} is missing: the checkpoint is incomplete")
        self.assets = assets[0]

    def keys(self) -> list[str]:
        """All model tensors, sorted."""
        return sorted(self._tensors)

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self._entry(key).size)

    def dtype(self, key: str) -> torch.dtype:
        return self._entry(key).properties.dtype

    def read(self, key: str) -> Tensor:
        """The whole tensor on the CPU, in its stored dtype. Memory: the tensor plus its largest chunk.

        Raises:
            ValueError: no such tensor, or its data cannot be read.
        """
        tensor = torch.empty(self.shape(key), dtype=self.dtype(key))
        storage = self._owner[key]
        try:
            with warnings.catch_warnings():  # it warns that it does what `no_dist` asks for
                warnings.filterwarnings("ignore", message="torch.distributed is disabled")
                dcp.load({key: tensor}, storage_reader=storage, no_dist=True)
        except CheckpointException as failure:
            error = next(iter(failure.failures.values()))[0]
            raise ValueError(f"{storage.path}: cannot read {key}: {type(error).__name__}: {error}") from error
        return tensor

    def _entry(self, key: str) -> TensorStorageMetadata:
        try:
            return self._tensors[key]
        except KeyError:
            raise ValueError(f"{self.directory} has no tensor {key}") from None


def open_checkpoint(path: str | os.PathLike[str]) -> CheckpointReader:
    """Open the checkpoint at `path` (root or iteration folder) together with the chain of its bases.

    Raises:
        ValueError: a checkpoint of the chain is missing, damaged, of another model, or the chain is a circle.
    """
    chain: list[tuple[Path, Manifest]] = []
    directory: Path | None = resolve_checkpoint(path)
    while directory is not None:
        manifest = Manifest.read(directory)
        if chain and manifest.model.same_tensors != chain[0][1].model.same_tensors:
            raise ValueError(
                f"{directory}, base of {chain[0][0]}, holds another model: give the base it was trained from"
            )
        chain.append((directory, manifest))
        if len(chain) > _MAX_CHAIN:
            raise ValueError(f"{chain[0][0]}: more than {_MAX_CHAIN} checkpoints in a chain of `base`; is it a circle?")
        directory = resolve_checkpoint(directory / manifest.base) if manifest.base is not None else None
    return CheckpointReader(chain)
