"""A flipped byte, a missing file, a share of the files per rank."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_ross.checkpoint.checksums import checksums, other_files, own_data_files, verify_files
from megatron_ross.checkpoint.manifest import Manifest
from tests.helpers.variants import make_variant


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    for name in ("__0_0.distcp", "__1_0.distcp", ".metadata", "assets/tokenizer.json", "manifest.json"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(name.encode() * 100)
    return tmp_path


def _expected(directory: Path) -> dict[str, str]:
    paths = [*own_data_files(directory, 0), *own_data_files(directory, 1), *other_files(directory)]
    return checksums(directory, paths)


def test_everything_but_the_manifest_is_covered(stored: Path) -> None:
    assert sorted(_expected(stored)) == [".metadata", "__0_0.distcp", "__1_0.distcp", "assets/tokenizer.json"]


def test_one_flipped_bit_is_found_by_the_rank_that_has_the_file(stored: Path) -> None:
    expected = _expected(stored)
    path = stored / "__1_0.distcp"
    data = bytearray(path.read_bytes())
    data[77] ^= 1
    path.write_bytes(data)
    found = []
    for rank in range(3):
        try:
            verify_files(stored, expected, rank, 3)
        except ValueError as error:
            found.append(str(error))
    assert len(found) == 1
    assert "__1_0.distcp is damaged" in found[0]


def test_a_missing_file_is_named(stored: Path) -> None:
    expected = _expected(stored)
    (stored / "assets/tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"tokenizer\.json is missing"):
        verify_files(stored, expected)


def test_imported_checkpoints_have_checksums(tmp_path: Path) -> None:
    directory = make_variant(tmp_path, "qwen2_siglip").path
    files = Manifest.read(directory).files
    assert {".metadata", "common.pt", "metadata.json", "__0_0.distcp"} <= set(files)
    verify_files(directory, files)
