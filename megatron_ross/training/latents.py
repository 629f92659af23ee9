"""VAE moments of a data set, computed once: what tools/cache_latents.py does, and the check before a run reads them.

The data set is cut into blocks of samples, and each block becomes one file, named by what is in the block. Worker
processes take blocks one by one; a block whose file exists is not touched again, so a stopped run goes on where it was.
"""

from __future__ import annotations

import hashlib
import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from megatron_ross.checkpoint.manifest import ASSETS_NAME
from megatron_ross.checkpoint.reader import CheckpointReader, open_checkpoint
from megatron_ross.checkpoint.vae import load_latent_encoder, vae_digest
from megatron_ross.config.cli import ConfigError
from megatron_ross.config.schema import DataConfig, RunConfig
from megatron_ross.data.batch import ImageSpan
from megatron_ross.data.dataset import ConcatDataset
from megatron_ross.data.errors import ImageError, SampleError
from megatron_ross.data.images import ImageProcessor, decode_image
from megatron_ross.data.latent_cache import (
    DUMMY_DIGEST,
    CacheKey,
    LatentCache,
    check_cache,
    create_cache,
    image_digest,
    write_shard,
)
from megatron_ross.models.latents import LatentEncoder
from megatron_ross.training.data import TrainingSet, build_dataset, build_valid_dataset
from megatron_ross.training.start import start_of

_MAX_EXAMPLES = 5


def cache_key(checkpoint: CheckpointReader, data: DataConfig) -> CacheKey:
    """What a cache for this checkpoint's VAE and the run's images must say of itself.

    Raises:
        ValueError: the checkpoint has no VAE.
    """
    model, digest = checkpoint.manifest.model, vae_digest(checkpoint)
    assert model.vae is not None
    return CacheKey.of(
        digest,
        ImageProcessor.from_config(model.vision.shown(data.image_aspect_ratio)),
        latent_channels=model.vae.latent_channels,
        grid_size=model.vision.grid_size,
    )


def check_latent_cache(run: RunConfig, directory: Path) -> None:
    """The run's `latent_cache`, if it has one, belongs to the VAE and images of the checkpoint it starts from.

    Raises:
        ValueError: it does not; one line that says why and what to do.
    """
    if not run.data.latent_cache:
        return
    checkpoint = open_checkpoint(directory)
    if checkpoint.manifest.model.vae is None:
        raise ConfigError(
            f"latent_cache={run.data.latent_cache!r}: the model has no VAE (it is LLaVA); leave latent_cache out"
        )
    check_cache(Path(run.data.latent_cache), cache_key(checkpoint, run.data))


@dataclass(frozen=True)
class CachingOptions:
    """How a data set is cached. `batch_size` images go through the VAE at a time."""

    num_workers: int = 1
    batch_size: int = 8
    samples_per_shard: int = 500
    show_progress: bool = True


@dataclass
class CachingReport:
    """What was found: images encoded now, broken ones (with examples), and blocks that were there already."""

    encoded: int = 0
    broken: int = 0
    kept_blocks: int = 0
    examples: list[str] = field(default_factory=list)

    def add(self, other: CachingReport) -> None:
        self.encoded += other.encoded
        self.broken += other.broken
        self.kept_blocks += other.kept_blocks
        self.examples = (self.examples + other.examples)[:_MAX_EXAMPLES]


def cache_data_set(run: RunConfig, folder: Path, options: CachingOptions) -> CachingReport:
    """Write moments of every image of the run's data set to `folder`, which may hold some already.

    Args:
        run: names the data (data_path, image_folder, blend) and the checkpoint (init_from or load).

    Raises:
        ValueError: the checkpoint has no VAE, the folder is another VAE's cache, or the data cannot be opened.
    """
    checkpoint = open_checkpoint(start_of(run).directory)
    create_cache(folder, cache_key(checkpoint, run.data))
    num_samples = len(_data_set(run))
    blocks = [
        range(start, min(start + options.samples_per_shard, num_samples))
        for start in range(0, num_samples, options.samples_per_shard)
    ]
    context = multiprocessing.get_context("spawn")
    report = CachingReport()
    with (
        tqdm(total=num_samples, desc="caching latents", unit="sample", disable=not options.show_progress) as bar,
        ProcessPoolExecutor(
            options.num_workers,
            context,
            initializer=_start_worker,
            initargs=(run, folder, options, context.Value("i", 0)),
        ) as pool,
    ):
        futures = {pool.submit(_cache_block, block): len(block) for block in blocks}
        for future in as_completed(futures):
            report.add(future.result())
            bar.update(futures[future])
    return report


def posterior_moments(encoder: LatentEncoder, pixels: Tensor) -> Tensor:
    """Normalised pixels [n, 3, P, P] -> float16 [n, 2, C, 2g, 2g] on the CPU: mean, then log variance."""
    return torch.stack(encoder.posterior(pixels), dim=1).half().cpu()


def _data_set(run: RunConfig) -> TrainingSet:
    """All samples of the run: what it trains on, then what it validates on."""
    start = start_of(run)
    vision, assets = start.manifest.model.vision, start.directory / ASSETS_NAME
    training, valid = build_dataset(run, vision, assets), build_valid_dataset(run, vision, assets)
    if valid is None:
        return training
    return ConcatDataset([*(training.datasets if isinstance(training, ConcatDataset) else [training]), valid])


_worker: _Worker | None = None
"""Set in worker processes only."""


def _start_worker(run: RunConfig, folder: Path, options: CachingOptions, started: Any) -> None:
    global _worker
    with started.get_lock():
        number, started.value = started.value, started.value + 1
    _worker = _Worker(run, folder, options, number)


def _cache_block(block: range) -> CachingReport:
    assert _worker is not None
    return _worker.cache(block)


class _Worker:
    """A process with the VAE; number i of them uses GPU i, modulo their number, where there are any."""

    def __init__(self, run: RunConfig, folder: Path, options: CachingOptions, number: int) -> None:
        gpus = torch.cuda.device_count()
        self._device = torch.device("cuda", number % gpus) if gpus else torch.device("cpu")
        torch.set_num_threads(max(1, torch.get_num_threads() // options.num_workers))
        self._dataset = _data_set(run)
        self._encoder = load_latent_encoder(open_checkpoint(start_of(run).directory)).to(self._device)
        self._folder, self._batch_size = folder, options.batch_size
        self._known = LatentCache(folder)
        self._threads = ThreadPoolExecutor(max(1, run.data.num_workers))

    def cache(self, block: range) -> CachingReport:
        """Encode what is new in a block of samples, and write the block's file."""
        spans = self._spans(block)
        names = repr([block.start, *(span.name for span in spans)])
        path = self._folder / f"{hashlib.blake2b(names.encode(), digest_size=12).hexdigest()}.safetensors"
        if path.exists():
            return CachingReport(kept_blocks=1)
        found = _Findings()
        if block.start == 0:
            size = self._encoder.image_size
            found.moments[DUMMY_DIGEST] = posterior_moments(
                self._encoder, torch.zeros(1, 3, size, size, device=self._device)
            )[0]
        for start in range(0, len(spans), self._batch_size):
            self._encode(spans[start : start + self._batch_size], found)
        write_shard(path, found.moments, list(found.undecodable))
        return CachingReport(
            encoded=len(found.moments),
            broken=found.unreadable + len(found.undecodable),
            examples=found.examples[:_MAX_EXAMPLES],
        )

    def _spans(self, block: range) -> list[ImageSpan]:
        """Images that training would see; samples with broken records have none there."""
        spans: list[ImageSpan] = []
        for index in block:
            try:
                spans += self._dataset[index].images
            except SampleError:
                continue
        return spans

    def _encode(self, spans: Sequence[ImageSpan], found: _Findings) -> None:
        """Read, decode and encode a batch of images; those that are cached already are left out."""
        loaded = list(self._threads.map(self._load, spans))
        new: dict[bytes, Tensor] = {}
        for digest, pixels in loaded:
            if isinstance(pixels, ImageError):
                found.add_broken(digest, str(pixels))
            elif digest is not None and pixels is not None and digest not in found.moments:
                new[digest] = pixels
        if new:
            moments = posterior_moments(self._encoder, torch.stack(list(new.values())).to(self._device))
            found.moments |= zip(new, moments, strict=True)

    def _load(self, span: ImageSpan) -> tuple[bytes | None, Tensor | ImageError | None]:
        """Digest (None: the file cannot be read) and pixels (None: cached already) of an image."""
        assert span.read_bytes is not None
        try:
            data = span.read_bytes()
        except ImageError as error:
            return None, error
        digest = image_digest(data)
        if digest in self._known:
            return digest, None
        try:
            return digest, self._dataset.image_processor(decode_image(data, span.name))
        except ImageError as error:
            return digest, error


@dataclass
class _Findings:
    """Of one block: moments and broken images by digest, files that cannot be read, and a few messages."""

    moments: dict[bytes, Tensor] = field(default_factory=dict)
    undecodable: set[bytes] = field(default_factory=set)
    unreadable: int = 0
    examples: list[str] = field(default_factory=list)

    def add_broken(self, digest: bytes | None, message: str) -> None:
        """An image that cannot be decoded, or whose file cannot be read (no digest)."""
        if digest is None:
            self.unreadable += 1
        else:
            self.undecodable.add(digest)
        self.examples.append(message)
