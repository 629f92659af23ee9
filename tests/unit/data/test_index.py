"""Random access to record files: equal to json.load, cached, shared, remote."""

from __future__ import annotations

import json
import os
import pickle
import random

import fsspec
import numpy as np
import pytest

from megatron_ross.data import index
from megatron_ross.data.dataset import RossDataset
from megatron_ross.data.index import RecordFile
from megatron_ross.data.records import ImageRoot


def _values(rng: random.Random) -> list:
    """JSON values with everything that can confuse a scanner: brackets in strings, escapes, numbers, other scripts."""
    texts = ["", "a", '"]}', "\\", "[{", "图中有什么？ ☕", "line\nbreak", "é" * 50, "\u2028", "x" * 300]
    return [
        rng.choice(
            [rng.choice(texts), rng.randrange(10**6), 1.5e-3, None, True, [], {}, {"k": [rng.choice(texts)] * 3}]
        )
        for _ in range(200)
    ]


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("ascii_only", [True, False])
@pytest.mark.parametrize("chunk", [7, 64, 2**24])
def test_array_equals_json_load(tmp_path, monkeypatch, indent, ascii_only, chunk):
    monkeypatch.setattr(index, "_CHUNK_CHARACTERS", chunk)
    monkeypatch.setattr(index, "_CUT_OFF_CHARACTERS", 10_000)
    values = _values(random.Random(chunk))
    path = tmp_path / "a.json"
    path.write_text(" \n" + json.dumps(values, indent=indent, ensure_ascii=ascii_only) + "\n", encoding="utf-8")
    records = RecordFile(path)
    assert [records[i] for i in range(len(records))] == values
    assert records[-1] == values[-1]


def test_lines_equal_json(tmp_path):
    values = _values(random.Random(0))
    path = tmp_path / "a.jsonl"
    path.write_text("\n \n".join(json.dumps(v, ensure_ascii=False) for v in values), encoding="utf-8")
    assert list(RecordFile(path)) == values


@pytest.fixture
def cached(monkeypatch):
    monkeypatch.setattr(index, "CACHE_ABOVE_BYTES", 0)


def test_second_start_reads_the_index_only(tmp_path, cached, monkeypatch):
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"id": i} for i in range(50)]))
    first = RecordFile(path, tmp_path / "cache")
    monkeypatch.setattr(index, "_build", lambda path: pytest.fail("the index was built again"))
    second = RecordFile(path, tmp_path / "cache")
    assert isinstance(second._ranges, np.memmap)
    assert list(second) == list(first)
    assert second.fingerprint == first.fingerprint


def test_a_changed_file_is_indexed_again(tmp_path, cached):
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"id": 1}, {"id": 2}]))
    before = RecordFile(path, tmp_path / "cache")
    path.write_text(json.dumps([{"id": 3}, {"id": 4}]))
    os.utime(path, (1, 1))
    after = RecordFile(path, tmp_path / "cache")
    assert [r["id"] for r in after] == [3, 4]
    assert before.fingerprint != after.fingerprint


def test_copies_in_other_processes_map_the_same_file(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(list(range(9))))
    records = RecordFile(path)
    assert records[3] == 3
    assert list(pickle.loads(pickle.dumps(records))) == list(range(9))


def test_urls(toy, tmp_path, qwen, processor):
    memory = fsspec.filesystem("memory")
    memory.put(str(toy / "data.json"), "/set/data.json")
    memory.put(str(toy / "images"), "/set/images", recursive=True)
    memory.pipe("/set/secret", b"x")
    settings = (qwen, "qwen_2", processor, 16, 512)
    remote = RossDataset("memory://set/data.json", "memory://set/images", *settings, cache_folder=tmp_path / "cache")
    local = RossDataset(toy / "data.json", toy / "images", *settings)
    assert len(remote) == len(local)
    assert (remote[9].images[1].load_pixels() == local[9].images[1].load_pixels()).all()
    for name in ("../secret", "/set/secret", "gone.png"):
        with pytest.raises(ValueError, match=r"outside the image root|not found"):
            ImageRoot("memory://set/images").read(name)
    for path in ("memory://set/gone.json", "nosuch://x/a.json"):
        with pytest.raises(ValueError, match="cannot"):
            RecordFile(path, tmp_path / "cache")
    memory.rm("/set", recursive=True)
