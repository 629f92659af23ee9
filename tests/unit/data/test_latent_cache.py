"""The latent cache's files, without a VAE: what is found, what is refused, what is stored."""

from __future__ import annotations

import dataclasses
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ross.data.errors import ImageError
from megatron_ross.data.images import ImageProcessor
from megatron_ross.data.latent_cache import CacheKey, LatentCache, check_cache, create_cache, image_digest, write_shard

KEY = CacheKey.of("a1", ImageProcessor((0.5,) * 3, (0.5,) * 3, 28), latent_channels=4, grid_size=2)
CHANGES: dict[str, Any] = {
    "vae": "b2",
    "image_size": 42,
    "image_aspect_ratio": "square",
    "image_conversion": "published",
    "resize": "crop",
    "image_mean": (0.4, 0.5, 0.5),
    "image_std": (0.4, 0.5, 0.5),
    "moments_shape": (2, 4, 6, 6),
    "resample": "bilinear",
}


def test_every_field_of_the_key_is_listed() -> None:
    assert set(CHANGES) == {field.name for field in dataclasses.fields(CacheKey)}


@pytest.mark.parametrize("name", CHANGES)
def test_a_difference_is_refused_and_named(name: str, tmp_path: Path) -> None:
    create_cache(tmp_path / "cache", KEY)
    check_cache(tmp_path / "cache", KEY)
    other = dataclasses.replace(KEY, **{name: CHANGES[name]})
    for refuse in (check_cache, create_cache):
        with pytest.raises(ValueError, match="another VAE" if name == "vae" else rf"other images \({name}\)") as caught:
            refuse(tmp_path / "cache", other)
        assert "\n" not in str(caught.value)


def test_a_cache_from_before_filters_were_named_is_bicubic(tmp_path: Path) -> None:
    create_cache(tmp_path, KEY)
    stored = json.loads((tmp_path / "cache.json").read_text())
    del stored["resample"]
    (tmp_path / "cache.json").write_text(json.dumps(stored))
    check_cache(tmp_path, KEY)
    with pytest.raises(ValueError, match=r"other images \(resample\): bicubic, this model has bilinear"):
        check_cache(tmp_path, dataclasses.replace(KEY, resample="bilinear"))


def test_an_older_cache_holds_published_images(tmp_path: Path) -> None:
    create_cache(tmp_path, KEY)
    stored = json.loads((tmp_path / "cache.json").read_text())
    assert stored.pop("image_conversion") == "viewer"
    (tmp_path / "cache.json").write_text(json.dumps(stored))
    check_cache(tmp_path, dataclasses.replace(KEY, image_conversion="published"))
    with pytest.raises(ValueError, match=r"other images \(image_conversion\): published, .*give image_conversion: pub"):
        check_cache(tmp_path, KEY)


@pytest.mark.parametrize("text", [None, "{", "[]", '{"format": 99}'])
def test_what_is_no_cache_is_refused(text: str | None, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "cache.json").write_text(text)
    with pytest.raises(ValueError, match=r"cache.json .*; make one for this model with tools/cache_latents.py"):
        check_cache(tmp_path, KEY)


def test_moments_come_back_from_several_files_and_threads(tmp_path: Path) -> None:
    create_cache(tmp_path, KEY)
    digests = [image_digest(str(i).encode()) for i in range(40)]
    moments = torch.randn(40, *KEY.moments_shape)
    for start in range(0, 40, 16):
        part = slice(start, start + 16)
        write_shard(tmp_path / f"{start}.safetensors", dict(zip(digests[part], moments[part], strict=True)), [])
    broken = image_digest(b"broken")
    write_shard(tmp_path / "empty.safetensors", {}, [broken])
    cache = LatentCache(tmp_path)
    assert len(cache) == 40
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda digest: cache.moments(digest, "x"), digests * 3))
    assert torch.equal(torch.stack(found), moments.half().repeat(3, 1, 1, 1, 1))
    with pytest.raises(ImageError, match=r"a\.jpg could not be decoded"):
        cache.moments(broken, "a.jpg")
    with pytest.raises(ValueError, match=r"b\.jpg is not in latent_cache") as caught:
        cache.moments(image_digest(b"new"), "b.jpg")
    assert not isinstance(caught.value, ImageError)  # not a broken sample: the run must stop
    assert not list(tmp_path.glob(".*"))
