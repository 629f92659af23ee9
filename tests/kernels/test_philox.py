"""The generator against published answers and Triton's own; the numbers inside kernels against the definition."""

from __future__ import annotations

import pytest
import torch
import triton.language as tl
from ross_kernels import philox
from ross_kernels.philox_triton import integer, normal_at, normal_block
from ross_kernels.philox_triton import philox as philox_in_kernel
from torch import Tensor

from tests.kernels.interpreter import jit

# Counter, key and output words of Philox4x32-10 from the test vectors of the Random123 library.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
SEED = 0xFEDCBA98_76543210


@jit
def words_kernel(out, seed_low, seed_high, c0, c1, c2, c3):
    first = tl.arange(0, 1)
    u0, u1 = (first + c0).to(tl.uint32), (first + c1).to(tl.uint32)
    u2, u3 = (first + c2).to(tl.uint32), (first + c3).to(tl.uint32)
    a, b, c, d = philox_in_kernel(seed_low, seed_high, u0, u1, u2, u3)
    at = out + first
    tl.store(at, a.to(tl.int64))
    tl.store(at + 1, b.to(tl.int64))
    tl.store(at + 2, c.to(tl.int64))
    tl.store(at + 3, d.to(tl.int64))


@jit
def numbers_kernel(blocks, singles, integers, seed_low, seed_high, stream, sample, salt, upper, BLOCK: tl.constexpr):
    """`4 BLOCK` numbers of a stream in two ways, and its first four integers."""
    block = tl.arange(0, BLOCK)
    sample, salt = sample.to(tl.uint32), salt.to(tl.uint32)
    n0, n1, n2, n3 = normal_block(seed_low, seed_high, block, stream, sample, salt)
    tl.store(blocks + 4 * block, n0)
    tl.store(blocks + 4 * block + 1, n1)
    tl.store(blocks + 4 * block + 2, n2)
    tl.store(blocks + 4 * block + 3, n3)
    index = tl.arange(0, 4 * BLOCK)
    tl.store(singles + index, normal_at(seed_low, seed_high, index, stream, sample, salt))
    for k in range(4):
        tl.store(integers + k, integer(seed_low, seed_high, k, stream, sample, salt, upper))


def column(value: int) -> Tensor:
    return torch.tensor([value], dtype=torch.int64)


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_definition_gives_the_published_words(
    counter: tuple[int, ...], key: tuple[int, int], expected: tuple[int, ...]
) -> None:
    words = philox.philox(key[0] | key[1] << 32, *(column(c) for c in counter))
    assert tuple(int(w) for w in words) == expected


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_kernel_gives_the_published_words(
    device: str, counter: tuple[int, ...], key: tuple[int, int], expected: tuple[int, ...]
) -> None:
    out = torch.empty(4, dtype=torch.int64, device=device)
    words_kernel[(1,)](out, *key, *counter)
    assert tuple(out.tolist()) == expected


@pytest.mark.parametrize("seed", [0, 1, 2**31, SEED, -1])
@pytest.mark.parametrize(("stream", "sample", "salt"), [(0, 0, 0), (5, 2**31 + 7, 1000 * 256 + 255)])
def test_numbers_in_kernels_equal_the_definition(device: str, seed: int, stream: int, sample: int, salt: int) -> None:
    blocks, singles = torch.empty(2, 64, device=device).unbind(0)
    integers = torch.empty(4, dtype=torch.int64, device=device)
    low, high = seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF
    wide = salt + 2**33  # only its low 32 bits are a counter
    numbers_kernel[(1,)](blocks, singles, integers, low, high, stream, sample, wide, 1000, BLOCK=16)
    key = (seed, column(stream), column(sample), column(salt))
    expected = philox.normal(*key, 64)[0]
    torch.testing.assert_close(blocks.cpu(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(singles.cpu(), expected, rtol=1e-5, atol=1e-6)
    assert integers.tolist() == philox.integers(*key, 4, 1000)[0].tolist()


@jit
def triton_randn_kernel(out, seed, BLOCK: tl.constexpr):
    block = tl.arange(0, BLOCK)
    n0, n1, n2, n3 = tl.randn4x(seed, block)
    tl.store(out + 4 * block, n0)
    tl.store(out + 4 * block + 1, n1)
    tl.store(out + 4 * block + 2, n2)
    tl.store(out + 4 * block + 3, n3)


@pytest.mark.gpu
def test_stream_zero_is_that_of_triton() -> None:
    """`tl.randn4x(seed, i)` has counter (i, 0, 0, 0). Its helpers cannot be interpreted once Triton is imported."""
    out = torch.empty(64, device="cuda")
    triton_randn_kernel[(1,)](out, 1234, BLOCK=16)
    expected = philox.normal(1234, column(0), column(0), column(0), 64)[0]
    torch.testing.assert_close(out.cpu(), expected, rtol=1e-5, atol=1e-6)


def test_rows_do_not_depend_on_one_another() -> None:
    keys = torch.tensor([[0, 4, 7, 256], [2, 4, 7, 256], [2, 5, 7, 256], [2, 5, 8, 257]])
    stream, sample, salt = keys[:, 1], keys[:, 2], keys[:, 3]
    together = philox.normal(SEED, stream, sample, salt, 10)
    for i in range(4):
        assert torch.equal(
            philox.normal(SEED, stream[i : i + 1], sample[i : i + 1], salt[i : i + 1], 10)[0], together[i]
        )
    assert torch.equal(philox.normal(SEED, stream, sample, salt, 7), together[:, :7]), "a prefix is a prefix"


def test_integers_are_uniform() -> None:
    """Chi-squared with 99 degrees of freedom: mean 99, standard deviation 14."""
    drawn = philox.integers(SEED, column(1), column(3), column(256), 20_000, 100)[0]
    counts = torch.bincount(drawn, minlength=100)
    assert counts.numel() == 100
    chi_squared = float(((counts - 200.0) ** 2 / 200).sum())
    assert 99 - 5 * 14 < chi_squared < 99 + 5 * 14
