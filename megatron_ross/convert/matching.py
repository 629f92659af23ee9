"""Match the tensors of a Hugging Face folder with table rows: none missing, none left over, shapes and dtypes right."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from megatron_ross.convert.hf_io import TensorInfo, WeightFolder
from megatron_ross.convert.layouts import VOCABULARY_KEYS, part_of
from megatron_ross.convert.mapping import TensorMapping
from megatron_ross.convert.torch_dist_writer import LazyTensor
from megatron_ross.convert.unsupported import recognised

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_LISTED = 20


def lazy_tensors(
    folder: WeightFolder,
    mappings: Sequence[TensorMapping],
    *,
    ignored: Collection[str] = (),
    rename: Callable[[str], str] = lambda name: name,
    tied_head: str | None = None,
) -> dict[str, LazyTensor]:
    """Checkpoint tensors that read and merge their parts from `folder` when loaded.

    Args:
        folder: the weights.
        mappings: table rows that must be there.
        ignored: patterns of further names that may be there and are not read.
        rename: stored name -> name in the table.
        tied_head: name of the LM head if it must be a copy of the embedding; it is compared, then dropped.

    Raises:
        ValueError: names are missing or unknown, or a shape or dtype is wrong; all offenders are listed. Loading a
            tensor raises it when a weight is not finite.
    """
    stored = {rename(name): name for name in folder.tensors}
    head_copy = stored.pop(tied_head, None) if tied_head is not None else None
    check_names(str(folder.directory), stored, mappings, ignored)
    if head_copy is not None:
        _check_tied(folder, head_copy, stored[mappings[0].parts[0].name])
    infos = {name: folder.tensors[original] for name, original in stored.items()}
    check_shapes(infos, mappings)
    dtypes = check_dtypes(infos, mappings)

    def loader(mapping: TensorMapping) -> Callable[[], Tensor]:
        return lambda: mapping.merge([_finite(folder, stored[part.name]) for part in mapping.parts])

    return {m.key: LazyTensor(m.shape, dtypes[part_of(m.key)], loader(m)) for m in mappings}


def check_names(where: str, names: Iterable[str], mappings: Sequence[TensorMapping], ignored: Collection[str]) -> None:
    """Every name of the table is in `names`, and every other name matches an `ignored` pattern."""
    names = set(names)
    wanted = {part.name for mapping in mappings for part in mapping.parts}
    skip = re.compile("|".join(ignored) or r"(?!)")
    missing = sorted(wanted - names)
    unknown = sorted(name for name in names - wanted if not skip.fullmatch(name))
    problems = [f"{kind} {listed(found)}" for kind, found in (("missing", missing), ("unknown", unknown)) if found]
    if problems and (kind := recognised(unknown)) is not None:
        raise ValueError(f"{where}: {kind}")
    if problems:
        raise ValueError(f"{where}: the tensors do not fit the config: {'; '.join(problems)}")


def check_shapes(infos: Mapping[str, TensorInfo], mappings: Sequence[TensorMapping]) -> None:
    """Stored shapes equal those of the table."""
    _check_vocabulary(infos, mappings)
    wrong = [
        f"{part.name} is {list(infos[part.name].shape)} in {infos[part.name].file}, expected {list(part.shape)}"
        for mapping in mappings
        for part in mapping.parts
        if infos[part.name].shape != part.shape
    ]
    if wrong:
        raise ValueError(f"wrong shape: {listed(wrong)}")


def _check_vocabulary(infos: Mapping[str, TensorInfo], mappings: Sequence[TensorMapping]) -> None:
    """The embedding and the head have the rows that the config says: merges and added tokens often change them."""
    rows = {
        part.name: (infos[part.name], part.shape[0])
        for mapping in mappings
        for part in mapping.parts
        if mapping.key in VOCABULARY_KEYS and len(infos[part.name].shape) == 2
    }
    found = {name: info.shape[0] for name, (info, _) in rows.items()}
    wrong = [name for name, (_, expected) in rows.items() if found[name] != expected]
    if not wrong:
        return
    info, expected = rows[wrong[0]]
    sizes = " and ".join(f"{name} has {count} rows" for name, count in found.items())
    fix = f"set vocab_size to {found[wrong[0]]}" if len(set(found.values())) == 1 else "save both from one model"
    raise ValueError(
        f"{info.file}: {sizes}, but vocab_size in config.json is {expected}: tokens were added, or the model was "
        f"merged with another vocabulary; {fix}"
    )


def check_dtypes(infos: Mapping[str, TensorInfo], mappings: Sequence[TensorMapping]) -> dict[str, torch.dtype]:
    """Dtype of every part of the model: floating point, and one per part."""
    first: dict[str, str] = {}
    for name, part in ((p.name, part_of(m.key)) for m in mappings for p in m.parts):
        info, reference = infos[name], infos[first.setdefault(part, name)]
        if info.dtype not in FLOAT_DTYPES:
            raise ValueError(
                f"{info.file}: {name} is {info.dtype}, expected float32, bfloat16 or float16; quantised weights are "
                "not read"
            )
        if info.dtype != reference.dtype:
            raise ValueError(
                f"dtype mismatch: {name} is {info.dtype} in {info.file}, but {first[part]} is {reference.dtype}: "
                f"store all tensors of the {part} part in one dtype"
            )
    return {part: infos[name].dtype for part, name in first.items()}


def listed(items: Sequence[str]) -> str:
    """Some of the items on one line, and how many more there are."""
    rest = f" and {len(items) - _LISTED} more" if len(items) > _LISTED else ""
    return f"{len(items)}: {', '.join(items[:_LISTED])}{rest}"


def _finite(folder: WeightFolder, name: str) -> Tensor:
    tensor = folder.read(name)
    if not bool(torch.isfinite(tensor).all()):
        bad = int((~torch.isfinite(tensor)).sum())
        raise ValueError(f"{folder.tensors[name].file}: {name} holds {bad} NaN or Inf of {tensor.numel()} numbers")
    return tensor


def _check_tied(folder: WeightFolder, head: str, embedding: str) -> None:
    if not torch.equal(folder.read(head), folder.read(embedding)):
        raise ValueError(f"{folder.directory}: {head} differs from {embedding}, but the config ties them")
