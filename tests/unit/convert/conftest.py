"""Golden checkpoints converted once per session."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_ross.convert.cli import import_checkpoint

COMPOSITES = {"qwen2_siglip": "vision_siglip", "llama_clip": "vision_clip"}


@pytest.fixture(scope="session")
def imported(golden_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`imported("qwen2_siglip")`: root of the Megatron checkpoint made from that golden composite. Do not change it."""
    roots: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in roots:
            roots[name] = tmp_path_factory.mktemp("imported") / name
            import_checkpoint(
                roots[name],
                checkpoint=str(golden_dir / f"ross_{name}"),
                vision_tower=str(golden_dir / COMPOSITES[name]),
                vae=str(golden_dir / "vae"),
            )
        return roots[name]

    return get


@pytest.fixture
def golden_llm_copy(golden_dir: Path, tmp_path: Path) -> Path:
    """A private, writable copy of the golden Qwen2 language model."""
    import shutil

    return Path(shutil.copytree(golden_dir / "llm_qwen2", tmp_path / "llm"))
