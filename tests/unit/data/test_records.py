"""Reading and checking records; image paths that leave the root."""

from __future__ import annotations

import json
import os

import pytest

from megatron_ross.data.errors import ImageError, RecordError
from megatron_ross.data.index import RecordFile
from megatron_ross.data.records import ImageRoot, parse_record

TURNS = [{"from": "human", "value": "<image>\na"}, {"from": "gpt", "value": "b"}]


def test_json_and_jsonl_read_the_same(tmp_path):
    records = [{"id": i, "conversations": TURNS} for i in range(3)]
    (tmp_path / "a.json").write_text(json.dumps(records))
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(r) for r in records) + "\n\n")
    assert list(RecordFile(tmp_path / "a.json")) == list(RecordFile(tmp_path / "a.jsonl")) == records


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", "[1, ", "not valid JSON"),
        ("a.json", "{}", "must hold a JSON array"),
        ("a.json", "[]", "no record"),
        ("a.jsonl", "", "no record"),
        ("a.jsonl", '{"id": 1}\n{oops\n', "line 2"),
    ],
)
def test_unreadable_files_are_user_errors(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        RecordFile(tmp_path / name)


def test_missing_file(tmp_path):
    with pytest.raises(ValueError, match=r"cannot read .*gone\.json"):
        RecordFile(tmp_path / "gone.json")


@pytest.mark.parametrize(
    ("image", "expected"), [("a.jpg", ("a.jpg",)), (["a", "b"], ("a", "b")), (None, ()), ("", ()), ([], ())]
)
def test_image_field(image, expected):
    assert parse_record({"id": 1, "image": image, "conversations": TURNS}, "f").images == expected


@pytest.mark.parametrize("record_id", [7, "7"])
def test_ids_may_be_ints_or_strings(record_id):
    assert parse_record({"id": record_id, "conversations": TURNS}, "f").id == "7"


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ([], "must be an object, found list"),
        ({"id": 1.5, "conversations": TURNS}, "field 'id'"),
        ({"id": "x"}, r"id 'x'.*field 'conversations'"),
        ({"id": "x", "conversations": []}, "field 'conversations'"),
        ({"id": "x", "conversations": [3]}, r"conversations\[0\] must be an object"),
        ({"id": "x", "conversations": [{"from": "bot", "value": ""}]}, r"conversations\[0\]: field 'from'"),
        ({"id": "x", "conversations": [{"from": "gpt", "value": None}]}, "field 'value'"),
        ({"id": "x", "image": 3, "conversations": TURNS}, "field 'image'"),
        ({"id": "x", "image": ["a", {}], "conversations": TURNS}, "field 'image'"),
    ],
)
def test_malformed_records_name_file_id_and_field(raw, message):
    with pytest.raises(RecordError, match=message) as error:
        parse_record(raw, "data.json[5]")
    assert str(error.value).startswith("data.json[5]")


def test_image_root_refuses_what_leaves_it(tmp_path):
    root, outside = tmp_path / "root", tmp_path / "root_secret"
    (root / "sub").mkdir(parents=True)
    outside.mkdir()
    for file in (root / "sub/a.png", outside / "b.png"):
        file.write_bytes(b"x")
    os.symlink(outside / "b.png", root / "link.png")
    os.symlink(outside, root / "folder")
    os.symlink(root / "sub/a.png", root / "good.png")
    resolver = ImageRoot(root)
    assert resolver.resolve("sub/a.png") == resolver.resolve("good.png") == str((root / "sub/a.png").resolve())
    assert resolver.read("good.png") == b"x"
    assert resolver.read("sub/../sub/a.png") == b"x"
    for name in ("../root_secret/b.png", str(outside / "b.png"), "link.png", "folder/b.png", "/etc/passwd"):
        with pytest.raises(ImageError, match="outside the image root"):
            resolver.read(name)
    for name in ("gone.png", "sub", "a\0b", "x" * 5000, ".", ""):
        with pytest.raises(ImageError):
            resolver.read(name)


def test_image_root_must_exist(tmp_path):
    with pytest.raises(ValueError, match="image_root"):
        ImageRoot(tmp_path / "gone")
