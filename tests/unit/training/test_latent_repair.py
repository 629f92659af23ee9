"""A latent cache heals: images that could not be read, or were replaced, are encoded by the next call, and no other."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from megatron_ross.config.cli import parse_run_config
from megatron_ross.data.images import ImageProcessor
from megatron_ross.data.latent_blocks import read_coverage, write_coverage
from megatron_ross.data.latent_cache import DUMMY_DIGEST, LatentCache, image_digest
from megatron_ross.training import latents
from megatron_ross.training.latents import check_latent_cache
from megatron_ross.training.start import start_of
from tests.helpers.sources import ROOT
from tests.helpers.toy_run import write_data
from tests.helpers.variants import Stored, make_variant

NUM_SAMPLES, PER_SHARD = 23, 5
IN_TWO_BLOCKS = ("2_0.png", "2_1.png", "13_0.png")


class InThisProcess:
    """Stands in for ProcessPoolExecutor, whose processes take seconds to start."""

    def __init__(self, num_workers: int, context: Any, *, initializer: Callable[..., None], initargs: tuple) -> None:
        initializer(*initargs)

    def __enter__(self) -> InThisProcess:
        return self

    def __exit__(self, *_: object) -> None:
        latents._worker = None

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future:
        done: Future = Future()
        done.set_result(function(*arguments))
        return done


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Stored:
    return make_variant(tmp_path_factory.mktemp("model"), "qwen2_siglip")


@pytest.fixture(scope="module")
def tool() -> Any:
    spec = importlib.util.spec_from_file_location("cache_latents", ROOT / "tools" / "cache_latents.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Caching:
    """One data set with one image folder and one cache; calls the tool, and the check before training."""

    def __init__(self, tool: Any, stored: Stored, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.tool, self.capsys, self.folder = tool, capsys, folder
        data = write_data(folder / "data", NUM_SAMPLES)
        self.images, self.cache = Path(data["image_folder"]), folder / "cache"
        flat = {**data, "init_from": stored.path, "seq_length": 256, "latent_cache": self.cache, "num_workers": 1}
        self.arguments = [f"--{name.replace('_', '-')}={value}" for name, value in flat.items()]

    def call(self, *more: str) -> tuple[int, str, str]:
        """Exit code, first line, all of the errors."""
        self.capsys.readouterr()
        code = self.tool.main([*self.arguments, f"--samples-per-shard={PER_SHARD}", *more])
        printed = self.capsys.readouterr()
        errors = [line for line in printed.err.splitlines() if line.startswith("error")]
        return code, printed.out.splitlines()[0] if printed.out else "", "\n".join(errors)

    def check(self, *more: str) -> list[str]:
        run = parse_run_config([*self.arguments, *more])
        return check_latent_cache(run, start_of(run).directory)

    def refusal(self, *more: str) -> str:
        with pytest.raises(ValueError, match=r"^latent_cache=") as caught:
            self.check(*more)
        text = str(caught.value)
        assert "\n" not in text
        assert f"`python tools/cache_latents.py --latent-cache {self.cache}`" in text
        return text

    def digests(self) -> set[bytes]:
        return {image_digest(path.read_bytes()) for path in self.images.iterdir()}


@pytest.fixture
def caching(
    tool: Any, stored: Stored, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Caching:
    monkeypatch.setattr(latents, "ProcessPoolExecutor", InThisProcess)
    return Caching(tool, stored, tmp_path, capsys)


def numbers(line: str) -> list[int]:
    """encoded, kept, repaired, images, replaced, missing."""
    return [int(word.replace(",", "")) for word in line.split() if word.replace(",", "").isdigit()]


def test_missing_images_are_repaired_and_nothing_else(caching: Caching, tmp_path: Path) -> None:
    away = tmp_path / "away"
    away.mkdir()
    for name in IN_TWO_BLOCKS:
        shutil.move(caching.images / name, away / name)
    num_images = len(list(caching.images.iterdir())) + 3
    code, line, error = caching.call()
    assert code == 1
    assert numbers(line) == [num_images - 3 + 1, 0, 0, num_images, 0, 3]  # and the dummy image
    assert "max_bad_sample_share=0.01 allows; mend them and run this command again" in error
    assert f"3 of {num_images} images of" in caching.refusal()
    before = {path: path.stat().st_mtime_ns for path in caching.cache.iterdir()}
    assert caching.call()[0] == 1  # nothing has changed, and it says so again
    assert {p: p.stat().st_mtime_ns for p in before if not p.name.startswith("set-")} == {
        p: t for p, t in before.items() if not p.name.startswith("set-")
    }
    for name in IN_TWO_BLOCKS:
        shutil.move(away / name, caching.images / name)
    assert "missing" in caching.refusal()
    code, line, error = caching.call()
    assert (code, error) == (0, "")
    assert numbers(line) == [3, 3, 2, num_images, 0, 0]
    assert caching.check() == []
    whole = LatentCache(caching.cache)
    assert all(whole.has_moments(digest) for digest in {*caching.digests(), DUMMY_DIGEST})
    assert len(whole) == num_images + 1
    assert numbers(caching.call()[1]) == [0, 5, 0, num_images, 0, 0]


@pytest.mark.parametrize("how", ["bytes", "broken before", "broken now", "same size and time", "behind the stamp"])
def test_replaced_files_are_noticed(how: str, caching: Caching, monkeypatch: pytest.MonkeyPatch) -> None:
    file = caching.images / "5_0.png"
    picture = file.read_bytes()
    if how == "broken before":
        file.write_bytes(b"no picture")
    assert caching.call()[0] == (how == "broken before")
    status = file.stat()
    if how == "broken now":
        file.write_bytes(picture[: len(picture) // 2])
    elif how == "broken before":
        file.write_bytes(picture)
    else:
        file.write_bytes(picture + b"!" if how == "bytes" else picture[:-1] + b"!")
    if how == "same size and time":
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    more = []
    if how == "behind the stamp":  # a file system that shows neither times nor sizes that differ
        monkeypatch.setattr(latents, "_stamp_of", lambda span: "always the same")
        assert numbers(caching.call()[1])[4] == 1  # all stamps are new: everything is read
        file.write_bytes(picture)
        assert numbers(caching.call()[1])[:3] == [0, 5, 0]
        more = ["--verify-images"]
    encoded, kept, repaired, _, replaced, missing = numbers(caching.call(*more)[1])
    is_new = how not in ("broken now", "behind the stamp")  # the first picture's moments are still there
    assert (encoded, kept, repaired, replaced) == (int(is_new), 4, 1, 1)
    assert missing == (how == "broken now")
    if how != "broken now":
        assert LatentCache(caching.cache).has_moments(image_digest(file.read_bytes()))


def test_a_copied_data_set_is_read_and_not_encoded_again(caching: Caching) -> None:
    assert caching.call()[0] == 0
    copy = shutil.copytree(caching.images, caching.folder / "copy")
    code, line, _ = caching.call(f"--image-folder={copy}")
    assert code == 0
    assert numbers(line)[:3] == [0, 5, 0]
    assert caching.check(f"--image-folder={copy}") == []


def test_images_that_training_may_skip_do_not_stop_it_until_they_can_be_read(caching: Caching) -> None:
    file = caching.images / "5_0.png"
    picture = file.read_bytes()
    file.unlink()
    share = "--max-bad-sample-share=0.2"
    assert caching.call(share)[0] == 0
    assert caching.check(share) == []
    assert "missing, more than max_bad_sample_share=0.01 allows (e.g. " in caching.refusal()
    assert "'5_0.png' not found" in caching.refusal()
    file.write_bytes(b"no picture either")
    assert "can be read now" in caching.refusal(share)
    assert caching.call(share)[0] == 0
    assert caching.check(share) == []
    file.write_bytes(picture)
    assert "sample 5, image '5_0.png'" in caching.refusal(share)
    assert caching.call(share)[0] == 0
    assert caching.check() == []


def test_a_cache_that_was_not_finished_is_refused(caching: Caching, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(self: Any, number: int, block: range) -> None:
        if block.start == 2 * PER_SHARD:
            raise KeyboardInterrupt
        return whole(self, number, block)

    whole = latents._Worker.cache
    with monkeypatch.context() as patch:
        patch.setattr(latents._Worker, "cache", killed)
        assert caching.call()[0] == 130
    assert "data.json was not finished; go on with" in caching.refusal()
    code, line, _ = caching.call()
    assert code == 0
    assert numbers(line)[1:3] == [2, 0]
    assert caching.check() == []


def test_what_the_cache_does_not_say(caching: Caching) -> None:
    """Longer samples may have more images; other records, and caches of older versions, are used with a warning."""
    assert caching.call()[0] == 0
    assert "cached with seq_length 256, this run has 300" in caching.refusal("--seq-length=300")
    assert caching.check("--seq-length=200") == []
    records = json.loads((caching.folder / "data" / "data.json").read_text())
    (caching.folder / "part.json").write_text(json.dumps(records[:9]))
    (warning,) = caching.check(f"--data-path={caching.folder / 'part.json'}")
    assert "does not say whether it holds" in warning
    assert "part.json" in warning
    for path in [*caching.cache.glob("*.json")]:
        if path.name != "cache.json":
            path.unlink()
    assert len(caching.check()) == 1
    code, line, _ = caching.call()  # reads everything, encodes nothing
    assert code == 0
    assert numbers(line)[:3] == [0, 0, 0]
    assert caching.check() == []
    (path,) = caching.cache.glob("set-*.json")
    coverage = read_coverage(path)
    assert coverage is not None
    assert coverage.data.endswith("data.json")
    write_coverage(path, coverage)


def test_all_sources_and_the_validation_set_are_checked(caching: Caching) -> None:
    other = write_data(caching.folder / "other", 4)
    valid = [f"--valid-data-path={other['data_path']}", f"--valid-image-folder={other['image_folder']}"]
    assert caching.call()[0] == 0
    # The toy writer's four samples are not the first set's, so the cache says nothing of them.
    assert len(caching.check(*valid)) == 1
    (Path(other["image_folder"]) / "0_0.png").unlink()
    code, _, error = caching.call(*valid)
    assert code == 1
    assert other["data_path"] in error
    assert str(caching.folder / "data" / "data.json") not in error
    assert caching.check() == []
    assert other["data_path"] in caching.refusal(*valid)


def test_moments_are_those_of_the_images_as_they_are_shown(caching: Caching, stored: Stored) -> None:
    """Black writing on a transparent ground: another image for `viewer` than for `published`."""
    Image.new("LA", (40, 30), (0, 0)).save(caching.images / "0_0.png")
    assert caching.call()[0] == 0
    viewer = LatentCache(caching.cache).moments(image_digest((caching.images / "0_0.png").read_bytes()), "a")
    published = [*caching.arguments, "--image-conversion=published", f"--latent-cache={caching.folder / 'second'}"]
    caching.arguments, caching.cache = published, caching.folder / "second"
    assert caching.call()[0] == 0
    black = LatentCache(caching.cache).moments(image_digest((caching.images / "0_0.png").read_bytes()), "a")
    assert not torch.allclose(viewer.float(), black.float(), atol=0.1)
    processor = ImageProcessor.from_config(stored.model.vision)
    assert processor.conversion == "published"
