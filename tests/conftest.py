"""Settings shared by all tests: one thread per process, no GPU tests without a GPU, golden data."""

from __future__ import annotations

import os

# Before torch is imported: test files and ranks share the cores. Nothing is fetched from a model hub.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"

from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `gpu` where torch sees no CUDA GPU."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture(scope="session")
def repository() -> Path:
    """Root folder of the project."""
    return ROOT


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """Small checkpoints with recorded inputs and outputs; see its README.md."""
    return ROOT / "tests" / "golden"
