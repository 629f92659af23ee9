"""The training data of one rank: data set, order, packing and image decoder as the run's settings ask for."""

from __future__ import annotations

import hashlib
import socket
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ross.config.blend import DataSource, data_sources, valid_source
from megatron_ross.config.features import sequence_multiple
from megatron_ross.config.model import VisionConfig
from megatron_ross.config.schema import DataConfig, RunConfig
from megatron_ross.data.dataset import ConcatDataset, RossDataset
from megatron_ross.data.decoders import PixelDecoder
from megatron_ross.data.fit import check_room, check_template_fit
from megatron_ross.data.held_out import FixedOrder, held_out_ids, kept_ids, validation_order
from megatron_ross.data.images import ImageProcessor
from megatron_ross.data.latent_cache import LatentCache, LatentReader
from megatron_ross.data.lengths import modality_lengths, token_lengths
from megatron_ross.data.loader import RossLoader
from megatron_ross.data.order import BlendedOrder, GroupedOrder, SampleOrder, epochs_from_weights
from megatron_ross.data.packing import PackedOrder
from megatron_ross.data.quarantine import BadSamplePolicy, samples_for_a_share
from megatron_ross.data.run_files import RunFiles
from megatron_ross.data.tokenizer import load_tokenizer
from megatron_ross.parallel.groups import ParallelGroups
from megatron_ross.platform import current_device

TrainingSet = RossDataset | ConcatDataset

_MAX_NAMED = 8
"""Ranks that a message lists."""


def build_dataset(run: RunConfig, vision: VisionConfig, assets: Path) -> TrainingSet:
    """The training set, tokenised with the checkpoint's tokenizer and decoded for its vision tower.

    What `valid_split` holds out is in it, too; the orders of training and of validation tell the samples apart.
    """
    datasets = _open(run, data_sources(run.data), vision, assets)
    return ConcatDataset(datasets) if run.data.blend else datasets[0]


def build_valid_dataset(run: RunConfig, vision: VisionConfig, assets: Path) -> RossDataset | None:
    """What `valid_data_path` names, prepared as the training set is."""
    return _open(run, [valid_source(run.data)], vision, assets)[0] if run.data.valid_data_path else None


def _open(run: RunConfig, sources: list[DataSource], vision: VisionConfig, assets: Path) -> list[RossDataset]:
    tokenizer = load_tokenizer(assets)
    check_template_fit(run.data.template, tokenizer, reference=run.loss.loss_mode == "reference")
    datasets = [
        RossDataset(
            source.data_path,
            source.image_folder or None,
            tokenizer,
            run.data.template,
            ImageProcessor.from_config(vision.shown(run.data.image_aspect_ratio, run.data.image_conversion)),
            vision.num_image_tokens,
            run.data.seq_length,
            reference=run.loss.loss_mode == "reference",
            allow_image_symlinks=run.data.allow_image_symlinks,
            supervise=run.loss.supervises_text,
        )
        for source in sources
    ]
    for dataset in datasets:
        check_room(dataset)
    return datasets


def agree_on_data(dataset: TrainingSet) -> None:
    """Ranks read the data each for itself, perhaps from copies on their own nodes. A collective.

    Raises:
        ValueError: on every rank; the copies differ, or one cannot be read.
    """
    if dist.get_world_size() == 1:
        return
    contents: list[tuple[str, int, str]] = []
    state: object
    try:
        contents = dataset.contents()
        state = hashlib.blake2b(repr([content[1:] for content in contents]).encode(), digest_size=16).hexdigest()
    except OSError as error:
        state = f"cannot be read: {error}"
    if len(set(_gathered(state))) == 1 and contents:
        return
    theirs = _gathered(contents)[0]
    pairs = enumerate(zip(contents, theirs, strict=False))
    differing = next((i for i, (a, b) in pairs if a[1:] != b[1:]), min(len(contents), len(theirs)))
    number = min(_gathered(differing))
    here = contents[number] if number < len(contents) else ("its data", 0, str(state))
    copies: dict[tuple[int, str], list[str]] = {}
    for rank, (host, path, size, digest) in enumerate(_gathered((socket.gethostname(), *here))):
        copies.setdefault((size, digest), []).append(f"{rank} ({host}: {path})")
    found = [f"{size:,} records of content {digest} on {_some(ranks)}" for (size, digest), ranks in copies.items()]
    raise ValueError(f"ranks read different data: {'; '.join(found)}; copy the same files to every node")


def _gathered(value: Any) -> list[Any]:
    """Everyone's value, by rank. A collective."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _some(ranks: list[str]) -> str:
    """For a message: not all of a thousand."""
    more = f", ... {len(ranks)} in all" if len(ranks) > _MAX_NAMED else ""
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(ranks[:_MAX_NAMED])}{more}"


def build_order(
    run: RunConfig,
    dataset: TrainingSet,
    lengths: Sequence[int] | None = None,
    beat: Callable[[str], None] | None = None,
    group_sizes: tuple[int, int] | None = None,
) -> SampleOrder:
    """The global order of sequences; the same on every rank and for every data-parallel size.

    Args:
        lengths: tokens of every sample, if they are known already.
        beat: tells the watchdog that lengths are being measured.
        group_sizes: (batch size, batches per step) that `group_by_modality_length` deals samples to, of the run's
            first start (`training/resumed.py`); None: those of this run.
    """
    data, seed = run.data, run.loss.seed
    blend = _blended(run, dataset) if isinstance(dataset, ConcatDataset) else None
    order: SampleOrder
    if data.group_by_modality_length:
        own = (data.micro_batch_size, data.global_batch_size // data.micro_batch_size)
        batch_size, num_batches = group_sizes or own
        order = GroupedOrder(
            modality_lengths(dataset, beat=beat),
            seed,
            batch_size=batch_size,
            world_size=num_batches,
            base=blend or SampleOrder(len(dataset), seed, shuffle=False, ids=_kept(run, len(dataset))),
        )
    else:
        order = blend or SampleOrder(len(dataset), seed, ids=_kept(run, len(dataset)))
    if data.packing:
        known = token_lengths(dataset, beat=beat) if lengths is None else lengths
        return PackedOrder(order, known, data.seq_length, data.packing_lookahead)
    return order


def _blended(run: RunConfig, dataset: ConcatDataset) -> BlendedOrder:
    sources = data_sources(run.data)
    sizes = [len(part) for part in dataset.datasets]
    weights = [source.weight for source in sources if source.weight is not None]
    epochs = [source.epochs for source in sources if source.epochs is not None]
    if not run.data.valid_split:
        return BlendedOrder(sizes, epochs_from_weights(sizes, weights) if weights else epochs, run.loss.seed)
    kept = [kept_ids(size, held_out_ids(size, run.data.valid_split)) for size in sizes]
    passes = epochs_from_weights([len(ids) for ids in kept], weights) if weights else epochs
    return BlendedOrder(sizes, passes, run.loss.seed, ids=kept)


def _kept(run: RunConfig, num_samples: int) -> np.ndarray | None:
    """What is trained on; None: all samples."""
    split = run.data.valid_split
    return kept_ids(num_samples, held_out_ids(num_samples, split)) if split else None


def build_valid_order(run: RunConfig, dataset: TrainingSet, beat: Callable[[str], None] | None = None) -> FixedOrder:
    """The batches of every validation: of `valid_data_path`'s samples, or of those that `valid_split` holds out.

    Args:
        dataset: from `build_valid_dataset`, or the training set.
        beat: as in `build_order`.
    """
    data = run.data
    order = valid_samples(run, dataset)
    if data.packing:
        order = PackedOrder(order, token_lengths(dataset, beat=beat), data.seq_length, data.packing_lookahead)
    return validation_order(order, data.global_batch_size, run.observation.eval_iters)


def valid_samples(run: RunConfig, dataset: TrainingSet) -> SampleOrder:
    """All held-out samples in an order that no setting changes; the first epoch counts. Arguments as above."""
    return SampleOrder(len(dataset), ids=None if run.data.valid_data_path else _held_out(run, dataset))


def _held_out(run: RunConfig, dataset: TrainingSet) -> np.ndarray:
    parts = dataset.datasets if isinstance(dataset, ConcatDataset) else [dataset]
    ends = np.cumsum([len(part) for part in parts])
    return np.concatenate(
        [held_out_ids(len(p), run.data.valid_split) + end - len(p) for p, end in zip(parts, ends, strict=True)]
    )


def source_names(data: DataConfig) -> list[str]:
    """One short name per source of a blend, for metrics: its number and its file's name."""
    return [f"{i}_{Path(source.data_path).stem}" for i, source in enumerate(data_sources(data))] if data.blend else []


def build_loader(
    run: RunConfig, dataset: TrainingSet, order: SampleOrder, groups: ParallelGroups, *, letters: set[str]
) -> RossLoader:
    """This rank's loader. Metadata is the same on all ranks of a replica; the `letters` of its stages say what else it
    needs: pixels for the tower, and for the reconstruction loss pixels or cached latents. A `FixedOrder` is read once
    from its beginning to its end, until the loader is rewound."""
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
        bad_samples=_bad_sample_policy(run, order),
        source_ends=source_ends(dataset),
        num_sequences=order.num_sequences if isinstance(order, FixedOrder) else None,
    )


def source_ends(dataset: TrainingSet) -> list[int]:
    """One past the last sample id of each source of a blend."""
    return dataset.ends if isinstance(dataset, ConcatDataset) else []


def _decoder(data: DataConfig, processor: ImageProcessor) -> PixelDecoder | None:
    """None is the loader's own: Pillow."""
    if data.image_decoder == "pillow":
        return None
    from megatron_ross.data.dali_images import DaliDecoder

    device = torch.cuda.current_device() if torch.cuda.is_available() else None
    return DaliDecoder(processor, num_threads=data.num_workers, device_id=device)


def _bad_sample_policy(run: RunConfig, order: SampleOrder) -> BadSamplePolicy:
    """This rank's, in step with all others. Findings of validation, which would be there again and again, are not
    written to the run folder."""
    folder = Path(run.training.save) if run.training.save and not isinstance(order, FixedOrder) else None
    return replace(
        bad_sample_limits(run, order),
        agree=_maximum_over_ranks,
        quarantine_path=folder / f"quarantine_rank{dist.get_rank()}.jsonl" if folder else None,
        files=RunFiles.of(run),
    )


def bad_sample_limits(run: RunConfig, order: SampleOrder) -> BadSamplePolicy:
    """How many broken samples a run allows.

    Of held-out samples it allows as many as of a thousand, however few there are: a run that has trained for hours must
    not end because of one of them.
    """
    is_validation = isinstance(order, FixedOrder)
    return BadSamplePolicy(
        max_bad_share=run.data.max_bad_sample_share,
        max_mismatch_share=run.data.max_mismatch_share,
        min_samples=1000 if is_validation else samples_for_a_share(len(order.epoch_keys(0))),
        template=run.data.template,
    )


def _maximum_over_ranks(flags: Tensor) -> Tensor:
    flags = flags.to(current_device())
    dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    return flags.cpu()
