"""The pickled index of a checkpoint and what lies beside it: code in it is not run, claims in it are not believed."""

from __future__ import annotations

import copy
import json
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

from megatron_ross.checkpoint.agreement import CheckpointError
from megatron_ross.checkpoint.loading import load_weights
from megatron_ross.checkpoint.manifest import ASSETS_NAME, Manifest, iteration_dir, write_latest
from megatron_ross.checkpoint.reader import check_loadable, open_checkpoint, read_index
from megatron_ross.convert.known_models import known_model
from megatron_ross.convert.torch_dist_writer import LazyTensor, write_torch_dist
from tests.helpers.hostile import Trap, at_most, attempt

pytestmark = pytest.mark.usefixtures("little_memory")

KEY = "vision.tower.x"


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The iteration folder of a checkpoint with one tensor."""
    root = tmp_path_factory.mktemp("checkpoint")
    directory = iteration_dir(root, 0)
    (directory / ASSETS_NAME).mkdir(parents=True)
    write_torch_dist(directory, {KEY: LazyTensor((3, 4), torch.float32, lambda: torch.ones(3, 4))})
    Manifest(0, known_model("qwen2-7b+siglip-so400m")).write(directory)
    write_latest(root, 0)
    return directory


@pytest.fixture
def index_file(directory: Path) -> Any:
    """Its index, put back after the test."""
    path = directory / ".metadata"
    data = path.read_bytes()
    yield path
    path.write_bytes(data)


@given(changes=st.lists(st.tuples(st.integers(0, 2000), st.binary(min_size=1, max_size=6)), min_size=1, max_size=5))
def test_an_index_with_changed_bytes(changes: list[tuple[int, bytes]], directory: Path, index_file: Path) -> None:
    data = bytearray(index_file.read_bytes())
    original = bytes(data)
    for place, piece in changes:
        place %= len(data)
        data[place : place + len(piece)] = piece
    index_file.write_bytes(data)
    with at_most(16):
        index, message = attempt(ValueError, read_index, directory)
    index_file.write_bytes(original)
    assert index is not None or str(directory) in message


@given(data=st.binary(max_size=120))
def test_an_index_of_any_bytes(data: bytes, tmp_path: Path) -> None:
    (tmp_path / ".metadata").write_bytes(data)
    with at_most(16), pytest.raises(ValueError, match=r"not a readable checkpoint index|not an index"):
        read_index(tmp_path)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\x80\x02]r\xff\xff\xff\x7f.", "asks for memory slot 2147483647"),
        (b"\x80\x02]p999999999999\n.", "asks for memory slot 999999999999"),
        (b"\x80\x04\x8e" + struct.pack("<Q", 2**40) + b"x.", "not a readable checkpoint index"),
        (b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b"x.", "not a readable checkpoint index"),
        (b"\x80\x02" + b"(" * 100_000 + b".", "not a readable checkpoint index"),
        (pickle.dumps(3), "not an index of a distributed checkpoint"),
        (pickle.dumps(Metadata({}, storage_data={1: 2})), "not an index of a distributed checkpoint"),
    ],
    ids=["slots", "written slot", "bytes", "byte array", "marks", "number", "other things"],
)
def test_pickles_that_claim_memory_are_refused(data: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / ".metadata").write_bytes(data)
    with at_most(16), pytest.raises(ValueError, match=message):
        read_index(tmp_path)


def _claim(size: Any) -> Callable[[Metadata], None]:
    def edit(index: Metadata) -> None:
        index.state_dict_metadata[KEY].size = size

    return edit


def _bytes_instead(index: Metadata) -> None:
    index.state_dict_metadata[KEY] = BytesStorageMetadata()


def _negative(index: Metadata) -> None:
    for info in index.storage_data.values():
        info.length = -5


EDITS: dict[str, tuple[Callable[[Metadata], None], str]] = {
    "exabytes": (_claim(torch.Size([2**30, 2**30])), "claims .* bytes, its chunks hold"),
    "a little more": (_claim(torch.Size([300, 4])), "claims 4800 bytes, its chunks hold"),
    "negative": (_claim((-3, 4)), "has the impossible shape"),
    "text": (_claim(("3", 4)), "has the impossible shape"),
    "no shape": (_claim(None), "not an index of a distributed checkpoint"),
    "negative length": (_negative, "claims 48 bytes, its chunks hold -5"),
}


@pytest.mark.parametrize("edit", EDITS)
def test_tensors_that_claim_more_than_their_file_holds(edit: str, directory: Path, index_file: Path) -> None:
    change, message = EDITS[edit]
    index = copy.deepcopy(read_index(directory))
    change(index)
    index_file.write_bytes(pickle.dumps(index))
    with at_most(16), pytest.raises(ValueError, match=message):
        open_checkpoint(directory)


def test_megatron_is_given_no_checkpoint_with_pickled_objects(
    directory: Path, index_file: Path, tmp_path: Path
) -> None:
    """Its loader unpickles them freely; `load_weights` stops before it starts, so no stage is needed here."""
    index = copy.deepcopy(read_index(directory))
    _bytes_instead(index)
    index_file.write_bytes(pickle.dumps(index))
    with pytest.raises(CheckpointError, match=r"'vision\.tower\.x' is not a tensor but a pickled object"):
        load_weights(directory, [])
    index_file.write_bytes(pickle.dumps(Trap(tmp_path / "trap")))
    with pytest.raises(CheckpointError, match="not a readable checkpoint index"):
        load_weights(directory, [])
    assert not (tmp_path / "trap").exists()


def test_code_in_the_common_file_is_not_run(directory: Path, tmp_path: Path) -> None:
    common = directory / "common.pt"
    original = common.read_bytes()
    torch.save({"progress": Trap(tmp_path / "trap")}, common)
    try:
        with pytest.raises(CheckpointError, match="cannot load checkpoint"):
            load_weights(directory, [])
    finally:
        common.write_bytes(original)
    assert not (tmp_path / "trap").exists()


def test_a_checkpoint_that_is_fine_may_be_loaded(directory: Path) -> None:
    check_loadable(directory)
    assert torch.equal(open_checkpoint(directory).read(KEY), torch.ones(3, 4))
    assert json.loads((directory / "manifest.json").read_text())["iteration"] == 0
