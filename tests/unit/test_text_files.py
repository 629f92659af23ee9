"""A rewritten text file is the old one or the new one."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from megatron_ross.text_files import replace_text, sync_files
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


def test_a_file_system_that_syncs_no_folders_is_good_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reason = [errno.EINVAL]

    def fail(descriptor: int) -> None:
        raise OSError(reason[0], os.strerror(reason[0]))

    monkeypatch.setattr(os, "fsync", fail)
    sync_files([tmp_path])
    reason[0] = errno.EIO
    with pytest.raises(OSError, match="Input/output error"):
        sync_files([tmp_path])
