"""Adaptive LayerNorm of a diffusion transformer, per token, in plain PyTorch: the definition the kernels reproduce.

(DiT, arXiv 2212.09748.) All tensors of a call have one shape [..., D] and one dtype.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def layernorm_modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """LayerNorm over D without affine parameters, then x * (1 + scale) + shift."""
    return F.layer_norm(x, x.shape[-1:], eps=eps) * (1 + scale) + shift


def gated_residual(x: Tensor, gate: Tensor, y: Tensor) -> Tensor:
    """x + gate * y."""
    return x + gate * y
