"""The one place that probes what is installed."""

from __future__ import annotations

import importlib.metadata
import importlib.util


def transformer_engine_available() -> bool:
    """TransformerEngine's PyTorch extension can be imported."""
    return importlib.util.find_spec("transformer_engine") is not None


def versions() -> dict[str, str]:
    """Versions that a checkpoint or benchmark should carry."""
    names = (
        "torch",
        "megatron-core",
        "transformers",
        "diffusers",
        "triton",
        "transformer-engine",
        "nvidia-dali-cuda130",
    )
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
