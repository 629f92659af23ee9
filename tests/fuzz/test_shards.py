"""Tar shards of any bytes, and those that lie: refused when opened, or a sample less; nothing is ever extracted."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
import zipfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ross.data.errors import ImageError, RecordError
from megatron_ross.data.shards import ShardFile
from tests.helpers.hostile import at_most, attempt, nested_json

TURNS = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
RECORD = json.dumps({"conversations": TURNS}).encode()


def _tar(*members: tuple[tarfile.TarInfo, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for info, data in members:
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def _file(name: str, data: bytes = RECORD) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    return info, data


def _special(name: str, kind: bytes, target: str = "") -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info, b""


def _claiming(size: int, kind: bytes = tarfile.REGTYPE, name: str = "a.json") -> bytes:
    """One header that claims `size` bytes, and a sample behind it."""
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info.tobuf(tarfile.GNU_FORMAT) + b"x" * 512 + _tar(_file("b.json"))


def _open(data: bytes, folder: Path) -> ShardFile:
    (folder / "a.tar").write_bytes(data)
    return ShardFile(folder / "a.tar", folder / "cache")


@pytest.mark.parametrize(
    "data",
    [
        _claiming(8**11 - 1),
        _claiming(2**62),
        _claiming(-1024),
        _claiming(-(2**62)),
        _claiming(2**40, tarfile.GNUTYPE_LONGNAME),
        _claiming(-512, tarfile.GNUTYPE_LONGNAME),
        _claiming(2**40, tarfile.XHDTYPE),
        _claiming(-1024, tarfile.XHDTYPE),
        _claiming(2**40, tarfile.XGLTYPE),
        gzip.compress(_tar(_file("a.json"))),
        gzip.compress(b"\0" * (64 << 20)),
    ],
    ids=["8 GB", "exabytes", "back", "far back", "name", "name back", "attributes", "attributes back", "global", "gz",
         "gz bomb"],
)  # fmt: skip
def test_shards_that_lie_about_sizes_are_refused(data: bytes, tmp_path: Path) -> None:
    with at_most(8), pytest.raises(ValueError, match=r"cannot read the shard .*a\.tar"):
        _open(data, tmp_path)


def test_a_zip_is_no_shard(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.tar", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("a.json", b"\0" * (32 << 20))
    with at_most(8), pytest.raises(ValueError, match="cannot read the shard"):
        ShardFile(tmp_path / "a.tar", tmp_path / "cache")


def test_names_that_leave_the_folder_are_only_names(tmp_path: Path) -> None:
    names = ["../../evil", "/etc/evil", "a/../../evil", "a\\evil", "x" * 300]
    shard = _open(_tar(*[_file(f"{name}.json") for name in names]), tmp_path)
    assert [shard[i] for i in range(len(shard))] == [{"conversations": TURNS}] * len(names)
    written = {path.relative_to(tmp_path).parts[0] for path in tmp_path.rglob("*")}
    assert written == {"a.tar", "cache"}
    assert not (tmp_path.parent / "evil.json").exists()


def test_links_devices_and_pipes_are_no_images(tmp_path: Path) -> None:
    secret = tmp_path / "secret.png"
    secret.write_bytes(b"secret")
    kinds = [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE]
    members = [part for i, kind in enumerate(kinds)
               for part in (_file(f"{i}.json"), _special(f"{i}.png", kind, str(secret)))]  # fmt: skip
    shard = _open(_tar(*members), tmp_path)
    assert len(shard) == len(kinds)
    assert [shard[i].get("image", []) for i in range(len(shard))] == [[]] * len(kinds)


def test_a_link_as_record_is_no_sample(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no sample"):
        _open(_tar(_special("a.json", tarfile.SYMTYPE, "/etc/passwd")), tmp_path)


@pytest.mark.parametrize("record", [nested_json(100_000).encode(), b'{"id": ' + b"1" * 5000 + b"}", b"\xff", b"{"])
def test_records_that_json_cannot_read_cost_one_sample(record: bytes, tmp_path: Path) -> None:
    shard = _open(_tar(_file("a.json", record), _file("b.json")), tmp_path)
    with pytest.raises(RecordError, match=r"a\.tar\[0\]: not valid JSON"):
        shard[0]
    assert shard[1] == {"conversations": TURNS}


@pytest.mark.parametrize("number", ["²", "9" * 5000, "٣", "-1", "", "1.2"])
def test_odd_image_numbers_are_refused(number: str, tmp_path: Path) -> None:
    data = _tar(_file("a.json"), _file(f"a.{number}.png", b"1"), _file("a.1.png", b"2"))
    with pytest.raises(ValueError, match=r"cannot read the shard .*a\.tar: .*ends at the first dot") as caught:
        _open(data, tmp_path)
    assert len(str(caught.value)) < 1000


def test_images_too_large_are_refused_before_they_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_ross.data.shards.MAX_IMAGE_BYTES", 3)
    shard = _open(_tar(_file("a.json"), _file("a.0.png", b"1234"), _file("a.1.png", b"123")), tmp_path)
    with pytest.raises(ImageError, match=r"image 0 of .*a\.tar\[0\] cannot be read: it has 4 bytes, more than 3"):
        shard.read_image(0, 0, "0.img")
    assert shard.read_image(0, 1, "1.img") == b"123"


GOOD = _tar(_file("a.json"), _file("a.png", b"12"), _file("x" * 150 + ".json"), _file("c.txt", b"caption"))


@given(
    changes=st.lists(
        st.tuples(st.integers(0, len(GOOD) - 1), st.binary(min_size=1, max_size=12)), min_size=1, max_size=6
    )
)
def test_shards_with_changed_bytes(changes: list[tuple[int, bytes]], tmp_path_factory: pytest.TempPathFactory) -> None:
    data = bytearray(GOOD)
    for place, piece in changes:
        data[place : place + len(piece)] = piece
    _use(bytes(data), tmp_path_factory.mktemp("shard"))


@given(fields=st.lists(st.tuples(st.integers(0, 345), st.binary(min_size=1, max_size=12)), min_size=1, max_size=3))
def test_headers_with_changed_fields_and_right_checksums(
    fields: list[tuple[int, bytes]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """A wrong checksum would end the matter early."""
    header = bytearray(GOOD[:512])
    for place, piece in fields:
        header[place : place + len(piece)] = piece
    header = header[:512]
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    _use(bytes(header) + GOOD[512:], tmp_path_factory.mktemp("shard"))


def _use(data: bytes, folder: Path) -> None:
    """Open a shard and read all of it: only errors that a loader expects."""
    with at_most(8):
        shard, message = attempt(ValueError, _open, data, folder)
        if shard is None:
            assert "a.tar" in message
            return
        for index in range(len(shard)):
            record, message = attempt(RecordError, shard.__getitem__, index)
            assert "a.tar[" in message or not message
            for number, name in enumerate(record.get("image", []) if isinstance(record, dict) else []):
                _, message = attempt(ImageError, shard.read_image, index, number, name)
                assert "a.tar[" in message or not message
