"""The one place that probes what is installed."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

FLASH_ATTENTION = ("flash-attn", "flash-attn-3", "flash_attn_3", "flash-attn-4")


@dataclass(frozen=True)
class Available:
    """What a rank's machine offers. A plain object, so that a rule can be asked about any machine."""

    gpu: tuple[int, int] | None = None
    """Compute capability of the GPU; None where there is none."""
    cuda: str = ""
    """CUDA version that torch was built for."""
    megatron_core: str = ""
    transformer_engine: str = ""
    """Version; empty if it is not installed or cannot be imported."""
    transformer_engine_error: str = ""
    """Why it cannot be imported although it is installed."""
    flash_attention: str = ""
    """The flash-attn distribution that TransformerEngine would use, with its version."""
    apex_adam: bool = False
    """NVIDIA's Apex with its CUDA extension; PyPI's `apex` is something else."""
    apex_wgrad: bool = False
    """Apex's fused_weight_gradient_mlp_cuda."""
    nvml: bool = False
    """The package pynvml, by which torch reads a GPU's temperature, power and clock."""
    wandb: bool = False
    """The client of Weights & Biases."""
    environment: Mapping[str, str] = field(default_factory=dict)


@functools.cache
def probe() -> Available:
    """What is available here, to this process."""
    import torch

    has_gpu = torch.cuda.is_available()
    engine, engine_error = _transformer_engine() if has_gpu else ("", "")
    return Available(
        gpu=torch.cuda.get_device_capability(int(os.environ.get("LOCAL_RANK", 0))) if has_gpu else None,
        cuda=torch.version.cuda or "",
        megatron_core=version("megatron-core"),
        transformer_engine=engine,
        transformer_engine_error=engine_error,
        flash_attention=next((f"{name} {found}" for name in FLASH_ATTENTION if (found := version(name))), ""),
        apex_adam=has_gpu and _can_find("amp_C") and _can_find("apex.optimizers.fused_adam"),
        apex_wgrad=has_gpu and _can_find("fused_weight_gradient_mlp_cuda"),
        nvml=_can_find("pynvml"),
        wandb=_can_find("wandb"),
        environment=dict(os.environ),
    )


def _transformer_engine() -> tuple[str, str]:
    """(version, why it cannot be imported). torch must have been imported before it."""
    if not _can_find("transformer_engine"):
        return "", ""
    try:
        importlib.import_module("transformer_engine.pytorch")
    except Exception as error:  # a missing library, a wrong CUDA, another torch: whatever it is, it cannot be used
        return "", f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return str(importlib.import_module("transformer_engine").__version__), ""


def _can_find(module: str) -> bool:
    """Whether `module` could be imported; importing its parents may fail in any way."""
    try:
        return importlib.util.find_spec(module) is not None
    except Exception:
        return False


def version(distribution: str) -> str:
    """Version of an installed distribution; empty if it is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""


def versions(distributions: Iterable[str]) -> dict[str, str]:
    """Versions of those that are installed, in the given order."""
    return {name: found for name in distributions if (found := version(name))}
