"""Philox4x32-10 and its normal numbers inside Triton kernels; `philox.py` is the definition, number for number.

Written out rather than taken from `tl.philox` and `tl.randn4x`: those key a draw by one offset, these by the four
counters (block, stream, sample, salt) with a 64-bit seed.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def philox(seed_low, seed_high, c0, c1, c2, c3):
    """Ten rounds on uint32 counters that broadcast together; the four output words, uint32."""
    key0 = tl.cast(seed_low, tl.uint32)
    key1 = tl.cast(seed_high, tl.uint32)
    for _ in tl.static_range(10):
        high_a = tl.umulhi(c0, tl.full((), 0xD2511F53, tl.uint32))
        high_b = tl.umulhi(c2, tl.full((), 0xCD9E8D57, tl.uint32))
        low_a = tl.mul(c0, tl.full((), 0xD2511F53, tl.uint32), sanitize_overflow=False)
        low_b = tl.mul(c2, tl.full((), 0xCD9E8D57, tl.uint32), sanitize_overflow=False)
        c0, c1, c2, c3 = high_b ^ c1 ^ key0, low_b, high_a ^ c3 ^ key1, low_a
        key0 = tl.add(key0, tl.full((), 0x9E3779B9, tl.uint32), sanitize_overflow=False)
        key1 = tl.add(key1, tl.full((), 0xBB67AE85, tl.uint32), sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit
def _words(seed_low, seed_high, block, stream, sample, salt):
    """Philox with a tensor of blocks (never negative where it matters) and scalars for the other counters."""
    c0 = block.to(tl.uint32)
    zero = c0 * 0
    c1, c2, c3 = (zero + stream).to(tl.uint32), (zero + sample).to(tl.uint32), (zero + salt).to(tl.uint32)
    return philox(seed_low, seed_high, c0, c1, c2, c3)


@triton.jit
def uniform(bits):
    """uint32 -> float32 in [0, 1)."""
    signed = bits.to(tl.int32, bitcast=True)
    return tl.where(signed < 0, ~signed, signed).to(tl.float32) * 4.6566127342e-10


@triton.jit
def normal_pair(bits_a, bits_b):
    """Box-Muller: two independent standard normal numbers, float32."""
    radius = tl.sqrt(-2.0 * tl.log(tl.maximum(uniform(bits_a), 1.0e-7)))
    angle = 6.283185307179586 * uniform(bits_b)
    return radius * tl.cos(angle), radius * tl.sin(angle)


@triton.jit
def normal_block(seed_low, seed_high, block, stream, sample, salt):
    """The four consecutive normal numbers of every `block` (int32 tensor) of a stream; float32, shape of `block`."""
    a, b, c, d = _words(seed_low, seed_high, block, stream, sample, salt)
    n0, n1 = normal_pair(a, b)
    n2, n3 = normal_pair(c, d)
    return n0, n1, n2, n3


@triton.jit
def normal_at(seed_low, seed_high, index, stream, sample, salt):
    """The normal number at every `index` (int32 tensor) of a stream; one Philox call each, for scattered access."""
    a, b, c, d = _words(seed_low, seed_high, index // 4, stream, sample, salt)
    second_half = (index & 2) != 0
    even, odd = normal_pair(tl.where(second_half, c, a), tl.where(second_half, d, b))
    return tl.where((index & 1) != 0, odd, even)


@triton.jit
def integer(seed_low, seed_high, index, stream, sample, salt, upper):
    """Uniform integer in [0, upper) at scalar `index` of a stream; int64."""
    bits, _b, _c, _d = _words(seed_low, seed_high, salt * 0 + index, stream, sample, salt)
    return ((bits.to(tl.uint64) * upper) >> 32).to(tl.int64)
