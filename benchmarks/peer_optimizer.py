"""Fused AdamW for the peer; bf16 weights have fp32 copies, as DeepSpeed and Megatron keep them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn


class MasterAdamW:
    """torch's fused AdamW on fp32 weights; those that are stored in another dtype are copied there and back."""

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float) -> None:
        self.stored = [p for p in parameters if p.requires_grad]
        self.masters = [p if p.dtype == torch.float32 else p.detach().float().requires_grad_() for p in self.stored]
        self.copied = [(p, m) for p, m in zip(self.stored, self.masters, strict=True) if p is not m]
        self.adamw = torch.optim.AdamW(self.masters, lr=lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, fused=True)

    def step(self) -> None:
        """Update, and leave no gradient behind."""
        for parameter, master in self.copied:
            master.grad = None if parameter.grad is None else parameter.grad.float()
            parameter.grad = None
        self.adamw.step()
        self.adamw.zero_grad(set_to_none=True)
        if self.copied:
            torch._foreach_copy_([p.data for p, _ in self.copied], [m.data for _, m in self.copied])
