"""Two-way mappings between one checkpoint tensor and the Hugging Face tensors it is made of.

A mapping is a table row: the checkpoint key, the Hugging Face names with their shapes, and a bit-exact pair of
functions. `merge` makes the checkpoint tensor from the named ones, `split` is its inverse.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Part:
    """One Hugging Face tensor."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class TensorMapping(ABC):
    """Checkpoint tensor `key` <-> Hugging Face tensors `parts`."""

    key: str
    parts: tuple[Part, ...]

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Shape of the checkpoint tensor."""

    @abstractmethod
    def merge(self, tensors: Sequence[Tensor]) -> Tensor:
        """Checkpoint tensor from the tensors of `parts`, in that order."""

    @abstractmethod
    def split(self, tensor: Tensor) -> list[Tensor]:
        """Contiguous tensors of `parts` from the checkpoint tensor."""

    def renamed(self, rename: Callable[[str], str]) -> TensorMapping:
        """The same mapping with every Hugging Face name replaced by `rename(name)`."""
        parts = tuple(Part(rename(part.name), part.shape) for part in self.parts)
        return dataclasses.replace(self, parts=parts)


@dataclass(frozen=True)
class Direct(TensorMapping):
    """One tensor, unchanged."""

    @property
    def shape(self) -> tuple[int, ...]:
        return self.parts[0].shape

    def merge(self, tensors: Sequence[Tensor]) -> Tensor:
        (tensor,) = tensors
        return tensor

    def split(self, tensor: Tensor) -> list[Tensor]:
        return [tensor.contiguous()]


@dataclass(frozen=True)
class Stacked(TensorMapping):
    """Tensors stacked along the first axis, e.g. [gate; up] as `linear_fc1`."""

    @property
    def shape(self) -> tuple[int, ...]:
        return (sum(part.shape[0] for part in self.parts), *self.parts[0].shape[1:])

    def merge(self, tensors: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(tensors))

    def split(self, tensor: Tensor) -> list[Tensor]:
        return [piece.contiguous() for piece in tensor.split([part.shape[0] for part in self.parts])]


@dataclass(frozen=True)
class GroupedQkv(TensorMapping):
    """Query, key and value projections as Megatron's `linear_qkv`.

    The rows are ordered by query group: the group's queries, its key, its value, `head_dim` rows each. A contiguous cut
    between groups is then a valid tensor-parallel cut. Weights are [rows, hidden], biases [rows].
    """

    num_groups: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (sum(part.shape[0] for part in self.parts), *self.parts[0].shape[1:])

    def merge(self, tensors: Sequence[Tensor]) -> Tensor:
        grouped = [tensor.unflatten(0, (self.num_groups, -1)) for tensor in tensors]
        return torch.cat(grouped, dim=1).flatten(0, 1)

    def split(self, tensor: Tensor) -> list[Tensor]:
        rows = [part.shape[0] // self.num_groups for part in self.parts]
        pieces = tensor.unflatten(0, (self.num_groups, -1)).split(rows, dim=1)
        return [piece.flatten(0, 1).contiguous() for piece in pieces]


def direct(key: str, name: str, *shape: int) -> Direct:
    """Table row of an unchanged tensor."""
    return Direct(key, (Part(name, shape),))


def with_prefix(mappings: Iterable[TensorMapping], prefix: str) -> list[TensorMapping]:
    """The mappings with `prefix` in front of every Hugging Face name."""
    return [mapping.renamed(lambda name: prefix + name) for mapping in mappings]
