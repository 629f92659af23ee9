"""What a latent cache writes down about its images, and how it notices that a file is another one now."""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
from pathlib import Path

import fsspec
import pytest

from megatron_ross.data.dataset import RossDataset
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
from megatron_ross.data.records import ImageRoot


def test_lists_come_back(tmp_path: Path) -> None:
    path = block_path(tmp_path, 500, ["a", "b"])
    assert path != block_path(tmp_path, 0, ["a", "b"]) != block_path(tmp_path, 0, ["a", "c"])
    assert read_block(path) == []
    images = [CachedImage("a", "1 2 3", "ab12", ""), CachedImage("b", "", "", "image 'b' not found")]
    write_block(path, images)
    assert read_block(path) == images
    assert read_coverage(tmp_path / "set-1.json") is None
    coverage = Coverage("data.json", 2048, True, 20_011, 20_001, [MissingImage(i, 0, "gone") for i in range(20_001)])
    write_coverage(tmp_path / "set-1.json", coverage)
    again = read_coverage(tmp_path / "set-1.json")
    assert again is not None
    assert (again.num_missing, again.missing[-1].sample) == (20_001, 9_999)
    assert not Coverage("d", 1, True, num_images=200, num_missing=2).is_beyond(0.01)
    assert Coverage("d", 1, True, num_images=199, num_missing=2).is_beyond(0.01)
    assert not Coverage("d", 1, True).is_beyond(0.0)


@pytest.mark.parametrize("text", ["[", "3", "[[1, 2]]", '{"data": 1}'])
def test_damaged_lists_are_named(text: str, tmp_path: Path) -> None:
    path = tmp_path / "set-x.json"
    path.write_text(text)
    for read in (read_block, read_coverage):
        with pytest.raises(ValueError, match=r"set-x\.json is damaged .* delete it and run"):
            read(path)


def test_a_data_set_is_known_by_its_records_wherever_they_lie(toy, qwen, processor, tmp_path) -> None:
    def path_of(folder: Path, template: str = "qwen_2") -> Path:
        data = RossDataset(folder / "data.json", folder / "images", qwen, template, processor, 16, 512)
        return coverage_path(Path("cache"), data)

    copy = shutil.copytree(toy, tmp_path / "elsewhere", ignore=lambda *_: ["elsewhere"])
    os.utime(copy / "data.json", (1, 1))
    assert path_of(toy) == path_of(copy) == path_of(copy, "plain")
    records = json.loads((toy / "data.json").read_text())
    for changed in ([*records, records[0]], [*records[:-1], records[0]], [*records[:-1], {"id": "no record"}]):
        (copy / "data.json").write_text(json.dumps(changed))
        assert path_of(copy) != path_of(toy)


def test_a_replaced_file_has_another_stamp(tmp_path: Path) -> None:
    root, file = ImageRoot(tmp_path), tmp_path / "a.png"
    assert root.stamp("a.png") == ""
    assert root.stamp("../a.png") == ""
    file.write_bytes(b"one")
    first, status = root.stamp("a.png"), file.stat()
    assert first == root.stamp("a.png") != ""
    other = tmp_path / "b.png"
    other.write_bytes(b"two")
    os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
    os.replace(other, file)
    after = file.stat()
    assert (after.st_size, after.st_mtime_ns) == (status.st_size, status.st_mtime_ns)
    assert root.stamp("a.png") != first


def test_stamps_of_urls_and_shards(tmp_path: Path, qwen, processor) -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe("/pictures/a.png", b"one")
    root = ImageRoot("memory://pictures")
    first = root.stamp("a.png")
    assert first == root.stamp("a.png") != ""
    memory.pipe("/pictures/a.png", b"three")
    assert root.stamp("a.png") not in ("", first)
    memory.rm("/pictures", recursive=True)
    assert root.stamp("a.png") == ""

    def stamp(data: bytes) -> str:
        with tarfile.open(tmp_path / "a.tar", "w") as tar:
            for name, content in (("0.txt", b"a cat"), ("0.jpg", data)):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
        shard = RossDataset(tmp_path / "a.tar", None, qwen, "plain", processor, 16, 512, cache_folder=tmp_path)
        (span,) = shard[0].images
        assert span.stamp is not None
        return span.stamp()

    first = stamp(b"one")
    os.utime(tmp_path / "a.tar", (5, 5))
    assert stamp(b"two") != first
