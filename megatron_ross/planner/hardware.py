"""GPUs the planner knows: peak rates from their data sheets, SXM parts, without sparsity."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """One GPU and its links. Rates are peaks; `planner/timing.py` says which share of them is reached."""

    name: str
    memory_gib: float
    memory_gb_per_s: float
    bf16_tflops: float
    tf32_tflops: float
    fp32_tflops: float
    nvlink_gb_per_s: float
    """To the other GPUs of a node, per direction."""
    network_gb_per_s: float
    """To other nodes, per direction and GPU: one adapter per GPU, HDR for A100, NDR after it."""
    gpus_per_node: int = 8

    def peak_flops(self, dtype: str) -> float:
        """FLOP/s in `bf16`, `tf32` or `fp32`."""
        return 1e12 * {"bf16": self.bf16_tflops, "tf32": self.tf32_tflops, "fp32": self.fp32_tflops}[dtype]


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("a100-80g", 80.0, 2039, 312, 156, 19.5, 300, 25),
        Gpu("h100", 79.6, 3350, 989, 494, 67, 450, 50),
        Gpu("h200", 140.4, 4800, 989, 494, 67, 450, 50),
    )
}


def known_gpu(name: str) -> Gpu:
    """A GPU by name.

    Raises:
        ValueError: a name that is not in the table.
    """
    if name not in GPUS:
        raise ValueError(f"gpu={name!r}: not in the planner's table; use one of {', '.join(GPUS)}")
    return GPUS[name]
