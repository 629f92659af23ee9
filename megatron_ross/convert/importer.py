"""Hugging Face checkpoints -> one layout-free Megatron checkpoint.

First everything is checked from configs and file headers (`plan_*`), then tensors are streamed (`write_checkpoint`).
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from megatron_ross.checkpoint.checksums import checksums, other_files, own_data_files, sha256_of
from megatron_ross.checkpoint.manifest import ASSETS_NAME, Manifest, Source, iteration_dir, write_latest
from megatron_ross.config.json_files import read_json
from megatron_ross.config.model import DenoiserConfig, ProjectorConfig, RossModelConfig
from megatron_ross.convert.atomic import atomic_directory
from megatron_ross.convert.component_config import language_config, tower_config
from megatron_ross.convert.composite_config import (
    denoiser_config,
    has_denoiser,
    is_original_llava,
    is_stock_llava,
    ross_model_config,
)
from megatron_ross.convert.fresh import fresh_denoiser, fresh_projector
from megatron_ross.convert.hf_io import TensorInfo, WeightFolder, load_torch_tensors
from megatron_ross.convert.layouts import (
    LLAVA_IGNORED,
    ROSS_IGNORED,
    ROSS_PREFIXES,
    canonical_llava_name,
    llava_mappings,
    part_of,
    ross_mappings,
)
from megatron_ross.convert.mapping import TensorMapping, with_prefix
from megatron_ross.convert.matching import check_dtypes, check_names, check_shapes, lazy_tensors
from megatron_ross.convert.names_adapters import denoiser_mappings, projector_mappings
from megatron_ross.convert.names_language import IGNORED_BUFFERS, head_mappings, language_mappings
from megatron_ross.convert.names_vae import vae_mappings
from megatron_ross.convert.names_vision import HF_PREFIX, IGNORED_TENSORS, tower_mappings
from megatron_ross.convert.read_off import shapes_below
from megatron_ross.convert.sources import (
    CHAT_TEMPLATE_FILES,
    GENERATION_FILES,
    PROCESSOR_FILES,
    SOURCE_CONFIG,
    TOKENIZER_FILES,
    check_tokenizer,
    copy_assets,
    resolve_source,
    source_name,
)
from megatron_ross.convert.torch_dist_writer import LazyTensor, write_torch_dist
from megatron_ross.convert.unsupported import check_supported
from megatron_ross.convert.vae_source import current_name, open_vae, read_vae_config, resolve_vae


@dataclass
class ImportPlan:
    """A checked conversion: what will be written, and from which files.

    `assets` lists (folder, file names to copy if present); `config_file` becomes assets/source_config.json; `notes` are
    for the user.
    """

    model: RossModelConfig
    config_file: Path
    tensors: dict[str, LazyTensor] = field(default_factory=dict)
    sources: list[tuple[str, str, list[Path]]] = field(default_factory=list)
    assets: list[tuple[Path, tuple[str, ...]]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, part: str, name: str, folder: WeightFolder, tensors: dict[str, LazyTensor]) -> None:
        """Add the tensors of one source."""
        self.tensors.update(tensors)
        config = folder.directory / "config.json"
        self.sources.append(
            (part, source_name(name), [*([config] if config.is_file() else []), *(f.path for f in folder.files)])
        )


def plan_components(
    llm: str,
    vision_tower: str,
    vae: str | None,
    projector_type: str,
    denoiser_type: str,
    denoiser_width: int | None,
    mm_projector: Path | None,
    mm_inv_projector: Path | None,
    seed: int,
) -> ImportPlan:
    """Plan an import from components; without `vae` the model is plain LLaVA, without denoiser.

    Raises:
        ValueError: anything about a source is wrong; the message names the file.
    """
    llm_dir, tower_dir = _supported_source(llm), _supported_source(vision_tower)
    vae_dir = resolve_vae(vae) if vae is not None else None
    if vae_dir is None and mm_inv_projector is not None:
        raise ValueError("--mm-inv-projector needs --vae: a denoiser works on the latents of an auto-encoder")
    denoiser_width = _inverse_width(mm_inv_projector, denoiser_width)
    model = RossModelConfig(
        language=language_config(read_json(llm_dir / "config.json"), str(llm_dir / "config.json")),
        vision=tower_config(tower_dir),
        projector=ProjectorConfig(projector_type),
        denoiser=denoiser_config(denoiser_type, denoiser_width) if vae_dir is not None else None,
        vae=read_vae_config(vae_dir) if vae_dir is not None else None,
    )
    check_tokenizer(llm_dir, model.language.vocab_size)
    plan = ImportPlan(model, llm_dir / "config.json")
    _add_folders(plan, (llm, llm_dir), (vision_tower, tower_dir), (vae, vae_dir) if vae_dir is not None else None)
    _add_adapter(plan, "projector", mm_projector, seed)
    if model.denoiser is not None:
        _add_adapter(plan, "denoiser", mm_inv_projector, seed)
    # The language model's own chat template is left behind: training uses other templates.
    plan.assets = [(llm_dir, TOKENIZER_FILES + GENERATION_FILES), (tower_dir, PROCESSOR_FILES)]
    return plan


def plan_checkpoint(
    checkpoint: str,
    vision_tower: str | None = None,
    vae: str | None = None,
    denoiser_type: str | None = None,
    denoiser_width: int | None = None,
    mm_inv_projector: Path | None = None,
    seed: int = 0,
) -> ImportPlan:
    """Plan an import of a whole model: the published composite format, stock LLaVA, or LLaVA in its original format.

    Args:
        checkpoint: folder or hub id.
        vision_tower: source of the tower's config, for composites that name towers we do not know; of its weights, too,
            where the checkpoint does not have them.
        vae: the same for the auto-encoder. A checkpoint without denoiser gets this auto-encoder and a denoiser.
        denoiser_type, denoiser_width, mm_inv_projector, seed: of that denoiser, see `plan_components`.

    Raises:
        ValueError: anything about a source is wrong; the message names the file.
    """
    directory = _supported_source(checkpoint)
    config = read_json(directory / "config.json")
    adds_denoiser = vae is not None and not has_denoiser(config)
    if not adds_denoiser and any(value is not None for value in (denoiser_type, denoiser_width, mm_inv_projector)):
        has = "has a denoiser already" if has_denoiser(config) else "has no denoiser, and gets one only with --vae"
        raise ValueError(f"{checkpoint} {has}: --denoiser-type, --denoiser-width and --mm-inv-projector do not apply")
    folder = WeightFolder(directory)
    without_tower = is_original_llava(config) and not shapes_below(folder.tensors, ROSS_PREFIXES["vision"])
    if without_tower and vision_tower is None:
        raise ValueError(
            f"{directory} does not hold the weights of its vision tower: add --vision-tower "
            f"{config.get('mm_vision_tower', 'NAME')}"
        )
    tower_dir = resolve_source(vision_tower, weights=without_tower) if vision_tower is not None else None
    vae_dir = resolve_vae(vae, weights=adds_denoiser) if vae is not None else None
    model = ross_model_config(config, directory, vision_dir=tower_dir, vae_dir=vae_dir)
    check_tokenizer(directory, model.language.vocab_size)
    plan = ImportPlan(model, directory / "config.json")
    plan.notes += _layer_notes(config, model)
    if vision_tower is not None and is_stock_llava(config):
        plan.notes.append(f"{source_name(checkpoint)} has its own vision tower: --vision-tower is not used")
    _add_whole(plan, checkpoint, folder, without_tower)
    if without_tower and tower_dir is not None:
        _add_tower(plan, str(vision_tower), tower_dir)
    if adds_denoiser and vae_dir is not None:
        inverse = _inverse_width(mm_inv_projector, denoiser_width)
        denoiser = denoiser_config(denoiser_type or DenoiserConfig().type, inverse)
        plan.model = replace(model, denoiser=denoiser, vae=read_vae_config(vae_dir))
        _add_vae(plan, str(vae), vae_dir)
        _add_adapter(plan, "denoiser", mm_inv_projector, seed)
        plan.notes.append(
            f"{source_name(checkpoint)} has no denoiser: added {denoiser.type}, "
            + (f"initialised from seed {seed}" if mm_inv_projector is None else f"from {mm_inv_projector}")
        )
    if tower_dir is not None:
        plan.assets.append((tower_dir, PROCESSOR_FILES))
    plan.assets.append((directory, TOKENIZER_FILES + CHAT_TEMPLATE_FILES + GENERATION_FILES + PROCESSOR_FILES))
    return plan


def write_checkpoint(plan: ImportPlan, output: Path, training: dict[str, Any] | None = None) -> Path:
    """Write ROOT/iter_0000000 as planned, streaming, and return ROOT; nothing is left behind on failure.

    Raises:
        ValueError: `output` exists, or the disk is too small.
        OSError: writing failed.
    """
    total = sum(tensor.nbytes for tensor in plan.tensors.values())
    with atomic_directory(output, needed_bytes=total) as root, ThreadPoolExecutor(1) as pool:
        hashing = [
            (part, name, {file.name: pool.submit(sha256_of, file) for file in files})
            for part, name, files in plan.sources
        ]
        directory = iteration_dir(root, 0)
        assets = directory / ASSETS_NAME
        assets.mkdir(parents=True)
        for source, names in plan.assets:
            copy_assets(source, names, assets)
        (assets / SOURCE_CONFIG).write_bytes(plan.config_file.read_bytes())
        try:
            with tqdm(total=total, unit="B", unit_scale=True, desc=f"writing {Path(output).name}") as bar:
                write_torch_dist(directory, plan.tensors, bar.update)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        Manifest(
            iteration=0,
            model=plan.model,
            sources=tuple(
                Source(part, name, {file: job.result() for file, job in jobs.items()}) for part, name, jobs in hashing
            ),
            dtypes={part_of(key): str(tensor.dtype).removeprefix("torch.") for key, tensor in plan.tensors.items()},
            training=training or {},
            files=checksums(directory, [*own_data_files(directory, 0), *other_files(directory)]),
        ).write(directory)
        write_latest(root, 0)
    return Path(output)


def load_adapter(path: Path, part: str) -> dict[str, torch.Tensor]:
    """Tensors of a published adapter file, with everything up to and including `part` cut from their names.

    Raises:
        ValueError: not such a file.
    """
    tensors = load_torch_tensors(Path(path))
    foreign = [name for name in tensors if part not in name]
    if foreign or not tensors:
        raise ValueError(f"{path} should hold {part}* tensors, found {', '.join(foreign[:5]) or 'none'}")
    return {name.split(part, 1)[1]: tensor for name, tensor in tensors.items()}


def _supported_source(name: str) -> Path:
    """As `resolve_source`, but adapters and quantised models are refused before their weights are fetched."""
    check_supported(resolve_source(name, weights=False))
    return resolve_source(name)


def _add_folders(
    plan: ImportPlan, llm: tuple[str, Path], tower: tuple[str, Path], vae: tuple[str | None, Path] | None
) -> None:
    language = plan.model.language
    rows = language_mappings(language) + head_mappings(language)
    head = "lm_head.weight" if language.share_embeddings_and_output_weights else None
    folder = WeightFolder(llm[1])
    plan.add("language", llm[0], folder, lazy_tensors(folder, rows, ignored=IGNORED_BUFFERS, tied_head=head))
    _add_tower(plan, *tower)
    if vae is not None:
        _add_vae(plan, str(vae[0]), vae[1])


def _add_whole(plan: ImportPlan, name: str, folder: WeightFolder, without_tower: bool) -> None:
    """The tensors of a whole model, as it is stored: without what `plan_checkpoint` adds to it."""
    model, tied = plan.model, plan.model.language.share_embeddings_and_output_weights
    if is_stock_llava(read_json(plan.config_file)):
        head = "language_model.lm_head.weight" if tied else None
        rows = llava_mappings(model)
        tensors = lazy_tensors(folder, rows, ignored=LLAVA_IGNORED, rename=canonical_llava_name, tied_head=head)
    else:
        head = "lm_head.weight" if tied else None
        rows = [row for row in ross_mappings(model) if not (without_tower and part_of(row.key) == "vision")]
        tensors = lazy_tensors(folder, rows, ignored=ROSS_IGNORED, tied_head=head)
    plan.add("model", name, folder, tensors)


def _add_tower(plan: ImportPlan, name: str, directory: Path) -> None:
    rows = with_prefix(tower_mappings(plan.model.vision), HF_PREFIX)
    folder = WeightFolder(directory)
    plan.add("vision", name, folder, lazy_tensors(folder, rows, ignored=IGNORED_TENSORS, rename=_tower_name(folder)))


def _add_vae(plan: ImportPlan, name: str, path: Path) -> None:
    if plan.model.vae is not None:
        folder = open_vae(path)
        plan.add("vae", name, folder, lazy_tensors(folder, vae_mappings(plan.model.vae), rename=current_name))


def _layer_notes(config: dict[str, Any], model: RossModelConfig) -> list[str]:
    """A SigLIP composite whose config names another layer than the one that is used."""
    named, used = config.get("mm_vision_select_layer"), model.vision.select_layer
    states = model.vision.hf_config["num_hidden_layers"] + 1
    if named is None or is_stock_llava(config) or config.get("vision_feature_layer") or named % states == used % states:
        return []
    return [f"mm_vision_select_layer is {named}, but layer {used} is used: the published code fixes it for SigLIP"]


def _inverse_width(path: Path | None, width: int | None) -> int | None:
    """Width of a denoiser: as asked for, else of the adapter file, else None."""
    if path is None or width is not None:
        return width
    table = load_adapter(path, "mm_inv_projector.").get("net.pos_embed")
    return table.shape[-1] if table is not None else None


def _tower_name(folder: WeightFolder) -> Any:
    """Recent library versions save a lone tower without the `vision_model.` level."""
    has_level = any(name.startswith(HF_PREFIX) for name in folder.tensors)
    return (lambda name: name) if has_level else (lambda name: HF_PREFIX + name)


def _add_adapter(plan: ImportPlan, part: str, path: Path | None, seed: int) -> None:
    """The projector or denoiser: from its file, or freshly initialised in float32."""
    if part == "projector":
        rows, level = projector_mappings(plan.model), "mm_projector."
    else:
        rows, level = with_prefix(denoiser_mappings(plan.model), "net."), "mm_inv_projector."
    if path is not None:
        tensors = load_adapter(path, level)
        plan.sources.append((part, path.name, [path]))
        where = path
    else:
        tensors = fresh_projector(plan.model, seed) if part == "projector" else fresh_denoiser(plan.model, seed)
        where = Path(f"freshly initialised {part}")
    plan.tensors.update(_adapter_tensors(where, tensors, rows))


def _adapter_tensors(path: Path, tensors: dict[str, torch.Tensor], rows: list[TensorMapping]) -> dict[str, LazyTensor]:
    check_names(str(path), tensors, rows, ())
    infos = {name: TensorInfo(tuple(t.shape), t.dtype, path) for name, t in tensors.items()}
    check_shapes(infos, rows)
    check_dtypes(infos, rows)
    return {row.key: _in_memory(tensors[row.parts[0].name]) for row in rows}


def _in_memory(tensor: torch.Tensor) -> LazyTensor:
    return LazyTensor(tuple(tensor.shape), tensor.dtype, tensor.clone)
