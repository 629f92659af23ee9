"""Philox4x32-10 and the normal draws made from it, in plain PyTorch: the definition that kernels must reproduce.

Counter-based: element i of a stream is a pure function of (seed, counter), so a draw never depends on rank, step,
block size or how many draws came before. Rounds and constants: Salmon et al., "Parallel random numbers: as easy as
1, 2, 3" (2011). The maps to uniform and normal numbers are those of Triton's `tl.rand` and `tl.randn`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIER_A, _MULTIPLIER_B = 0xD2511F53, 0xCD9E8D57
_WEYL_A, _WEYL_B = 0x9E3779B9, 0xBB67AE85


def _mul_hi_lo(a: Tensor, multiplier: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a 32x32-bit product, computed in 16-bit halves so that int64 never overflows."""
    low = a * (multiplier & 0xFFFF)
    high = a * (multiplier >> 16)
    middle = (low >> 16) + (high & 0xFFFF)
    return (high >> 16) + (middle >> 16), ((middle & 0xFFFF) << 16) | (low & 0xFFFF)


def philox(seed: int, c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ten Philox rounds on int64 tensors that hold 32-bit unsigned counters (broadcast together); same four back."""
    c0, c1, c2, c3 = torch.broadcast_tensors(c0, c1, c2, c3)
    key0, key1 = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(10):
        hi_a, lo_a = _mul_hi_lo(c0, _MULTIPLIER_A)
        hi_b, lo_b = _mul_hi_lo(c2, _MULTIPLIER_B)
        c0, c1, c2, c3 = hi_b ^ c1 ^ key0, lo_b, hi_a ^ c3 ^ key1, lo_a
        key0, key1 = (key0 + _WEYL_A) & _MASK, (key1 + _WEYL_B) & _MASK
    return c0, c1, c2, c3


def _uniform(bits: Tensor) -> Tensor:
    """32-bit unsigned in int64 -> float32 in [0, 1)."""
    signed = torch.where(bits >= 2**31, bits - 2**32, bits)
    folded = torch.where(signed < 0, -signed - 1, signed)
    return folded.to(torch.float32) * 4.6566127342e-10


def _normal_pair(bits_a: Tensor, bits_b: Tensor) -> tuple[Tensor, Tensor]:
    """Box-Muller."""
    radius = torch.sqrt(-2.0 * torch.log(_uniform(bits_a).clamp_min(1.0e-7)))
    angle = (2.0 * math.pi) * _uniform(bits_b)
    return radius * torch.cos(angle), radius * torch.sin(angle)


def normal(seed: int, stream: Tensor, sample: Tensor, salt: Tensor, numel: int) -> Tensor:
    """Standard normal numbers, float32 [n, numel]: row i is the stream (stream[i], sample[i], salt[i]), int64."""
    blocks = torch.arange((numel + 3) // 4, device=stream.device, dtype=torch.int64)
    bits = philox(seed, blocks[None, :], stream[:, None], sample[:, None], salt[:, None])
    pairs = (*_normal_pair(bits[0], bits[1]), *_normal_pair(bits[2], bits[3]))
    return torch.stack(pairs, dim=-1).flatten(1)[:, :numel]


def integers(seed: int, stream: Tensor, sample: Tensor, salt: Tensor, count: int, upper: int) -> Tensor:
    """Uniform integers in [0, upper), int64 [n, count], keyed as in `normal`."""
    draws = torch.arange(count, device=stream.device, dtype=torch.int64)
    bits, _, _, _ = philox(seed, draws[None, :], stream[:, None], sample[:, None], salt[:, None])
    return (bits * upper) >> 32
