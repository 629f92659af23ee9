"""Exports compare the template that was trained with the tokenizer that they write."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_ross.checkpoint.reader import open_checkpoint
from megatron_ross.convert.cli import export_checkpoint
from megatron_ross.convert.trained_template import check_trained_template
from megatron_ross.huggingface.chat_templates import chat_template


class _Trained:
    """A checkpoint that says what it was trained with."""

    def __init__(self, reader: Any, template: str | None) -> None:
        self.directory, self.assets = reader.directory, reader.assets
        settings = {} if template is None else {"settings": {"template": template}}
        self.manifest = type("Manifest", (), {"training": settings})


@pytest.mark.parametrize(
    ("name", "fitting", "other"), [("qwen2_siglip", "qwen_2", "llama3"), ("llama_clip", "v1", "qwen_2")]
)
def test_what_was_trained_must_fit(name: str, fitting: str, other: str, imported: Callable[[str], Path]) -> None:
    reader = open_checkpoint(imported(name))
    for template in (fitting, "plain", None, "somebody's"):
        check_trained_template(_Trained(reader, template))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=f"trained with a template .* template={other}: the end token"):
        check_trained_template(_Trained(reader, other))  # type: ignore[arg-type]


@pytest.mark.parametrize("format", ["ross", "llava"])
def test_exports_ask(format: Any, imported: Callable[[str], Path], tmp_path: Path, monkeypatch: Any) -> None:
    asked = []

    def refuse(reader: Any) -> None:
        asked.append(reader.directory)
        raise ValueError("does not fit")

    module = {"ross": "exporter", "llava": "llava_export"}[format]
    monkeypatch.setattr(f"megatron_ross.convert.{module}.check_trained_template", refuse)
    with pytest.raises(ValueError, match="does not fit"):
        export_checkpoint(imported("qwen2_siglip"), tmp_path / "out", format, templates=chat_template)
    assert len(asked) == 1
    assert not (tmp_path / "out").exists()
