"""WebDataset shards: written by us and by the `webdataset` library, read by both; blends of sources."""

from __future__ import annotations

import io
import json
import pickle
import tarfile

import pytest
import torch
import webdataset

from megatron_ross.config.paths import expand_braces
from megatron_ross.data.dataset import ConcatDataset, RossDataset
from megatron_ross.data.errors import ImageError, RecordError, SampleError
from megatron_ross.data.images import ImageProcessor
from megatron_ross.data.loader import RossLoader
from megatron_ross.data.order import BlendedOrder
from megatron_ross.data.records import parse_record
from megatron_ross.data.shards import ShardFile, write_sample


def _open(path, qwen, processor, cache, template="qwen_2"):
    return RossDataset(path, None, qwen, template, processor, 16, 512, cache_folder=cache)


@pytest.fixture
def shards(toy):
    """The toy data set as two shards, beside its JSON."""
    records = json.loads((toy / "data.json").read_text())
    for number, part in enumerate((records[:9], records[9:])):
        with tarfile.open(toy / f"s-{number:03}.tar", "w") as tar:
            for i, record in enumerate(part):
                names = record.get("image", [])
                names = [names] if isinstance(names, str) else names
                images = [("png", (toy / "images" / name).read_bytes()) for name in names]
                write_sample(tar, f"{number}/{i:06}", record, images)
    return toy


def test_shards_hold_the_same_samples_as_json(shards, qwen, processor, tmp_path):
    local = RossDataset(shards / "data.json", shards / "images", qwen, "qwen_2", processor, 16, 512)
    packed = _open(f"{shards}/s-{{000..001}}.tar", qwen, processor, tmp_path / "cache")
    assert len(packed) == len(local) == 23
    for i in (22, 0, 9, 8, *range(23)):
        a, b = packed[i], local[i]
        assert torch.equal(a.input_ids, b.input_ids)
        assert torch.equal(a.labels, b.labels)
        assert len(a.images) == len(b.images)
        for x, y in zip(a.images, b.images, strict=True):
            assert torch.equal(x.load_pixels(), y.load_pixels())


def test_our_shards_are_read_by_webdataset(shards):
    samples = list(webdataset.WebDataset(str(shards / "s-000.tar"), shardshuffle=False, empty_check=False))
    assert len(samples) == 9
    records = json.loads((shards / "data.json").read_text())
    assert [json.loads(s["json"])["id"] for s in samples] == [r["id"] for r in records[:9]]
    assert samples[0]["png"] == (shards / "images/0.png").read_bytes()


def test_webdatasets_shards_are_read_by_us(toy, qwen, processor, tmp_path):
    image = (toy / "images/1.png").read_bytes()
    turns = [{"from": "human", "value": "<image>\n<image>\nSame?"}, {"from": "gpt", "value": "Yes."}]
    with webdataset.TarWriter(str(tmp_path / "a.tar")) as writer:
        writer.write({"__key__": "x/one", "PNG": image, "json": {"conversations": turns[:1]}})
        writer.write({"__key__": "x/two", "10.png": image, "9.png": image, "json": {"id": 2, "conversations": turns}})
        writer.write({"__key__": "x/none", "cls": 3})
        writer.write({"__key__": "x/three", "png": image, "txt": "a caption \n"})
    dataset = _open(tmp_path / "a.tar", qwen, processor, tmp_path / "cache", "plain")
    assert len(dataset) == 3
    assert len(dataset.record(1).images) == 2
    assert dataset.record(2).turns[1].text == "a caption"
    assert dataset[2].images[0].load_pixels().shape == (3, 56, 56)
    with pytest.raises(SampleError):
        dataset[0]


def test_shards_reopen_from_their_index_and_in_other_processes(shards, tmp_path, monkeypatch):
    first = ShardFile(shards / "s-001.tar", tmp_path / "cache")
    monkeypatch.setattr("megatron_ross.data.shards._build", lambda file, size: pytest.fail("built again"))
    second = pickle.loads(pickle.dumps(ShardFile(shards / "s-001.tar", tmp_path / "cache")))
    assert [first[i] for i in range(len(first))] == [second[i] for i in range(len(second))]
    with pytest.raises(IndexError):
        first[len(first)]


def _names(path, *names):
    """A tar of files with these names, each a record, a caption or a picture by its type."""
    content = {"json": json.dumps({"conversations": [{"from": "human", "value": "<image>"}] * 2}).encode()}
    with tarfile.open(path, "w") as tar:
        for name in names:
            info = tarfile.TarInfo(name)
            data = content.get(name.rpartition(".")[2], b"x" * 600)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("a.json", "b.json", "b.jpg", "a.jpg"), r"the files of sample 'a' do not lie together: 'a\.jpg' comes after"),
        (("a.jpg", "b.jpg", "a.json", "b.json"), "the files of sample 'a' do not lie together"),
        (("a.json", "a.jpg", "b.txt", "b.jpg", "a.json", "a.jpg"), "'a.json' comes after other samples"),
        (("x/a.json", "x/a.jpg", "y/a.json", "x/a.1.jpg"), "sample 'x/a'"),
        (("a.json", "a.jpg", "a.json"), "'a.json' is there twice"),
        (("a.json", "a.jpg", "a.JPG"), "'a.JPG' is there twice"),
        (("photo.v2.json", "photo.v2.jpg"), "'photo.v2.json': a sample's name ends at the first dot"),
        (("a.json", "a.left.jpg"), "'a.left.jpg': a sample's name ends at the first dot"),
        (("a.1.json", "a.1.jpg", "a.2.json", "a.2.jpg"), "'a.1.json': a sample's name ends"),
        (("a.json", "a.mp4"), "'a.mp4': only images are supported"),
        (("a.json", "a.0.wav"), "only images are supported"),
        (("a.json", "a.heic"), "'a.heic': such images are not supported"),
    ],
)
def test_shards_that_would_lose_pictures_are_refused(names, message, tmp_path):
    with pytest.raises(ValueError, match=rf"cannot read the shard .*a\.tar: .*{message}") as caught:
        ShardFile(_names(tmp_path / "a.tar", *names), tmp_path / "cache")
    assert "\n" not in str(caught.value)


def test_the_same_name_in_two_folders_is_two_samples(tmp_path):
    names = ["./v1.0/a.json", "./v1.0/a.jpg", "./v2.0/a.json", "./v2.0/a.10.tiff", "./v2.0/a.9.avif", "v2.0/._a.jpg"]
    shard = ShardFile(_names(tmp_path / "a.tar", *names), tmp_path / "cache")
    assert [len(shard[i]["image"]) for i in range(len(shard))] == [1, 2]


def test_images_without_a_text_are_records_not_nothing(tmp_path, qwen, processor):
    """They can be trained on where no answer is needed, and are counted as broken elsewhere."""
    path = _names(tmp_path / "a.tar", "a.jpg", "b.json", "b.0.jpg", "b.1.jpg", "c.cls", "d.1.png", "d.0.png")
    shard = ShardFile(path, tmp_path / "cache")
    assert [shard[i].get("image") for i in range(len(shard))] == [["0.img"], ["0.img", "1.img"], ["0.img", "1.img"]]
    assert len(parse_record(shard[2], "a.tar", needs_answer=False).images) == 2
    with pytest.raises(RecordError, match="non-empty list of turns"):
        _open(path, qwen, processor, tmp_path / "cache").record(0)


def test_a_record_that_names_a_file_which_the_shard_lacks_is_a_bad_image(tmp_path, qwen, processor):
    record = {
        "image": "gone.jpg",
        "conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "a"}],
    }
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        write_sample(tar, "a", record, [])
    dataset = _open(tmp_path / "a.tar", qwen, processor, tmp_path / "cache")
    with pytest.raises(ImageError, match=r"'gone.jpg' of .*a\.tar\[0\] is no file of the shard"):
        dataset[0].images[0].load_pixels()


@pytest.mark.parametrize("content", [b"no tar at all", b""])
def test_unreadable_shards_are_user_errors(tmp_path, content):
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.tar"):
        ShardFile(tmp_path / "a.tar", tmp_path / "cache")
    with pytest.raises(ValueError, match="cannot read the shard"):
        ShardFile(tmp_path / "gone.tar", tmp_path / "cache")


def test_braces():
    assert expand_braces("a-{08..11}.tar") == ["a-08.tar", "a-09.tar", "a-10.tar", "a-11.tar"]
    assert len(expand_braces("{0..1}/{0..2}.tar")) == 6
    assert expand_braces("{a,b}.tar") == ["{a,b}.tar"]


def test_a_blend_of_json_and_shards(shards, qwen, processor, tmp_path):
    captions = RossDataset(shards / "data.json", shards / "images", qwen, "qwen_2", processor, 16, 512)
    packed = _open(shards / "s-001.tar", qwen, processor, tmp_path / "cache")
    both = ConcatDataset([captions, packed])
    assert len(both) == 23 + 14
    assert both[23].sample_id == 23
    assert torch.equal(both[23].input_ids, packed[0].input_ids)
    order = BlendedOrder([23, 14], [1.0, 2.0], seed=0)
    loader = RossLoader(both, order, global_batch_size=51, micro_batch_size=1)
    ids = sorted(i for batch in loader.next_step() for i in batch.sample_ids)
    assert ids == sorted([*range(23), *range(23, 37), *range(23, 37)])
    loader.close()
    other = ImageProcessor((0.5,) * 3, (0.5,) * 3, 28)
    with pytest.raises(ValueError, match="process images alike"):
        ConcatDataset([captions, _open(shards / "s-001.tar", qwen, other, tmp_path / "cache")])
