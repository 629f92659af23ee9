"""Which checkpoints stay, and that none goes which another one needs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_ross.checkpoint.manifest import Manifest, iteration_dir
from megatron_ross.checkpoint.retention import complete_iterations, remove_leftovers, remove_superseded, superseded
from tests.helpers.golden import model_config


@pytest.mark.parametrize(
    ("last", "interval", "going"),
    [
        (None, None, []),
        (1, None, [10, 20, 30, 40]),
        (2, None, [10, 20, 30]),
        (9, None, []),
        (None, 20, [10, 30]),
        (2, 30, [10, 20]),
        (None, 7, [10, 20, 30, 40]),
    ],
)
def test_last_n_and_every_mth(last: int | None, interval: int | None, going: list[int]) -> None:
    assert superseded([10, 20, 30, 40, 50], last, interval) == going


def _write(root: Path, iteration: int, base: str | None = None) -> None:
    directory = iteration_dir(root, iteration)
    directory.mkdir(parents=True)
    (directory / "__0_0.distcp").write_bytes(b"data")
    replace(Manifest(iteration, model_config("qwen2_siglip")), base=base).write(directory)


def test_bases_of_kept_checkpoints_stay(tmp_path: Path) -> None:
    _write(tmp_path, 1)
    _write(tmp_path, 2, base="../iter_0000001")
    for iteration in (3, 4):
        _write(tmp_path, iteration, base="../iter_0000002")
    assert remove_superseded(tmp_path, 4, 1, None) == [3]
    assert complete_iterations(tmp_path) == [1, 2, 4]


def test_a_run_that_went_back_keeps_what_it_saves(tmp_path: Path) -> None:
    """Later checkpoints are not counted, whatever state they are in, and go once the run is past them."""
    for iteration in (100, 200, 300):
        _write(tmp_path, iteration)
    (iteration_dir(tmp_path, 200) / "manifest.json").write_text("{")
    _write(tmp_path, 103)
    assert remove_superseded(tmp_path, 103, 1, None) == [100]
    _write(tmp_path, 203)
    assert remove_superseded(tmp_path, 203, 2, None) == [103]
    _write(tmp_path, 206)
    assert remove_superseded(tmp_path, 206, 2, None) == [200]
    assert complete_iterations(tmp_path) == [203, 206, 300]


def test_a_damaged_checkpoint_needs_no_base(tmp_path: Path) -> None:
    _write(tmp_path, 1)
    _write(tmp_path, 2, base="../iter_0000001")
    (iteration_dir(tmp_path, 2) / "manifest.json").write_text("{")
    _write(tmp_path, 3)
    assert remove_superseded(tmp_path, 3, 2, None) == [1]


def test_incomplete_folders_are_not_counted(tmp_path: Path) -> None:
    _write(tmp_path, 1)
    _write(tmp_path, 2)
    (tmp_path / "iter_0000003.incomplete").mkdir()
    (tmp_path / "iter_0000004").mkdir()
    assert complete_iterations(tmp_path) == [1, 2]
    assert remove_superseded(tmp_path, 2, 1, None) == [1]
    assert (tmp_path / "iter_0000003.incomplete").is_dir()


def test_leftovers_of_killed_processes_go_and_nothing_else_does(tmp_path: Path) -> None:
    """Neither a complete checkpoint, nor what others put there, nor what a link leads to."""
    _write(tmp_path, 1)
    elsewhere = tmp_path / "elsewhere"
    names = ["iter_0000002", "iter_0000003.incomplete", "iter_x", "iter_0000004.bak", "iter_5.incomplete", "notes"]
    for folder in [*(tmp_path / name for name in names), elsewhere]:
        folder.mkdir()
        (folder / "__0_0.distcp").write_bytes(b"data")
    _write(tmp_path / "moved", 6)
    (tmp_path / "moved" / "iter_0000006").rename(tmp_path / "iter_0000006.incomplete")  # killed before its new name
    (tmp_path / "iter_0000007").symlink_to(elsewhere)
    (tmp_path / "iter_0000008").write_bytes(b"a file")
    stay = {path.name for path in tmp_path.iterdir()}
    gone = ["iter_0000002", "iter_0000003.incomplete", "iter_0000006.incomplete"]
    assert remove_leftovers(tmp_path) == gone
    assert {path.name for path in tmp_path.iterdir()} == stay - set(gone)
    assert (elsewhere / "__0_0.distcp").is_file()
    assert remove_leftovers(tmp_path) == []
