"""Parquet files: the same samples, order and resume as JSON; columns as the hub has them; large groups and damage."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
import tarfile
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pytest
import torch
from pyarrow import parquet

from megatron_ross.data import parquet as module
from megatron_ross.data.dataset import ConcatDataset, RossDataset
from megatron_ross.data.decoders import PillowDecoder
from megatron_ross.data.errors import ImageError, RecordError
from megatron_ross.data.latent_cache import image_digest
from megatron_ross.data.lengths import measure, modality_lengths
from megatron_ross.data.loader import RossLoader
from megatron_ross.data.order import BlendedOrder, SampleOrder
from megatron_ross.data.packing import PackedOrder
from megatron_ross.data.parquet import ParquetFile
from megatron_ross.data.records import ImageRoot
from megatron_ross.data.shard_writer import write_shards
from megatron_ross.data.shards import write_sample
from megatron_ross.data.sources import open_sources
from megatron_ross.data.survey import survey_dataset
from tests.helpers.hostile import attempt
from tests.unit.data.conftest import chat

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
SAID = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))


def _names(record: dict[str, Any]) -> list[str]:
    names = record.get("image", [])
    return [names] if isinstance(names, str) else names


def _openai(record: dict[str, Any]) -> list[dict[str, str]]:
    roles = {"human": "user", "gpt": "assistant"}
    return [{"role": roles[turn["from"]], "content": turn["value"]} for turn in record["conversations"]]


@pytest.fixture
def hub(toy):
    """The toy data set as two parquet files in groups of 4 and 5 rows, beside its JSON."""
    records = json.loads((toy / "data.json").read_text())
    for number, (part, size) in enumerate(((records[:9], 4), (records[9:], 5))):
        images = [
            [{"bytes": (toy / "images" / name).read_bytes(), "path": f"hub/{name}"} for name in _names(record)] or None
            for record in part
        ]
        columns = {
            "id": pa.array([str(record["id"]) for record in part]),
            "images": pa.array(images, pa.list_(IMAGE)),
            "messages": pa.array([_openai(record) for record in part], SAID),
            "score": pa.array(np.arange(len(part)) / 7),
        }
        parquet.write_table(pa.table(columns), toy / f"p-{number}.parquet", row_group_size=size)
    return toy


def _json(toy, qwen, processor) -> RossDataset:
    return RossDataset(toy / "data.json", toy / "images", qwen, "qwen_2", processor, 16, 512)


def _open(path, qwen, processor, cache, root=None) -> RossDataset:
    return RossDataset(path, root, qwen, "qwen_2", processor, 16, 512, cache_folder=cache)


def _same(a, b) -> bool:
    pairs = zip(a.images, b.images, strict=True)
    return (
        torch.equal(a.input_ids, b.input_ids)
        and torch.equal(a.labels, b.labels)
        and all(torch.equal(x.load_pixels(), y.load_pixels()) and x.read_bytes() == y.read_bytes() for x, y in pairs)
    )


def test_parquet_holds_the_same_samples_as_json(hub, qwen, processor, tmp_path):
    local, table = _json(hub, qwen, processor), _open(f"{hub}/p-{{0..1}}.parquet", qwen, processor, tmp_path / "cache")
    assert len(table) == len(local) == 23
    for i in (22, 0, 9, 8, *range(23)):
        assert _same(table[i], local[i])
        assert table.modality_length(i) == local.modality_length(i)
        assert _same(table.question(i), local.question(i))
    assert table.record(2).images == ("hub/2.png", "hub/1.png"), "names for messages"


@pytest.mark.parametrize("packed", [False, True])
def test_order_packing_and_resume_are_those_of_json(packed, hub, qwen, processor, tmp_path):
    table = _open(f"{hub}/p-{{0..1}}.parquet", qwen, processor, tmp_path / "cache")
    batches = []
    for dataset in (_json(hub, qwen, processor), table):
        order: SampleOrder = SampleOrder(23, seed=5)
        settings: dict[str, Any] = {"global_batch_size": 4, "micro_batch_size": 2}
        if packed:
            order, settings["pack_length"] = PackedOrder(order, measure(dataset, 1, False), 512), 512
        loader = RossLoader(dataset, order, **settings)
        loader.next_step()
        again = RossLoader(dataset, order, **settings)
        again.load_state_dict(loader.state_dict())
        batches.append([*loader.next_step(), *again.next_step()])
        loader.close()
        again.close()
    for a, b in zip(*batches, strict=True):
        assert a.sample_ids == b.sample_ids
        assert torch.equal(a.tokens, b.tokens)
        assert torch.equal(a.pixels, b.pixels)
    lengths = [modality_lengths(d, cache_folder=tmp_path / "l") for d in (_json(hub, qwen, processor), table)]
    assert np.array_equal(*lengths)


def test_a_blend_of_json_and_parquet_and_other_processes(hub, qwen, processor, tmp_path):
    local, table = _json(hub, qwen, processor), _open(hub / "p-1.parquet", qwen, processor, tmp_path / "cache")
    both = pickle.loads(pickle.dumps(ConcatDataset([local, table])))
    loader = RossLoader(both, BlendedOrder([23, 14], [1.0, 2.0], seed=0), global_batch_size=51, micro_batch_size=1)
    ids = sorted(i for batch in loader.next_step() for i in batch.sample_ids)
    assert ids == sorted([*range(23), *range(23, 37), *range(23, 37)])
    loader.close()
    assert all(_same(both[23 + i], local[9 + i]) for i in range(14))


def test_shards_made_of_parquet_hold_the_same(hub, qwen, processor, tmp_path):
    table = _open(f"{hub}/p-{{0..1}}.parquet", qwen, processor, tmp_path / "cache")
    assert write_shards(table, {3}, tmp_path / "shards", 30) == 1
    tar = _open(tmp_path / "shards/000000.tar", qwen, processor, tmp_path / "cache")
    kept = [i for i in range(23) if i != 3]
    assert all(_same(tar[i], table[k]) for i, k in enumerate(kept))


def test_a_survey_reads_every_image_and_skips_what_training_skips(hub, qwen, processor, tmp_path):
    (hub / "images/5.png").write_bytes(b"damaged")  # only the folder's: the parquet file has its own
    table = _open(f"{hub}/p-{{0..1}}.parquet", qwen, processor, tmp_path / "cache")
    surveys = [
        survey_dataset(
            dataset, decode=True, num_workers=1, progress_file=tmp_path / f"{number}.jsonl", show_progress=False
        )
        for number, dataset in enumerate((table, _json(hub, qwen, processor)))
    ]
    assert surveys[0].skipped == set()
    assert surveys[1].skipped == {5, 21}
    assert surveys[0].num_tokens == measure(table, 1, False).tolist()


def test_dali_and_threads_read_images_of_parquet(hub, qwen, processor, tmp_path):
    pytest.importorskip("nvidia.dali")
    from megatron_ross.data.dali_images import DaliDecoder

    table = _open(f"{hub}/p-{{0..1}}.parquet", qwen, processor, tmp_path / "cache")
    spans = [
        [span for i in range(23) for span in dataset[i].images] for dataset in (table, _json(hub, qwen, processor))
    ]
    for decoder in (PillowDecoder(4), DaliDecoder(processor, num_threads=2, device_id=None)):
        for pixels, expected in zip(*map(decoder.decode, spans), strict=True):
            assert torch.equal(pixels, expected)
        decoder.close()


def test_urls(hub, qwen, processor, tmp_path):
    memory = fsspec.filesystem("memory")
    memory.put(str(hub / "p-0.parquet"), "/set/p-0.parquet")
    remote = _open("memory://set/p-0.parquet", qwen, processor, tmp_path / "cache")
    local = _json(hub, qwen, processor)
    assert all(_same(remote[i], local[i]) for i in range(9))
    memory.rm("/set", recursive=True)


def test_the_second_start_reads_the_index_only_and_texts_touch_no_image(hub, tmp_path, monkeypatch):
    first = ParquetFile(hub / "p-1.parquet", cache_folder=tmp_path / "cache")
    monkeypatch.setattr(module, "_build", lambda *_: pytest.fail("built again"))
    second = ParquetFile(hub / "p-1.parquet", cache_folder=tmp_path / "cache")
    monkeypatch.setattr(ParquetFile, "_value", lambda *_: pytest.fail("an image was read"))
    assert [second[i] for i in range(14)] == [first[i] for i in range(14)]
    assert isinstance(second._records._ranges.base, np.memmap)
    assert second.fingerprint == first.fingerprint
    with pytest.raises(IndexError):
        second[14]


def test_images_in_order_decode_a_group_once(hub, monkeypatch, tmp_path):
    """As prepare_data reads them; a shuffled order cannot."""
    file = ParquetFile(hub / "p-1.parquet", cache_folder=tmp_path / "cache")
    opened = []
    original = ParquetFile._reader
    monkeypatch.setattr(ParquetFile, "_reader", lambda self: opened.append(1) or original(self))
    for index in range(14):
        for number, name in enumerate(file[index].get("images", [])):
            file.read_image(index, number, name)
    assert len(opened) == 3
    monkeypatch.setattr("megatron_ross.data.row_groups._KEPT_BYTES", 0)
    copy = pickle.loads(pickle.dumps(file))
    for index in (13, 0, 13, 0):
        copy.read_image(index, 0, "")
    assert len(opened) == 3 + 4


def _png(toy, number: int) -> bytes:
    return (toy / "images" / f"{number}.png").read_bytes()


def _columns(toy) -> dict[str, tuple[pa.Array, list[bytes | None]]]:
    """Columns of images in the forms that are seen, and the bytes that they stand for; None: no image."""
    data = [_png(toy, i) for i in range(3)]
    given: list[bytes | None] = [data[0], None, data[2]]
    return {
        "names": (pa.array(["0.png", None, "2.png"]), given),
        "bytes with nulls": (pa.array([data[0], None, data[2]]), given),
        "bytes in every row": (pa.array(data), list(data)),
        "large bytes": (pa.array(data, pa.large_binary()), list(data)),
        "structs": (pa.array([{"bytes": data[0], "path": None}, None, {"bytes": None, "path": "2.png"}], IMAGE), given),
        "structs of bytes": (
            pa.array([{"bytes": data[0]}, None, {"bytes": data[2]}], pa.struct([("bytes", pa.binary())])),
            given,
        ),
        "lists of names": (pa.array([["0.png"], [], ["2.png"]]), given),
        "large lists of bytes": (pa.array([[data[0]], None, [data[2]]], pa.large_list(pa.binary())), given),
        "lists of structs": (
            pa.array([[{"bytes": data[0], "path": "a"}], [], [{"bytes": data[2], "path": None}]], pa.list_(IMAGE)),
            given,
        ),
        "web paths with bytes": (
            pa.array([{"bytes": b, "path": "https://host/a.png"} for b in data], IMAGE),
            list(data),
        ),
    }


@pytest.mark.parametrize("column", ["image", "images"])
@pytest.mark.parametrize("compression", ["snappy", "none", "zstd"])
def test_columns_of_images(column, compression, toy, qwen, processor, tmp_path):
    for form, (images, expected) in _columns(toy).items():
        turns = [chat("<image>\na" if data else "a", "b") for data in expected]
        table = pa.table({"conversations": turns, column: images})
        parquet.write_table(table, tmp_path / "a.parquet", compression=compression, row_group_size=2)
        dataset = _open(tmp_path / "a.parquet", qwen, processor, tmp_path / "cache", toy / "images")
        found = [[span.read_bytes() for span in dataset[i].images] for i in range(3)]
        assert found == [[data] if data else [] for data in expected], form
        assert dataset.modality_length(0) > 0
        digests = [image_digest(span.read_bytes()) for span in dataset[2].images]
        assert digests == [image_digest(expected[2])], "a latent cache finds them by their bytes"


def test_columns_of_turns(toy, qwen, processor, tmp_path):
    """`datasets` stores a Sequence as one object of lists; typed parts have a null for what they lack."""
    part = pa.struct([("index", pa.int64()), ("text", pa.string()), ("type", pa.string())])
    typed = pa.list_(pa.struct([("content", pa.list_(part)), ("role", pa.string())]))
    question = [{"index": None, "text": "What?", "type": "text"}, {"index": 0, "text": None, "type": "image"}]
    said = [{"content": question, "role": "user"}, {"content": [{"text": "b", "type": "text"}], "role": "assistant"}]
    image = pa.array([[{"bytes": _png(toy, 1), "path": None}]], pa.list_(IMAGE))
    sequence = {"from": ["human", "gpt"], "value": ["<image>\nWhat?", "b"]}
    tables = [
        pa.table({"messages": pa.array([said], typed), "images": image}),
        pa.table({"conversations": pa.array([sequence]), "image": image}),
        pa.table({"conversations": [chat("<image>\nWhat?", "b")], "messages": pa.nulls(1), "image": image}),
    ]
    ids = []
    for number, table in enumerate(tables):
        parquet.write_table(table, tmp_path / f"{number}.parquet")
        sample = _open(tmp_path / f"{number}.parquet", qwen, processor, tmp_path / "cache")[0]
        ids.append(sample.input_ids.tolist())
        assert sample.images[0].read_bytes() == _png(toy, 1)
    assert ids[0] == ids[1] == ids[2]


def test_billions_of_empty_rows_are_refused_before_they_are_listed(tmp_path):
    parquet.write_table(pa.table({"conversations": pa.nulls(3_000_000, pa.string())}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a\.parquet: it says that it has 3,000,000 rows, in [\d,]+ bytes; refused"):
        ParquetFile(tmp_path / "a.parquet", cache_folder=tmp_path / "cache")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"text": ["a"]}, r"no column 'conversations', 'messages' or 'images'; it has \['text'\]"),
        ({"conversations": pa.array([], pa.string())}, "holds no row"),
    ],
)
def test_files_without_records_are_refused(columns, message, tmp_path):
    parquet.write_table(pa.table(columns), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=rf"a\.parquet.*{message}"):
        ParquetFile(tmp_path / "a.parquet", cache_folder=tmp_path / "cache")


def test_records_that_cannot_be_used_cost_one_sample(toy, qwen, processor, tmp_path):
    columns = {
        "conversations": [chat("<image>\na", "b")] * 2 + [chat("a", "b"), None],
        "image": pa.array([{"bytes": None, "path": None}, {"bytes": b"x", "path": "a"}, None, None], IMAGE),
        "audio": pa.array([None, None, {"bytes": b"x", "path": None}, None], IMAGE),
    }
    parquet.write_table(pa.table(columns), tmp_path / "a.parquet")
    dataset = _open(tmp_path / "a.parquet", qwen, processor, tmp_path / "cache")
    with pytest.raises(ImageError, match=r"image 0 of .*a\.parquet\[0\] has neither bytes nor a path"):
        dataset[0].images[0].load_pixels()
    with pytest.raises(ImageError, match=r"a\.parquet\[1\].*image 'a' cannot be decoded"):
        dataset[1].images[0].load_pixels()
    with pytest.raises(RecordError, match=r"a\.parquet\[2\].*field 'audio': only images"):
        dataset[2]
    with pytest.raises(RecordError, match=r"a\.parquet\[3\].*non-empty list of turns"):
        dataset[3]


def test_names_cannot_leave_the_image_folder(toy, qwen, processor, tmp_path):
    (tmp_path / "secret.png").write_bytes(_png(toy, 0))
    parquet.write_table(
        pa.table({"conversations": [chat("<image>\na", "b")], "image": ["../secret.png"]}), tmp_path / "a.parquet"
    )
    file = ParquetFile(tmp_path / "a.parquet", ImageRoot(toy / "images"), tmp_path / "cache")
    with pytest.raises(ImageError, match="outside the image root"):
        file.read_image(0, 0, "../secret.png")


def test_images_beside_the_file_have_stamps_of_their_own(toy, tmp_path):
    """A latent cache would never learn that one was replaced, or mended."""
    columns = {"conversations": [chat("<image>\na", "b")] * 3, "image": ["0.png", "1.png", "later.png"]}
    parquet.write_table(pa.table(columns), tmp_path / "a.parquet")
    file = ParquetFile(tmp_path / "a.parquet", ImageRoot(toy / "images"), tmp_path / "cache")

    def stamps():
        return [file.image_stamp(i, 0, name) for i, name in enumerate(columns["image"])]

    before = stamps()
    (toy / "images" / "0.png").write_bytes(_png(toy, 3))
    (toy / "images" / "later.png").write_bytes(_png(toy, 3))
    assert [a == b for a, b in zip(before, stamps(), strict=True)] == [False, True, False]


@pytest.mark.parametrize("name", ["a.parquet", "a.tar"])
def test_a_replaced_file_is_noticed_by_its_change_time(name, hub, tmp_path):
    """Size and modification time of the file before, as archives are unpacked with."""
    path = tmp_path / name
    if name == "a.tar":
        with tarfile.open(path, "w") as tar:
            write_sample(tar, "x", {"conversations": chat("<image>\na", "b")}, [("png", b"picture")])
    else:
        shutil.copy(next(hub.glob("*.parquet")), path)

    def stamp():
        (source,) = open_sources(path, None, tmp_path / "cache")
        return source.image_stamp(0, 0, "x")

    before, status = stamp(), path.stat()
    assert stamp() == before
    path.write_bytes(path.read_bytes())
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (status.st_size, status.st_mtime_ns)
    assert stamp() != before


def test_groups_that_make_every_image_dear_are_refused(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MAX_GROUP_BYTES", 10_000)
    with pytest.raises(
        ValueError, match=r"p-0\.parquet: row group 0 has [\d,]+ bytes of images, more than 10,000.*row_"
    ):
        ParquetFile(hub / "p-0.parquet", cache_folder=tmp_path / "cache")
    monkeypatch.undo()
    monkeypatch.setattr(module, "MAX_IMAGE_BYTES", 100)
    with pytest.raises(ImageError, match="more than 100 bytes"):
        ParquetFile(hub / "p-0.parquet", cache_folder=tmp_path / "cache").read_image(0, 0, "")


@pytest.mark.parametrize("content", [b"", b"PAR1", b"PAR1" + b"\0" * 40 + b"PAR1", b"no table at all"])
def test_what_is_no_parquet_is_refused(content, tmp_path):
    (tmp_path / "a.parquet").write_bytes(content)
    for path in (tmp_path / "a.parquet", tmp_path / "gone.parquet"):
        with pytest.raises(ValueError, match=r"cannot read the parquet file .*\.parquet: ") as caught:
            ParquetFile(path, cache_folder=tmp_path / "cache")
        assert "\n" not in str(caught.value)


def test_damaged_files_are_refused_or_cost_samples(hub, tmp_path):
    """Checksums of pages are looked at, where the file has them."""
    table = parquet.read_table(hub / "p-0.parquet")
    parquet.write_table(table, tmp_path / "good.parquet", row_group_size=4, write_page_checksum=True)
    good = (tmp_path / "good.parquet").read_bytes()
    reference = ParquetFile(tmp_path / "good.parquet", cache_folder=tmp_path / "cache")
    rng = random.Random(0)
    refused = used = 0
    for number in range(60):
        data = bytearray(good)
        for _ in range(3):
            data[rng.randrange(4, len(data))] ^= 1 << rng.randrange(8)
        path = tmp_path / f"{number}.parquet"
        path.write_bytes(data)
        file, message = attempt(ValueError, lambda path=path: ParquetFile(path, cache_folder=tmp_path / "cache"))
        if file is None:
            assert str(path) in message
            refused += 1
            continue
        used += 1
        for index in range(min(9, len(file))):
            if not file[index].get("images"):
                continue
            image, message = attempt(ImageError, file.read_image, index, 0, "x")
            assert "image" in message or not message
            if file[index] == reference[index] and image is not None:
                assert image == reference.read_image(index, 0, "x"), "never another image's bytes"
    assert refused > 5
    assert used > 5
