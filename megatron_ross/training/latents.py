"""VAE moments of a data set, computed once: what tools/cache_latents.py does, and the check before a run reads them.

Every data set is cut into blocks of samples, and each block has a list of its images, named by what is in the block.
Worker processes take blocks one by one. What is encoded is what has no moments yet: images of new blocks, those that
could not be read the last time, and those whose files have changed since; so a stopped call goes on where it was, and
a call after the images were mended repairs exactly these.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
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
from megatron_ross.data.dataset import ConcatDataset, RossDataset
from megatron_ross.data.errors import ImageError, SampleError
from megatron_ross.data.images import ImageProcessor
from megatron_ross.data.latent_blocks import (
    CachedImage,
    Coverage,
    MissingImage,
    block_path,
    coverage_path,
    read_block,
    read_coverage,
    write_block,
    write_coverage,
)
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
from megatron_ross.training.data import build_dataset, build_valid_dataset
from megatron_ross.training.start import start_of, with_image_conversion

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
        ImageProcessor.from_config(model.vision.shown(data.image_aspect_ratio, data.image_conversion)),
        latent_channels=model.vae.latent_channels,
        grid_size=model.vision.grid_size,
    )


def check_latent_cache(run: RunConfig, directory: Path) -> list[str]:
    """The run's `latent_cache`, if it has one, is for the VAE and images of the checkpoint it starts from, and holds
    the run's data sets as far as that is written down.

    Images that were replaced after they were cached are not looked for: the digest of every image is compared when
    training reads it, and one that is not in the cache stops the run.

    Returns:
        Warnings: data sets of which the cache does not say whether it holds them.

    Raises:
        ValueError: another VAE or other images, or images are missing; one line that says why and what to do.
    """
    if not run.data.latent_cache:
        return []
    checkpoint = open_checkpoint(directory)
    if checkpoint.manifest.model.vae is None:
        raise ConfigError(
            f"latent_cache={run.data.latent_cache!r}: the model has no VAE (it is LLaVA); leave latent_cache out"
        )
    run = with_image_conversion(run, start_of(run))
    folder = Path(run.data.latent_cache)
    check_cache(folder, cache_key(checkpoint, run.data))
    found = [_check_coverage(run, folder, dataset) for dataset in _data_sets(run)]
    return [warning for warning in found if warning]


def _check_coverage(run: RunConfig, folder: Path, dataset: RossDataset) -> str:
    """A warning, or nothing. Raises ValueError."""
    named, repair = f"latent_cache={str(folder)!r}:", repair_command(folder)
    coverage = read_coverage(coverage_path(folder, dataset))
    if coverage is None:
        return f"{named} does not say whether it holds {dataset.name}; an image that it lacks stops the run when read"
    if not coverage.is_finished:
        raise ConfigError(f"{named} caching of {coverage.data} was not finished; go on with {repair}")
    if run.data.seq_length > coverage.seq_length:
        raise ConfigError(
            f"{named} {coverage.data} was cached with seq_length {coverage.seq_length}, this run has "
            f"{run.data.seq_length} and may use more images; add them with {repair}"
        )
    if coverage.is_beyond(run.data.max_bad_sample_share):
        raise ConfigError(
            f"{named} {coverage.num_missing:,} of {coverage.num_images:,} images of {coverage.data} are missing, more "
            f"than max_bad_sample_share={run.data.max_bad_sample_share} allows (e.g. {coverage.missing[0].problem}); "
            f"mend them, then {repair}"
        )
    if coverage.missing and (mended := _mended(folder, dataset, coverage)):
        raise ConfigError(f"{named} an image that could not be cached can be read now ({mended}); add it with {repair}")
    return ""


def _mended(folder: Path, dataset: RossDataset, coverage: Coverage) -> str:
    """An image whose file has changed since it was found missing; training would stop there."""
    cache = LatentCache(folder)
    for image in coverage.missing:
        try:
            name = dataset.record(image.sample).images[image.number]
            if image_digest(dataset.read_image(image.sample, image.number, name)) not in cache:
                return f"{dataset.name}, sample {image.sample}, image {name!r}"
        except (SampleError, IndexError):  # still broken; or another record, where coverage_path saw none change
            continue
    return ""


def repair_command(folder: Path) -> str:
    """What completes a cache."""
    return f"`python tools/cache_latents.py --latent-cache {folder}` and the other settings of the run"


@dataclass(frozen=True)
class CachingOptions:
    """How a data set is cached. `batch_size` images go through the VAE at a time; `verify` reads all images again,
    also those whose files have not changed by size and times."""

    num_workers: int = 1
    batch_size: int = 8
    samples_per_shard: int = 500
    show_progress: bool = True
    verify: bool = False


@dataclass
class CachingReport:
    """What was found.

    Attributes:
        encoded: images encoded now.
        num_images: all images of the blocks.
        broken: those without moments: they cannot be read or decoded.
        replaced: those whose bytes are no longer those that were cached before.
        kept_blocks, repaired_blocks: blocks that were there already, as they are or with other images now.
        missing: the broken images, for their data set's coverage.
        incomplete: data sets that lack more images than `max_bad_sample_share` lets training skip.
    """

    encoded: int = 0
    num_images: int = 0
    broken: int = 0
    replaced: int = 0
    kept_blocks: int = 0
    repaired_blocks: int = 0
    missing: list[MissingImage] = field(default_factory=list)
    incomplete: list[str] = field(default_factory=list)

    @property
    def examples(self) -> list[str]:
        return [image.problem for image in self.missing[:_MAX_EXAMPLES]]

    def add(self, other: CachingReport) -> None:
        self.encoded += other.encoded
        self.num_images += other.num_images
        self.broken += other.broken
        self.replaced += other.replaced
        self.kept_blocks += other.kept_blocks
        self.repaired_blocks += other.repaired_blocks
        self.incomplete = self.incomplete + other.incomplete
        self.missing = sorted([*self.missing, *other.missing], key=lambda image: (image.sample, image.number))


def cache_data_set(run: RunConfig, folder: Path, options: CachingOptions) -> CachingReport:
    """Write moments of every image of the run's data sets to `folder`, which may hold some already.

    Args:
        run: names the data (data_path, image_folder, blend) and the checkpoint (init_from or load).

    Raises:
        ValueError: the checkpoint has no VAE, the folder is another VAE's cache, or the data cannot be opened.
    """
    start = start_of(run)
    run = with_image_conversion(run, start)
    create_cache(folder, cache_key(open_checkpoint(start.directory), run.data))
    datasets = _data_sets(run)
    context = multiprocessing.get_context("spawn")
    whole = CachingReport()
    with ProcessPoolExecutor(
        options.num_workers, context, initializer=_start_worker, initargs=(run, folder, options, context.Value("i", 0))
    ) as pool:
        for number, dataset in enumerate(datasets):
            path = coverage_path(folder, dataset)
            coverage = Coverage(dataset.name, run.data.seq_length)
            write_coverage(path, coverage)
            report = _cache_blocks(pool, number, len(dataset), options)
            coverage = replace(
                coverage,
                is_finished=True,
                num_images=report.num_images,
                num_missing=report.broken,
                missing=report.missing,
            )
            write_coverage(path, coverage)
            if coverage.is_beyond(run.data.max_bad_sample_share):
                report.incomplete = [dataset.name]
            whole.add(report)
    return whole


def _cache_blocks(pool: ProcessPoolExecutor, number: int, num_samples: int, options: CachingOptions) -> CachingReport:
    """All blocks of data set `number`."""
    size, report = options.samples_per_shard, CachingReport()
    blocks = [range(start, min(start + size, num_samples)) for start in range(0, num_samples, size)]
    with tqdm(total=num_samples, desc="caching latents", unit="sample", disable=not options.show_progress) as bar:
        futures = {pool.submit(_cache_block, number, block): len(block) for block in blocks}
        for future in as_completed(futures):
            report.add(future.result())
            bar.update(futures[future])
    return report


def posterior_moments(encoder: LatentEncoder, pixels: Tensor) -> Tensor:
    """Normalised pixels [n, 3, P, P] -> float16 [n, 2, C, 2g, 2g] on the CPU: mean, then log variance."""
    return torch.stack(encoder.posterior(pixels), dim=1).half().cpu()


def _data_sets(run: RunConfig) -> list[RossDataset]:
    """All data sets of the run: what it trains on, then what it validates on."""
    start = start_of(run)
    vision, assets = start.manifest.model.vision, start.directory / ASSETS_NAME
    training, valid = build_dataset(run, vision, assets), build_valid_dataset(run, vision, assets)
    datasets = training.datasets if isinstance(training, ConcatDataset) else [training]
    return [*datasets, valid] if valid is not None else datasets


_worker: _Worker | None = None
"""Set in worker processes only."""


def _start_worker(run: RunConfig, folder: Path, options: CachingOptions, started: Any) -> None:
    global _worker
    with started.get_lock():
        number, started.value = started.value, started.value + 1
    _worker = _Worker(run, folder, options, number)


def _cache_block(number: int, block: range) -> CachingReport:
    assert _worker is not None
    return _worker.cache(number, block)


class _Worker:
    """A process with the VAE; number i of them uses GPU i, modulo their number, where there are any."""

    def __init__(self, run: RunConfig, folder: Path, options: CachingOptions, number: int) -> None:
        gpus = torch.cuda.device_count()
        self._device = torch.device("cuda", number % gpus) if gpus else torch.device("cpu")
        torch.set_num_threads(max(1, torch.get_num_threads() // options.num_workers))
        self._datasets = _data_sets(run)
        self._encoder = load_latent_encoder(open_checkpoint(start_of(run).directory)).to(self._device)
        self._folder, self._options = folder, options
        self._known = LatentCache(folder)
        self._threads = ThreadPoolExecutor(max(1, run.data.num_workers))

    def cache(self, number: int, block: range) -> CachingReport:
        """Encode the images of a block that have no moments, and write the block's files if they change."""
        dataset = self._datasets[number]
        samples, spans = self._spans(dataset, block)
        path = block_path(self._folder, block.start, [span.name for span in spans])
        before, stamps = read_block(path), list(self._threads.map(_stamp_of, spans))
        known = {image.name: image for image in before}
        images = [self._kept(known.get(span.name), stamp) for span, stamp in zip(spans, stamps, strict=True)]
        found = _Findings()
        if block.start == 0 and not self._known.has_moments(DUMMY_DIGEST):
            size = self._encoder.image_size
            dummy = torch.zeros(1, 3, size, size, device=self._device)
            found.moments[DUMMY_DIGEST] = posterior_moments(self._encoder, dummy)[0]
        todo = [place for place, image in enumerate(images) if image is None]
        for first in range(0, len(todo), self._options.batch_size):
            places = todo[first : first + self._options.batch_size]
            loaded = self._encode(dataset, [spans[place] for place in places], found)
            for place, (digest, problem) in zip(places, loaded, strict=True):
                images[place] = CachedImage(spans[place].name, stamps[place], digest, problem)
        after = [image for image in images if image is not None]
        self._write(path, before, after, found)
        return _report(samples, spans, before, after, found)

    def _kept(self, image: CachedImage | None, stamp: str) -> CachedImage | None:
        """What is known of an image; None if it has to be read (again)."""
        if image is None or image.problem or not stamp or image.stamp != stamp or self._options.verify:
            return None
        return image if self._known.has_moments(bytes.fromhex(image.digest)) else None

    def _write(self, path: Path, before: list[CachedImage], after: list[CachedImage], found: _Findings) -> None:
        """The moments first: a list without them would be believed."""
        undecodable = [digest for digest in found.undecodable if digest not in self._known]
        if found.moments or undecodable:
            write_shard(_free_name(path.with_suffix(".safetensors")), found.moments, undecodable)
        if before != after or not path.exists():
            write_block(path, after)

    def _spans(self, dataset: RossDataset, block: range) -> tuple[list[int], list[ImageSpan]]:
        """Images that training would see, and their samples; samples with broken records have none there."""
        samples: list[int] = []
        spans: list[ImageSpan] = []
        for index in block:
            try:
                images = dataset[index].images
            except SampleError:
                continue
            samples += [index] * len(images)
            spans += images
        return samples, spans

    def _encode(self, dataset: RossDataset, spans: Sequence[ImageSpan], found: _Findings) -> list[tuple[str, str]]:
        """Read, decode and encode a batch of images, except those that have moments already.

        Returns:
            Per image: hex digest (empty: its file cannot be read), and what is wrong with it (empty: nothing).
        """
        loaded = list(self._threads.map(lambda span: self._load(dataset, span), spans))
        new = {
            digest: pixels
            for digest, pixels in loaded
            if isinstance(pixels, Tensor) and digest is not None and digest not in found.moments
        }
        found.undecodable |= {digest for digest, problem in loaded if isinstance(problem, ImageError) and digest}
        if new:
            moments = posterior_moments(self._encoder, torch.stack(list(new.values())).to(self._device))
            found.moments |= zip(new, moments, strict=True)
        return [
            ((digest or b"").hex(), str(result) if isinstance(result, ImageError) else "") for digest, result in loaded
        ]

    def _load(self, dataset: RossDataset, span: ImageSpan) -> tuple[bytes | None, Tensor | ImageError | None]:
        """Digest (None: the file cannot be read) and pixels (None: cached already) of an image."""
        assert span.read_bytes is not None
        try:
            data = span.read_bytes()
        except ImageError as error:
            return None, ImageError(f"{span.name}: {error}")
        digest = image_digest(data)
        if self._known.has_moments(digest):
            return digest, None
        try:
            return digest, dataset.image_processor(dataset.image_processor.decode(data, span.name))
        except ImageError as error:
            return digest, error


@dataclass
class _Findings:
    """Of one block: new moments by digest, and digests of images that cannot be decoded."""

    moments: dict[bytes, Tensor] = field(default_factory=dict)
    undecodable: set[bytes] = field(default_factory=set)


def _stamp_of(span: ImageSpan) -> str:
    assert span.stamp is not None, "a cache is made of image files"
    return span.stamp()


def _free_name(path: Path) -> Path:
    """`path`, or one beside it: moments that were written before are never written over."""
    number = 0
    free = path
    while free.exists():
        number += 1
        free = path.with_stem(f"{path.stem}-{number}")
    return free


def _report(
    samples: list[int],
    spans: list[ImageSpan],
    before: list[CachedImage],
    after: list[CachedImage],
    found: _Findings,
) -> CachingReport:
    missing = [
        MissingImage(sample, span.index, image.problem)
        for sample, span, image in zip(samples, spans, after, strict=True)
        if image.problem
    ]
    replaced = sum(bool(old.digest) and old.digest != new.digest for old, new in zip(before, after, strict=False))
    is_changed = bool(found.moments) or [i.digest for i in before] != [i.digest for i in after]
    return CachingReport(
        encoded=len(found.moments),
        num_images=len(spans),
        broken=len(missing),
        replaced=replaced,
        kept_blocks=int(bool(before) and not is_changed),
        repaired_blocks=int(bool(before) and is_changed),
        missing=missing,
    )
