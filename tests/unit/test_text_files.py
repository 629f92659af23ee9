"""A rewritten text file is the old one or the new one."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_ross.text_files import replace_text
from tests.helpers.full_disk import full_disk


def test_a_rewrite_that_fails_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    replace_text(path, "old\n")
    with full_disk(10), pytest.raises(OSError, match="File too large"):
        replace_text(path, "new and longer\n")
    assert path.read_text() == "old\n"
    replace_text(path, "new and longer\n")
    assert path.read_text() == "new and longer\n"
    assert list(tmp_path.iterdir()) == [path]
