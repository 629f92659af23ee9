"""A Megatron checkpoint -> Hugging Face files: the shared streaming part and the `ross` and `adapters` formats."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from megatron_ross.checkpoint.reader import CheckpointReader
from megatron_ross.convert.atomic import atomic_directory, create_file, save_torch
from megatron_ross.convert.composite_config import PUBLISHED_SIGLIP_LAYER
from megatron_ross.convert.hf_io import OutputTensor, write_safetensors
from megatron_ross.convert.layouts import ROSS_PREFIXES, VOCABULARY_KEYS, ross_mappings
from megatron_ross.convert.mapping import TensorMapping, with_prefix
from megatron_ross.convert.matching import listed
from megatron_ross.convert.model_card import model_card
from megatron_ross.convert.names_adapters import denoiser_mappings, projector_mappings
from megatron_ross.convert.published_config import published_config
from megatron_ross.convert.sources import (
    CHAT_TEMPLATE_FILES,
    GENERATION_FILES,
    PROCESSOR_FILES,
    TOKENIZER_FILES,
    copy_assets,
    write_json,
)
from megatron_ross.convert.trained_template import check_trained_template

MAX_SHARD_BYTES = 5_000_000_000
_ASSET_FILES = TOKENIZER_FILES + CHAT_TEMPLATE_FILES + GENERATION_FILES + PROCESSOR_FILES


class TensorExport:
    """Streams checkpoint tensors as the Hugging Face tensors of a table.

    Args:
        reader: the checkpoint.
        mappings: table rows, all of which the checkpoint must have.
        dtype: dtype to cast to; None keeps what is stored, bit for bit.

    Raises:
        ValueError: the checkpoint lacks tensors of the table, or has them in another shape.
    """

    def __init__(
        self, reader: CheckpointReader, mappings: Sequence[TensorMapping], dtype: torch.dtype | None = None
    ) -> None:
        self.reader, self.mappings, self.dtype = reader, mappings, dtype
        stored = set(reader.keys())
        missing = [mapping.key for mapping in mappings if mapping.key not in stored]
        if missing:
            raise ValueError(f"{reader.directory} lacks {listed(missing)}")
        wrong = [
            f"{m.key} is {list(reader.shape(m.key))}, the manifest's model makes it {list(m.shape)}"
            for m in mappings
            if not _shape_fits(m, reader.shape(m.key))
        ]
        if wrong:
            raise ValueError(f"{reader.directory}: wrong shape: {listed(wrong)}")

    def tensors(self) -> list[OutputTensor]:
        """What will be produced, in order."""
        return [
            OutputTensor(part.name, part.shape, self.dtype or self.reader.dtype(mapping.key))
            for mapping in self.mappings
            for part in mapping.parts
        ]

    def data(self) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) in the same order, one checkpoint tensor in memory at a time."""
        for mapping in self.mappings:
            tensor = self.reader.read(mapping.key)
            if mapping.key in VOCABULARY_KEYS:
                tensor = tensor[: mapping.shape[0]]  # rows beyond the vocabulary are padding for tensor parallelism
            pieces = mapping.split(tensor)
            del tensor
            for part in mapping.parts:
                piece = pieces.pop(0)
                yield part.name, piece if self.dtype is None else piece.to(self.dtype)


def _shape_fits(mapping: TensorMapping, stored: tuple[int, ...]) -> bool:
    if mapping.key in VOCABULARY_KEYS:
        return stored[0] >= mapping.shape[0] and stored[1:] == mapping.shape[1:]
    return stored == mapping.shape


def language_dtype(reader: CheckpointReader, dtype: torch.dtype | None) -> str:
    """Name of the dtype in which the language model gets written."""
    return str(dtype or reader.dtype("embedding.word_embeddings.weight")).removeprefix("torch.")


def check_complete(reader: CheckpointReader) -> None:
    """Every model tensor of the checkpoint has a place in the published format, so nothing can get lost.

    Raises:
        ValueError: there are tensors the tables do not know.
    """
    stored, known = reader.keys(), {mapping.key for mapping in ross_mappings(reader.manifest.model)}
    unknown = [key for key in stored if key not in known]
    if unknown:
        raise ValueError(f"{reader.directory} has tensors that its manifest's model does not: {listed(unknown)}")


def write_weights(directory: Path, export: TensorExport, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
    """Write the safetensors files of an export, with a progress bar."""
    tensors = export.tensors()
    with tqdm(total=sum(t.nbytes for t in tensors), unit="B", unit_scale=True, desc="writing safetensors") as bar:
        write_safetensors(directory, tensors, with_progress(export.data(), bar), max_shard_bytes)


def with_progress(data: Iterator[tuple[str, Tensor]], bar: tqdm[Any]) -> Iterator[tuple[str, Tensor]]:
    """Pass tensors on and count their bytes; those of the last one, too, which nobody comes back from."""
    for name, tensor in data:
        bar.update(tensor.nbytes)
        yield name, tensor


def export_ross(
    reader: CheckpointReader,
    output: Path,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    templates: Callable[[str], str] | None = None,
) -> None:
    """Write the published composite format: key names, config fields and files that the published code loads.

    Args:
        reader: the checkpoint.
        output: folder to create.
        dtype: dtype to cast to; None keeps what is stored.
        max_shard_bytes: largest safetensors file.
        templates: name of a training template -> Jinja text; None writes no chat template.

    Raises:
        ValueError: the checkpoint is incomplete or does not fit its manifest, or `output` exists.
        OSError: writing failed.
    """
    from megatron_ross.convert.inference_files import complete_ross_folder  # imports transformers, which takes seconds

    check_complete(reader)
    check_trained_template(reader)
    export = TensorExport(reader, ross_mappings(reader.manifest.model), dtype)
    config = published_config(reader.manifest, reader.assets, language_dtype(reader, dtype))
    with atomic_directory(output, sum(tensor.nbytes for tensor in export.tensors())) as directory:
        copy_assets(reader.assets, _ASSET_FILES, directory)
        complete_ross_folder(directory, reader, config, templates)
        write_json(directory / "config.json", config)
        (directory / "README.md").write_text(model_card(reader, "ross", _layer_note(config)), encoding="utf-8")
        write_weights(directory, export, max_shard_bytes)


def _layer_note(config: dict[str, Any]) -> tuple[str, ...]:
    """What a reader of the card must know of a SigLIP tower that is not read where the published code reads it."""
    if "vision_feature_layer" not in config:
        return ()
    return (
        f"The vision tower is read at layer {config['vision_feature_layer']}. The published code reads SigLIP at layer "
        f"{PUBLISHED_SIGLIP_LAYER} whatever the config says, and answers otherwise; `megatron_ross.huggingface` and "
        "Megatron-Ross's converter use the right one.",
    )


def export_adapters(reader: CheckpointReader, output: Path, dtype: torch.dtype | None = None) -> None:
    """Write `mm_projector.bin`, and `mm_inv_projector.bin` if there is a denoiser, as the published first stage does.

    Raises:
        ValueError: the checkpoint lacks tensors, `output` exists, or the denoiser regresses: these files cannot say it.
        OSError: writing failed.
    """
    model = reader.manifest.model
    if model.denoiser is not None and model.denoiser.objective != "denoise":
        raise ValueError(
            f"{reader.directory}: the denoiser was trained to {model.denoiser.objective}, and adapter files would be "
            "taken for one that denoises; export the format ross"
        )
    files = {"mm_projector.bin": with_prefix(projector_mappings(model), ROSS_PREFIXES["projector"])}
    if model.denoiser is not None:
        files["mm_inv_projector.bin"] = with_prefix(denoiser_mappings(model), ROSS_PREFIXES["denoiser"])
    exports = {name: TensorExport(reader, rows, dtype) for name, rows in files.items()}
    needed = sum(tensor.nbytes for export in exports.values() for tensor in export.tensors())
    config = published_config(reader.manifest, reader.assets, language_dtype(reader, dtype))
    with atomic_directory(output, needed) as directory:
        write_json(directory / "config.json", config)
        for name, export in exports.items():
            tensors = dict(export.data())
            with create_file(directory / name) as file:
                save_torch(tensors, file)
        (directory / "README.md").write_text(model_card(reader, "adapters"), encoding="utf-8")
