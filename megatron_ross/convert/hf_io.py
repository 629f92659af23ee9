"""Read Hugging Face weight files tensor by tensor, and write safetensors shards the same way.

safetensors' own reader maps whole shards into memory, and its writer wants a whole shard in memory. Here tensors are
read and written at their offsets, so memory stays at one tensor. Torch pickles (`.bin`) are memory-mapped with
`weights_only` and dropped after every gigabyte.
"""

from __future__ import annotations

import json
import os
import struct
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_ross.checkpoint.torch_files import check_torch_file
from megatron_ross.config.json_files import read_json
from megatron_ross.config.shown import shown
from megatron_ross.convert.atomic import create_file

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
_REMAP_AFTER_BYTES = 1 << 30
WEIGHT_NAMES = ("model", "diffusion_pytorch_model", "pytorch_model")
"""Stems of the weight files of transformers and diffusers, e.g. model.safetensors, pytorch_model.bin.index.json."""


@dataclass(frozen=True)
class TensorInfo:
    """Shape and dtype of a stored tensor, and the file that has it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    file: Path


class WeightFile(ABC):
    """One file of named tensors."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @abstractmethod
    def tensors(self) -> dict[str, TensorInfo]:
        """What the file holds."""

    @abstractmethod
    def read(self, name: str) -> Tensor:
        """One tensor, in memory of its own."""


class SafetensorsFile(WeightFile):
    """A `.safetensors` file, read at offsets."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        try:
            with safe_open(path, framework="pt"):
                pass  # the library checks the header: sizes, overlaps, that the file is as long as it says
        except (SafetensorError, OSError, ValueError) as error:
            raise ValueError(f"{path} is damaged or truncated: {error}") from None
        with path.open("rb") as file:
            (header_size,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(header_size))
        header.pop("__metadata__", None)
        self._entries = header
        self._data_start = 8 + header_size

    def tensors(self) -> dict[str, TensorInfo]:
        for name, entry in self._entries.items():
            if entry["dtype"] not in _DTYPES:
                raise ValueError(f"{self.path}: {name} has dtype {entry['dtype']}: quantised weights are not read")
        return {n: TensorInfo(tuple(e["shape"]), _DTYPES[e["dtype"]], self.path) for n, e in self._entries.items()}

    def read(self, name: str) -> Tensor:
        entry = self._entries[name]
        begin, end = entry["data_offsets"]
        data = torch.empty(end - begin, dtype=torch.uint8)
        with self.path.open("rb") as file:
            file.seek(self._data_start + begin)
            if file.readinto(data.numpy().data) != end - begin:
                raise ValueError(f"{self.path} is truncated inside {name}")
        return data.view(_DTYPES[entry["dtype"]]).view(entry["shape"])


class TorchFile(WeightFile):
    """A `.bin` pickle with tensors only."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._mapped: dict[str, Tensor] | None = None
        self._bytes_read = 0

    def tensors(self) -> dict[str, TensorInfo]:
        return {name: TensorInfo(tuple(t.shape), t.dtype, self.path) for name, t in self._load().items()}

    def read(self, name: str) -> Tensor:
        tensor = self._load()[name].clone()
        self._bytes_read += tensor.nbytes
        if self._bytes_read > _REMAP_AFTER_BYTES:  # pages of a mapping count as ours until it goes
            self._mapped, self._bytes_read = None, 0
        return tensor

    def _load(self) -> dict[str, Tensor]:
        if self._mapped is None:
            self._mapped = load_torch_tensors(self.path)
        return self._mapped


def load_torch_tensors(path: Path) -> dict[str, Tensor]:
    """Flat dict of tensors from a torch pickle, memory-mapped where the file allows it.

    Raises:
        ValueError: the file is damaged, or holds anything else than named tensors.
    """
    try:
        check_torch_file(path)
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist") from None
    except Exception as error:  # damaged pickles raise nearly anything
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"{path} is not a readable torch file of tensors: {type(error).__name__}: {reason}") from None
    if not isinstance(loaded, dict) or not all(
        isinstance(k, str) and isinstance(v, Tensor) and v.layout == torch.strided for k, v in loaded.items()
    ):
        raise ValueError(f"{path} should hold a flat dict of tensors")
    for name, tensor in loaded.items():
        if tensor.nbytes > tensor.untyped_storage().nbytes():
            raise ValueError(f"{path}: {name} repeats its data to fill the shape {list(tensor.shape)}; refused")
    return loaded


class WeightFolder:
    """All tensors of a Hugging Face model folder.

    Raises:
        ValueError: no weights, a missing or damaged shard, or an index that does not agree with its shards.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.files = [self._open(path) for path in _weight_paths(directory)]
        self._owner: dict[str, WeightFile] = {}
        self.tensors: dict[str, TensorInfo] = {}
        for file in self.files:
            for name, info in file.tensors().items():
                if name in self.tensors:
                    raise ValueError(f"{file.path}: {name} is also in {self.tensors[name].file.name}")
                self.tensors[name], self._owner[name] = info, file

    def read(self, name: str) -> Tensor:
        return self._owner[name].read(name)

    @staticmethod
    def _open(path: Path) -> WeightFile:
        return SafetensorsFile(path) if path.suffix == ".safetensors" else TorchFile(path)


def _weight_paths(directory: Path) -> list[Path]:
    for suffix in ("safetensors", "bin"):
        for stem in WEIGHT_NAMES:
            index = directory / f"{stem}.{suffix}.index.json"
            if index.is_file():
                return _indexed_paths(index)
            single = directory / f"{stem}.{suffix}"
            if single.is_file():
                return [single]
    raise ValueError(f"{directory} has no weights: expected model.safetensors, pytorch_model.bin or their index")


def _indexed_paths(index: Path) -> list[Path]:
    try:
        names = sorted(set(read_json(index)["weight_map"].values()))
    except (KeyError, TypeError, AttributeError):
        raise ValueError(f"{index} is not an index of weight files") from None
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or not name.endswith((".safetensors", ".bin")):
            raise ValueError(f"{index} names {shown(name)}, which is not a weight file in its own folder")
        if not os.path.isfile(index.parent / name):  # pathlib raises for names that no file can have
            raise ValueError(f"{index} names {name:.200}, which is missing")
    return [index.parent / name for name in names]


@dataclass(frozen=True)
class OutputTensor:
    """A tensor to be written: everything the header needs before the data exist."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def plan_shards(tensors: Sequence[OutputTensor], max_bytes: int) -> list[list[OutputTensor]]:
    """Cut the list, in order, into shards of at most `max_bytes` (a larger tensor gets a shard of its own)."""
    shards: list[list[OutputTensor]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.nbytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    return shards


def write_safetensors(
    directory: Path, tensors: Sequence[OutputTensor], data: Iterable[tuple[str, Tensor]], max_shard_bytes: int
) -> None:
    """Write model.safetensors, or shards with an index as `transformers` names them.

    Args:
        tensors: what will be written, in order.
        data: the tensors themselves, lazily, in the same order.
    """
    shards = plan_shards(tensors, max_shard_bytes)
    names = ["model.safetensors"]
    if len(shards) > 1:
        names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    source = iter(data)
    for name, shard in zip(names, shards, strict=True):
        _write_shard(directory / name, shard, source)
    if len(shards) > 1:
        weight_map = {tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        index = {
            "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors)},
            "weight_map": dict(sorted(weight_map.items())),
        }
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _write_shard(path: Path, shard: Sequence[OutputTensor], source: Iterator[tuple[str, Tensor]]) -> None:
    with create_file(path) as file:
        file.write(_header(shard))
        for expected in shard:
            name, tensor = next(source)
            if (name, tuple(tensor.shape), tensor.dtype) != (expected.name, expected.shape, expected.dtype):
                raise AssertionError(f"planned {expected}, got {name} {tuple(tensor.shape)} {tensor.dtype}")
            file.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)


def _header(shard: Sequence[OutputTensor]) -> bytes:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for tensor in shard:
        offsets = [position, position + tensor.nbytes]
        header[tensor.name] = {"dtype": _CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        position = offsets[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text
