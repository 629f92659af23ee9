"""Ranks that read other data than rank 0, each from a copy of its own: refused on every rank, before any step."""

from __future__ import annotations

import json
import os
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from megatron_ross.data.dataset import RossDataset
from megatron_ross.data.images import ImageProcessor
from megatron_ross.data.shards import write_sample
from megatron_ross.training.data import agree_on_data
from tests.helpers.distributed import run_ranks
from tests.helpers.golden import GOLDEN
from tests.helpers.toy_run import two_stage_settings, with_trainer, write_data

pytestmark = pytest.mark.distributed

RANKS = 2


def _agree(rank: int, world_size: int, root: str, name: str) -> str:
    """The refusal of the copies root/0/name, root/1/name, ..., or nothing."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(GOLDEN / "llm_qwen2")
    processor = ImageProcessor((0.5,) * 3, (0.5,) * 3, 28)
    folder = Path(root) / str(rank)
    images, cache = folder / "images", folder / "cache"
    dataset = RossDataset(folder / name, images, tokenizer, "qwen_2", processor, 4, 64, cache_folder=cache)
    if rank and (folder / "unreadable").exists():
        (folder / name).unlink()
    try:
        agree_on_data(dataset)
    except ValueError as error:
        return str(error)
    return ""


def _tar(folder: Path) -> None:
    with tarfile.open(folder / "data.tar", "w") as tar:
        for i, record in enumerate(json.loads((folder / "data.json").read_text())):
            names = record.pop("image", [])
            names = [names] if isinstance(names, str) else names
            write_sample(tar, f"{i:04}", record, [("png", (folder / "images" / n).read_bytes()) for n in names])


def _parquet(folder: Path) -> None:
    records = json.loads((folder / "data.json").read_text())
    names = [[n] if isinstance(n := r.get("image", []), str) else n for r in records]
    images = [[{"bytes": (folder / "images" / n).read_bytes(), "path": n} for n in some] for some in names]
    table = pa.table({"conversations": [r["conversations"] for r in records], "images": images})
    plain = {"compression": "none", "use_dictionary": False, "write_statistics": False}  # nothing tells of a word
    parquet.write_table(table, folder / "data.parquet", row_group_size=7, **plain)


def _names(folder: Path) -> None:
    """A parquet file without the bytes of its images, which lie in the folder."""
    records = json.loads((folder / "data.json").read_text())
    columns = {"conversations": [r["conversations"] for r in records]}
    columns["images"] = [[n] if isinstance(n := r.get("image", []), str) else n for r in records]
    parquet.write_table(pa.table(columns), folder / "names.parquet")


def _lines(folder: Path) -> None:
    records = json.loads((folder / "data.json").read_text())
    (folder / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


MAKERS = {
    "data.json": lambda folder: None,
    "data.jsonl": _lines,
    "data.tar": _tar,
    "data.parquet": _parquet,
    "names.parquet": _names,
}


def _copies(root: Path, name: str, second: Any = lambda folder: None) -> str:
    """A copy per rank; `second` changes what rank 1's is made of."""
    for rank in range(RANKS):
        write_data(root / str(rank))
        if rank:
            second(root / str(rank))
        MAKERS[name](root / str(rank))
        os.utime(root / str(rank) / name, (1e9, 1e9 * (rank == 0)))
    return str(root)


def _another_answer(folder: Path) -> None:
    """One word of the middle record, of the same length: size, number of records and everything else stay."""
    path = folder / "data.json"
    records = json.loads(path.read_text())
    words = records[14]["conversations"][1]["value"].split()
    records[14]["conversations"][1]["value"] = " ".join(["x" * len(words[0]), *words[1:]])
    before = path.stat().st_size
    path.write_text(json.dumps(records))
    assert path.stat().st_size == before


def _a_record_less(folder: Path) -> None:
    path = folder / "data.json"
    path.write_text(json.dumps(json.loads(path.read_text())[:-1]))


def _another_picture(folder: Path) -> None:
    """One bit of the first record's."""
    path = folder / "images/0_0.png"
    data = bytearray(path.read_bytes())
    data[50] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", MAKERS)
def test_copies_of_the_same_data_agree_whatever_their_path_and_time(name: str, tmp_path: Path) -> None:
    assert run_ranks(_agree, RANKS, _copies(tmp_path, name), name) == [""] * RANKS


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize(
    ("change", "sizes"), [(_another_answer, (29, 29)), (_a_record_less, (29, 28)), (_another_picture, (29, 29))]
)
def test_copies_that_differ_are_refused_on_every_rank(name: str, change: Any, sizes: Any, tmp_path: Path) -> None:
    root = _copies(tmp_path, name, change)
    first, second = run_ranks(_agree, RANKS, root, name)
    assert first == second
    assert first.startswith("ranks read different data: "), first
    assert "\n" not in first
    for rank, size in enumerate(sizes):
        assert f"{size} records of content" in first
        assert f"on rank {rank} (" in first
        assert f"{root}/{rank}/{name})" in first
    assert first.endswith("copy the same files to every node")


def test_a_copy_that_cannot_be_read_is_refused_on_every_rank(tmp_path: Path) -> None:
    root = _copies(tmp_path, "data.json", lambda folder: (folder / "unreadable").touch())
    messages = run_ranks(_agree, RANKS, root, "data.json")
    assert messages[0] == messages[1]
    assert "cannot be read: [Errno 2] No such file" in messages[0]


def _start(rank: int, world_size: int, flat: dict[str, Any], folders: list[str]) -> str:
    names = {"data_path": f"{folders[rank]}/data.json", "image_folder": f"{folders[rank]}/images"}
    prefixes = ("", "valid_") if "eval_interval" in flat else ("",)
    flat = flat | {prefix + key: value for prefix in prefixes[-1:] for key, value in names.items()}
    try:
        with_trainer(flat, lambda trainer: None)
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("extra", [{}, {"eval_interval": 1}], ids=["training", "validation"])
def test_a_run_with_tokens_from_one_file_and_labels_from_another_does_not_start(
    extra: dict[str, Any], tmp_path: Path
) -> None:
    """Two pipeline ranks; the second has the LM head."""
    settings = two_stage_settings(tmp_path / "toy") | {"train_iters": 2} | extra
    _copies(tmp_path / "copies", "data.json", _another_answer)
    folders = [f"{tmp_path}/copies/{rank}" for rank in (0, 1)]
    assert run_ranks(_start, RANKS, settings, [folders[0]] * RANKS) == [""] * RANKS
    for message in run_ranks(_start, RANKS, settings, folders):
        assert message.startswith("ranks read different data: 29 records of content")
