"""Bars of conversions end at 100 %."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_ross.convert.cli import export_checkpoint, import_checkpoint
from megatron_ross.huggingface.chat_templates import chat_template


def last_shares(text: str) -> dict[str, str]:
    """Title of a bar -> the last share that it showed."""
    return dict(re.findall(r"([\w ]+):\s+(\d+)%", text))


def test_bars_end_at_all(imported: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = imported("qwen2_siglip")
    capsys.readouterr()
    for format in ("ross", "llava"):
        export_checkpoint(root, tmp_path / format, format, templates=chat_template)
        assert last_shares(capsys.readouterr().err) == {"writing safetensors": "100"}
    import_checkpoint(tmp_path / "again", checkpoint=str(tmp_path / "ross"))
    assert last_shares(capsys.readouterr().err) == {"writing again": "100"}
