"""Files about a run, on a disk that is full."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_ross.data.run_files import RunFiles
from tests.helpers.full_disk import full_disk


def test_a_full_disk_leaves_whole_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A warning once per file; and once there is room again, what follows is on a line of its own."""
    files, path = RunFiles(goes_on=True), tmp_path / "log.jsonl"
    files.append(path, "first\n")
    with full_disk(10):
        for _ in range(3):
            files.append(path, "does not fit\n")
        files.append(tmp_path / "other.jsonl", "does not fit either\n")
    files.append(path, "last\n")
    assert path.read_text() == "first\nlast\n"
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith(f"warning: cannot write {path} (File too large); training goes on")
    assert "other.jsonl" in second


def test_a_full_disk_ends_the_run_by_default(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    with full_disk(10), pytest.raises(OSError, match=r"cannot write .*log\.jsonl \(File too large\); free space"):
        RunFiles().append(path, "does not fit\n")
    assert path.read_text() == ""
