"""The training data of one rank: data set, order, packing and image decoder as the run's settings ask for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ross.config.blend import data_sources
from megatron_ross.config.features import sequence_multiple
from megatron_ross.config.model import VisionConfig
from megatron_ross.config.schema import DataConfig, RunConfig
from megatron_ross.data.dataset import ConcatDataset, RossDataset
from megatron_ross.data.decoders import PixelDecoder
from megatron_ross.data.images import ImageProcessor
from megatron_ross.data.latent_cache import LatentCache, LatentReader
from megatron_ross.data.lengths import modality_lengths, token_lengths
from megatron_ross.data.loader import RossLoader
from megatron_ross.data.order import BlendedOrder, GroupedOrder, SampleOrder, epochs_from_weights
from megatron_ross.data.packing import PackedOrder
from megatron_ross.data.quarantine import BadSamplePolicy
from megatron_ross.data.tokenizer import load_tokenizer
from megatron_ross.parallel.groups import ParallelGroups
from megatron_ross.platform import current_device

TrainingSet = RossDataset | ConcatDataset


def build_dataset(run: RunConfig, vision: VisionConfig, assets: Path) -> TrainingSet:
    """The training set, tokenised with the checkpoint's tokenizer and decoded for its vision tower."""
    tokenizer = load_tokenizer(assets)
    datasets = [
        RossDataset(
            source.data_path,
            source.image_folder or None,
            tokenizer,
            run.data.template,
            ImageProcessor.from_config(vision),
            vision.num_image_tokens,
            run.data.seq_length,
            reference=run.loss.loss_mode == "reference",
            allow_image_symlinks=run.data.allow_image_symlinks,
        )
        for source in data_sources(run.data)
    ]
    return ConcatDataset(datasets) if run.data.blend else datasets[0]


def build_order(run: RunConfig, dataset: TrainingSet, lengths: Sequence[int] | None = None) -> SampleOrder:
    """The global order of sequences; the same on every rank and for every data-parallel size.

    `lengths`: tokens of every sample, if they are known already.
    """
    data, seed = run.data, run.loss.seed
    blend = _blended(run, dataset) if isinstance(dataset, ConcatDataset) else None
    order: SampleOrder
    if data.group_by_modality_length:
        num_microbatches = data.global_batch_size // data.micro_batch_size
        order = GroupedOrder(
            modality_lengths(dataset), seed, batch_size=data.micro_batch_size, world_size=num_microbatches, base=blend
        )
    else:
        order = blend or SampleOrder(len(dataset), seed)
    if data.packing:
        known = token_lengths(dataset) if lengths is None else lengths
        return PackedOrder(order, known, data.seq_length, data.packing_lookahead)
    return order


def _blended(run: RunConfig, dataset: ConcatDataset) -> BlendedOrder:
    sources = data_sources(run.data)
    sizes = [len(part) for part in dataset.datasets]
    weights = [source.weight for source in sources if source.weight is not None]
    epochs = [source.epochs for source in sources if source.epochs is not None]
    return BlendedOrder(sizes, epochs_from_weights(sizes, weights) if weights else epochs, run.loss.seed)


def source_names(data: DataConfig) -> list[str]:
    """One short name per source of a blend, for metrics: its number and its file's name."""
    return [f"{i}_{Path(source.data_path).stem}" for i, source in enumerate(data_sources(data))] if data.blend else []


def build_loader(
    run: RunConfig, dataset: TrainingSet, order: SampleOrder, groups: ParallelGroups, *, letters: set[str]
) -> RossLoader:
    """This rank's loader. Metadata is the same on all ranks of a replica; the `letters` of its stages say what else it
    needs: pixels for the tower, and for the reconstruction loss pixels or cached latents."""
    data, tp_size = run.data, groups.tp.size()
    is_cached = bool(data.latent_cache)
    needs_pixels = "V" in letters or ("D" in letters and not is_cached)
    needs_latents = "D" in letters and is_cached
    return RossLoader(
        dataset,
        order,
        global_batch_size=data.global_batch_size,
        micro_batch_size=data.micro_batch_size,
        dp_rank=groups.dp.rank(),
        dp_size=groups.dp.size(),
        tp_rank=groups.tp.rank(),
        tp_size=tp_size,
        seq_multiple=sequence_multiple(run),
        pack_length=data.seq_length if data.packing else None,
        want_pixels=needs_pixels,
        reference_dummy_images=run.loss.loss_mode == "reference",
        prefetch=data.num_prefetch_steps,
        num_workers=data.num_workers,
        decoder=_decoder(data, dataset.image_processor) if needs_pixels else None,
        latents=LatentReader(LatentCache(Path(data.latent_cache)), data.num_workers) if needs_latents else None,
        bad_samples=_bad_sample_policy(run),
        source_ends=dataset.ends if isinstance(dataset, ConcatDataset) else (),
    )


def _decoder(data: DataConfig, processor: ImageProcessor) -> PixelDecoder | None:
    """None is the loader's own: Pillow."""
    if data.image_decoder == "pillow":
        return None
    from megatron_ross.data.dali_images import DaliDecoder

    device = torch.cuda.current_device() if torch.cuda.is_available() else None
    return DaliDecoder(processor, num_threads=data.num_workers, device_id=device)


def _bad_sample_policy(run: RunConfig) -> BadSamplePolicy:
    folder = Path(run.training.save) if run.training.save else None
    return BadSamplePolicy(
        agree=_maximum_over_ranks,
        max_bad_share=run.data.max_bad_sample_share,
        max_mismatch_share=run.data.max_mismatch_share,
        quarantine_path=folder / f"quarantine_rank{dist.get_rank()}.jsonl" if folder else None,
    )


def _maximum_over_ranks(flags: Tensor) -> Tensor:
    flags = flags.to(current_device())
    dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    return flags.cpu()
