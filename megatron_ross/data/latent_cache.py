"""VAE posterior moments of images on disk, so that training neither decodes an image for the VAE nor runs the VAE.

A cache is a folder: `cache.json` says of which VAE and which preprocessing the moments are, and any number of
safetensors files hold them, an image by the digest of its file's bytes:

    digests    uint8 [n, 16]
    moments    float16 [n, 2, C, 2g, 2g]    mean, then log variance
    undecodable  uint8 [m, 16]    images that are broken; training skips their samples as it does without a cache

Files appear complete or not at all, and what several of them hold is the same. `latent_blocks.py` has the files that
say which images of which data set are there. The moments of the dummy image, all-zero
pixels, stand under the digest of no bytes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor

from megatron_ross.data.batch import ImageSpan
from megatron_ross.data.errors import ImageError
from megatron_ross.data.images import ImageProcessor
from megatron_ross.text_files import replace_text

_FORMAT = 1
_KEY_NAME = "cache.json"
_DIGEST_BYTES = 16
_MAKE_ONE = "make one for this model with tools/cache_latents.py"


@dataclasses.dataclass(frozen=True)
class CacheKey:
    """What moments depend on besides the image file. `vae` is a digest of the encoder's weights."""

    vae: str
    image_size: int
    image_aspect_ratio: str
    image_conversion: str
    resize: str
    image_mean: tuple[float, ...]
    image_std: tuple[float, ...]
    moments_shape: tuple[int, ...]  # 2, C, 2g, 2g
    resample: str = "bicubic"

    @classmethod
    def of(cls, vae_digest: str, processor: ImageProcessor, *, latent_channels: int, grid_size: int) -> CacheKey:
        """The key of a VAE behind an image processor."""
        return cls(
            vae=vae_digest,
            image_size=processor.image_size,
            image_aspect_ratio=processor.mode,
            image_conversion=processor.conversion,
            resize=processor.resize,
            image_mean=tuple(processor.mean),
            image_std=tuple(processor.std),
            moments_shape=(2, latent_channels, 2 * grid_size, 2 * grid_size),
            resample=processor.resample,
        )


def image_digest(data: bytes) -> bytes:
    """Names an image by the bytes of its file; 16 bytes."""
    return hashlib.blake2b(data, digest_size=_DIGEST_BYTES).digest()


DUMMY_DIGEST = image_digest(b"")
"""Names the dummy image of text-only samples."""


def create_cache(folder: Path, key: CacheKey) -> None:
    """Make `folder` a cache for `key`, or check that it is one.

    Raises:
        ValueError: it is the cache of another VAE or of other preprocessing.
    """
    path = folder / _KEY_NAME
    if path.exists():
        return check_cache(folder, key, advice="give another folder")
    folder.mkdir(parents=True, exist_ok=True)
    replace_text(path, json.dumps({"format": _FORMAT} | dataclasses.asdict(key), indent=1) + "\n")


def check_cache(folder: Path, key: CacheKey, *, advice: str = _MAKE_ONE) -> None:
    """
    Raises:
        ValueError: no cache, or one for another VAE or other preprocessing; the message names the difference.
    """
    stored = {"resample": CacheKey.resample} | _read_key(folder)  # older caches do not name the filter
    for name, wanted in dataclasses.asdict(key).items():
        if (found := stored.get(name)) != wanted:
            what = "another VAE" if name == "vae" else f"other images ({name})"
            if name == "image_conversion" and advice == _MAKE_ONE:
                advice = f"give image_conversion: {found}, or {advice}"
            values = f"{_plain(found)}, this model has {_plain(wanted)}"
            raise ValueError(f"latent_cache={str(folder)!r}: is for {what}: {values}; {advice}")


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _read_key(folder: Path) -> dict[str, Any]:
    path = folder / _KEY_NAME
    try:
        stored = json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"latent_cache={str(folder)!r}: no cache of latents, {path} is missing; {_MAKE_ONE}") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"latent_cache={str(folder)!r}: {path} cannot be read: {error}; {_MAKE_ONE}") from None
    if not isinstance(stored, dict) or stored.get("format") != _FORMAT:
        raise ValueError(f"latent_cache={str(folder)!r}: {path} has another format; {_MAKE_ONE}")
    stored.setdefault("image_conversion", "published")  # older caches do not say
    return {name: tuple(value) if isinstance(value, list) else value for name, value in stored.items()}


def write_shard(path: Path, moments: Mapping[bytes, Tensor], undecodable: Sequence[bytes]) -> None:
    """Write one file of a cache; it appears complete.

    Args:
        moments: by digest, [2, C, 2g, 2g] of any floating dtype; stored as float16. May be empty.
        undecodable: digests of broken images.
    """
    arrays = {"undecodable": _digest_rows(undecodable)}
    if moments:
        arrays["digests"] = _digest_rows(list(moments))
        arrays["moments"] = torch.stack([m.to(torch.float16) for m in moments.values()]).numpy()
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save_file(arrays, temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _digest_rows(digests: Sequence[bytes]) -> np.ndarray:
    return np.frombuffer(b"".join(digests), dtype=np.uint8).reshape(-1, _DIGEST_BYTES)


class LatentCache:
    """Reads moments by image digest, from several threads at a time. Knows the digests, maps the files."""

    def __init__(self, folder: Path) -> None:
        """
        Raises:
            ValueError: not a cache, or one of its files is damaged.
        """
        self.folder = folder
        self.moments_shape = tuple(_read_key(folder)["moments_shape"])
        self._files = sorted(folder.glob("*.safetensors"))
        self._places: dict[bytes, tuple[int, int]] = {}
        self._undecodable: set[bytes] = set()
        self._handles = threading.local()
        for number, path in enumerate(self._files):
            try:
                with safe_open(path, framework="numpy") as file:
                    self._index(number, file)
            except (SafetensorError, OSError) as error:
                raise ValueError(
                    f"{path} is damaged ({error}); delete it and run tools/cache_latents.py again"
                ) from None

    def _index(self, number: int, file: Any) -> None:
        names = set(file.keys())
        if "digests" in names:
            for row, digest in enumerate(file.get_tensor("digests")):
                self._places[digest.tobytes()] = (number, row)
        if "undecodable" in names:
            self._undecodable.update(digest.tobytes() for digest in file.get_tensor("undecodable"))

    def __len__(self) -> int:
        """Images that have moments."""
        return len(self._places)

    def __contains__(self, digest: bytes) -> bool:
        """The image has moments, or is known to be broken."""
        return digest in self._places or digest in self._undecodable

    def has_moments(self, digest: bytes) -> bool:
        return digest in self._places

    def moments(self, digest: bytes, name: str) -> Tensor:
        """float16 [2, C, 2g, 2g] of an image; `name` is for messages.

        Raises:
            ImageError: the image is known to be broken.
            ValueError: the image is not in the cache.
        """
        place = self._places.get(digest)
        if place is None:
            if digest in self._undecodable:
                raise ImageError(f"{name} could not be decoded when latents were cached")
            raise ValueError(
                f"{name} is not in latent_cache {self.folder}; run tools/cache_latents.py for this data set (again)"
            )
        number, row = place
        return torch.from_numpy(self._slice(number)[row : row + 1][0])

    def _slice(self, number: int) -> Any:
        """The moments of a file. Handles belong to threads: a file's is not made for several at a time."""
        if not hasattr(self._handles, "by_file"):
            self._handles.by_file = {}
        handles: dict[int, Any] = self._handles.by_file
        if number not in handles:
            handles[number] = safe_open(self._files[number], framework="numpy").get_slice("moments")
        return handles[number]


class LatentReader:
    """Moments of the images of a microbatch, read by several threads."""

    def __init__(self, cache: LatentCache, num_workers: int) -> None:
        self._cache = cache
        self._pool = ThreadPoolExecutor(max(1, num_workers), thread_name_prefix="ross-latents")

    @property
    def moments_shape(self) -> tuple[int, ...]:
        """2, C, 2g, 2g."""
        return self._cache.moments_shape

    def read(self, spans: Sequence[ImageSpan | None]) -> list[Tensor | ImageError]:
        """float16 [2, C, 2g, 2g] per image, or what is wrong with its file; None is the dummy image.

        Raises:
            ValueError: an image is not in the cache.
        """
        return list(self._pool.map(self._read, spans))

    def _read(self, span: ImageSpan | None) -> Tensor | ImageError:
        try:
            if span is None:
                return self._cache.moments(DUMMY_DIGEST, "the dummy image")
            assert span.read_bytes is not None, "a cache is keyed by image files"
            return self._cache.moments(image_digest(span.read_bytes()), span.name)
        except ImageError as error:
            return error

    def close(self) -> None:
        """Stop the threads."""
        self._pool.shutdown(cancel_futures=True)
