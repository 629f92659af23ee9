"""Records, their files and their image names: used, or refused by name; nothing outside the image folder is opened."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from megatron_ross.data import records
from megatron_ross.data.errors import ImageError, RecordError
from megatron_ross.data.formats import has_image, word_count
from megatron_ross.data.index import RecordFile
from megatron_ross.data.records import ImageRoot, parse_record
from tests.helpers.hostile import attempt, json_values, nested_json

KEYS = (
    "id",
    "image",
    "images",
    "conversations",
    "messages",
    "system",
    "from",
    "value",
    "role",
    "content",
    "type",
    "path",
)
TURNS = [{"from": "human", "value": "<image>\na"}, {"from": "gpt", "value": "b"}]
PIECES = ["..", ".", "/", "//", "sub", "link", "out", "a.png", "\\", "\0", "~", "file:"]
NAMES = st.one_of(
    st.text(max_size=30),
    st.lists(st.sampled_from(PIECES)).map("/".join),
)


@given(raw=json_values(*KEYS))
@example(raw={"id": 10**5000, "conversations": TURNS})
def test_records_of_any_shape(raw: Any) -> None:
    assert word_count(raw) >= 0
    assert has_image(raw) in (True, False)
    record, message = attempt(RecordError, parse_record, raw, "data.json[3]")
    if record is None:
        assert message.startswith("data.json[3]")
        assert "\n" not in message
        assert len(message) < 500
    else:
        assert record.turns
        assert all(isinstance(name, str) and name for name in record.images)


def test_a_record_a_thousand_levels_deep_is_named_not_followed() -> None:
    deep: Any = []
    for _ in range(20_000):
        deep = [deep]
    for raw in ({"id": 1, "conversations": TURNS, "image": deep}, {"conversations": [{"from": deep}]}):
        with pytest.raises(RecordError, match=r"data\.json\[3\].*field"):
            parse_record(raw, "data.json[3]")


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
@pytest.mark.parametrize(
    "record", [nested_json(100_000), '{"id": ' + "1" * 5000 + "}", '{"id": "\xff', "[" * 100_000], ids=range(4)
)
def test_files_that_json_itself_cannot_read_are_named(record: str, suffix: str, tmp_path: Path) -> None:
    text = f'[{{"id": 0}}, {record}]' if suffix == "json" else f'{{"id": 0}}\n{record}\n'
    (tmp_path / f"a.{suffix}").write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=rf"a\.{suffix}") as caught:
        RecordFile(tmp_path / f"a.{suffix}")
    assert len(str(caught.value)) < 1000


@given(data=st.binary(max_size=80), is_json=st.booleans())
def test_files_of_any_bytes(data: bytes, is_json: bool, tmp_path: Path) -> None:
    path = tmp_path / ("a.json" if is_json else "a.jsonl")
    path.write_bytes(data)
    found, message = attempt(ValueError, RecordFile, path)
    assert str(path) in message if found is None else [found[i] for i in range(len(found))]


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """images/ with a file and links in and out of it, and a secret beside it."""
    inside, outside = tmp_path / "images", tmp_path / "images_secret"
    (inside / "sub").mkdir(parents=True)
    outside.mkdir()
    (inside / "a.png").write_bytes(b"inside")
    (inside / "sub" / "a.png").write_bytes(b"inside")
    (outside / "a.png").write_bytes(b"secret")
    (inside / "link").symlink_to(inside / "sub")
    (inside / "out").symlink_to(outside)
    (inside / "linked.png").symlink_to(outside / "a.png")
    (inside / "chain").symlink_to("out")
    return tmp_path


@given(name=NAMES)
@example(name="out/../../images_secret/a.png")
@example(name="link/../../images_secret/a.png")
@example(name="\ud800")
def test_no_name_reads_outside_the_folder(name: str, folders: Path) -> None:
    root = ImageRoot(folders / "images")
    data, message = attempt(ImageError, root.read, name)
    assert len(message) < 1000
    assert data in (b"inside", None)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("../images_secret/a.png", "outside the image root"),
        ("/etc/passwd", "outside the image root"),
        ("sub/../../images_secret/a.png", "outside the image root"),
        ("out/a.png", "outside the image root .* behind a symbolic link"),
        ("chain/a.png", "behind a symbolic link"),
        ("linked.png", r"behind a symbolic link \(allow_image_symlinks follows them\); refused"),
        ("a\0.png", "NUL byte"),
        ("x" * 5000, "cannot be read: .*File name too long"),
        ("file:///etc/passwd", "not found"),
        ("s3://bucket/a.png", "not found"),
        ("..\\images_secret\\a.png", "not found"),
        ("C:\\secret.png", "not found"),
        ("~/a.png", "not found"),
        ("sub", "no regular file|Is a directory"),
        ("pipe", "no regular file"),
        ("loop", "Too many levels|not found|cannot be read"),
    ],
)
def test_names_that_are_refused(name: str, message: str, folders: Path) -> None:
    os.mkfifo(folders / "images" / "pipe")
    (folders / "images" / "loop").symlink_to("loop")
    with pytest.raises(ImageError, match=message):
        ImageRoot(folders / "images").read(name)


def test_a_folder_that_is_itself_a_link_is_fine(folders: Path) -> None:
    (folders / "alias").symlink_to(folders / "images")
    assert ImageRoot(folders / "alias").read("link/a.png") == b"inside"
    assert ImageRoot(folders / "alias").read(str(folders / "alias" / "a.png")) == b"inside"


def test_links_are_followed_on_request_but_names_still_cannot_leave(folders: Path) -> None:
    root = ImageRoot(folders / "images", allow_symlinks=True)
    assert root.read("out/a.png") == root.read("linked.png") == b"secret"
    for name in ("../images_secret/a.png", "out/../../images_secret/a.png", "/etc/passwd"):
        with pytest.raises(ImageError, match="outside the image root"):
            root.read(name)


def test_a_local_url_follows_no_links_either(folders: Path) -> None:
    """fsspec opens file:// without looking where a link goes."""
    root = ImageRoot(f"file://{folders}/images")
    assert root.read("sub/a.png") == b"inside"
    for name in ("out/a.png", "linked.png", "../images_secret/a.png"):
        with pytest.raises(ImageError, match="outside the image root"):
            root.read(name)


def test_files_too_large_are_refused_before_they_are_read(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (folders / "images" / "large.png").open("wb") as file:
        file.truncate(records.MAX_IMAGE_BYTES + 1)
    with pytest.raises(ImageError, match=r"large\.png.*536,870,913 bytes, more than 536,870,912"):
        ImageRoot(folders / "images").read("large.png")
    monkeypatch.setattr(records, "MAX_IMAGE_BYTES", 3)
    with pytest.raises(ImageError, match="more than 3"):
        ImageRoot(folders / "images").read("a.png")
