"""Adaptive LayerNorm and gated residual: kernels against the definition, strided inputs, refusals."""

from __future__ import annotations

import pytest
import torch
from ross_kernels import adaln
from torch import Tensor

EPS = 1e-6
# leading dimensions, width, dtype
CASES = [
    ((2, 3), 100, torch.float32),
    ((5,), 33, torch.bfloat16),
    ((1, 3), 64, torch.float16),
    ((4,), 1, torch.float32),
    ((0, 9), 16, torch.float32),
    ((2, 0), 7, torch.bfloat16),
]
DENOISERS = [((2, 729), width, dtype) for width in (1024, 1280, 1536) for dtype in (torch.float32, torch.bfloat16)]
"""Every published width, with as many tokens as images have: too much for the interpreter."""


def run(
    lead: tuple[int, ...], width: int, dtype: torch.dtype, device: str, use_triton: bool, up: torch.dtype
) -> list[Tensor]:
    """Output and gradients of x, modulation and y of one half of a DiT block; inputs of `dtype`, computed in `up`."""
    generator = torch.Generator().manual_seed(width)

    def leaf(columns: int) -> Tensor:
        values = torch.randn(*lead, columns, generator=generator)
        return values.to(device, dtype).to(up).requires_grad_()

    x, modulation, y = leaf(width), leaf(3 * width), leaf(width)
    shift, scale, gate = modulation.chunk(3, dim=-1)
    if use_triton or up == dtype:
        normed = adaln.layernorm_modulate(x, shift, scale, eps=EPS, use_triton=use_triton)
        out = adaln.gated_residual(x, gate, y, use_triton=use_triton)
    else:
        normed = adaln.reference.layernorm_modulate(x, shift, scale, EPS)
        out = adaln.reference.gated_residual(x, gate, y)
    wave = torch.arange(normed.numel(), device=device).view(normed.shape).sin()
    ((normed.to(up) * wave).sum() + (out.to(up) * wave.cos()).sum()).backward()
    return [normed.detach(), out.detach(), x.grad, modulation.grad, y.grad]


@pytest.mark.parametrize(
    ("lead", "width", "dtype"), [*CASES, *(pytest.param(*case, marks=pytest.mark.gpu) for case in DENOISERS)]
)
def test_kernels_equal_the_definition(device: str, lead: tuple[int, ...], width: int, dtype: torch.dtype) -> None:
    """Against the definition in float64; PyTorch's own error in `dtype` is the yardstick, and twice that is allowed."""
    if device == "cpu" and width >= 1024:
        pytest.skip("too much for the interpreter")
    exact = run(lead, width, dtype, device, False, torch.float64)
    plain = run(lead, width, dtype, device, False, dtype)
    got = run(lead, width, dtype, device, True, dtype)
    floor = 4 * torch.finfo(dtype).eps
    # A row of one column is constant: its gradient is the difference of equal numbers over sqrt(EPS), and a GPU's
    # compiler, which fuses a product into that difference, leaves the product's rounding there.
    cancelled = 2 * torch.finfo(dtype).eps / EPS**0.5 if device == "cuda" and width == 1 else 0.0
    for name, mine, theirs, truth in zip(("normed", "out", "x", "modulation", "y"), got, plain, exact, strict=True):
        assert mine.dtype == dtype
        assert mine.shape == truth.shape
        assert mine.isfinite().all(), name
        if truth.numel():
            yardstick = (theirs.double() - truth).abs().max()
            allowed = 2 * float(yardstick) + floor * float(truth.abs().max()) + (cancelled if name == "x" else 0.0)
            assert float((mine.double() - truth).abs().max()) <= allowed, name


def test_block_size_does_not_matter(device: str) -> None:
    from ross_kernels.adaln import triton_impl

    generator = torch.Generator().manual_seed(0)
    x, shift, scale, grad = torch.randn(4, 3, 40, generator=generator).to(device)
    results = []
    for block in (64, 128, 1024):
        normed = triton_impl.layernorm_modulate(x, shift, scale, EPS, block=block)
        grads = triton_impl.layernorm_modulate_backward(grad, x, scale, EPS, block=block)
        gated = triton_impl.gated_residual(x, scale, shift, block=block)
        gated_grads = triton_impl.gated_residual_backward(grad, scale, shift, block=block)
        results.append((normed, *grads, gated, *gated_grads))
    for other in results[1:]:
        for first, second in zip(results[0][:3], other[:3], strict=True):
            torch.testing.assert_close(second, first, rtol=1e-6, atol=1e-6)  # the row's sums are added in another order
        assert all(torch.equal(a, b) for a, b in zip(results[0][3:], other[3:], strict=True))


def test_any_strides(device: str) -> None:
    """Transposed, expanded and sliced inputs give what their contiguous copies give."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(4, 6, 5, generator=generator).to(device)
    x, shift, scale = base.transpose(1, 2), base[:1].transpose(1, 2).expand(4, 5, 6), base.mT.flip(0)
    for function, arguments in ((adaln.layernorm_modulate, {"eps": EPS}), (adaln.gated_residual, {})):
        strided = function(x, shift, scale, **arguments, use_triton=True)
        copied = function(x.contiguous(), shift.contiguous(), scale.contiguous(), **arguments, use_triton=True)
        assert strided.is_contiguous()
        assert torch.equal(strided, copied)


@pytest.mark.parametrize(
    ("rows", "width"),
    [
        pytest.param(4, 33, id="small"),
        pytest.param(352_000, 1024, id="more elements than 32 bits count", marks=pytest.mark.gpu),
    ],
)
def test_the_last_of_many_rows_is_that_row_alone(device: str, rows: int, width: int) -> None:
    """Slices of one [rows, 6 D] projection, whose row offsets pass 2^31."""
    if device == "cpu" and rows > 4:
        pytest.skip("too much for the interpreter")
    x = torch.randn(rows, width, device=device, dtype=torch.bfloat16)
    modulation = torch.randn(rows, 6 * width, device=device, dtype=torch.bfloat16)
    grads = []
    for part in (slice(None), slice(-1, None)):
        leaves = [t[part].detach().requires_grad_() for t in (x, *modulation.chunk(6, dim=-1)[:3])]
        normed = adaln.layernorm_modulate(*leaves[:3], eps=EPS, use_triton=True)
        out = adaln.gated_residual(leaves[0], leaves[3], normed, use_triton=True)
        grads.append([out, *torch.autograd.grad(out, leaves, x[part])])
    for among, alone in zip(*grads, strict=True):
        assert torch.equal(among[-1:], alone)


def test_constant_rows_stay_finite(device: str) -> None:
    x = torch.full((2, 24), 3.0, device=device)
    out = adaln.layernorm_modulate(x, torch.ones_like(x), torch.zeros_like(x), eps=EPS, use_triton=True)
    torch.testing.assert_close(out, torch.ones_like(x), rtol=0, atol=1e-3)


X = torch.zeros(2, 8)


@pytest.mark.parametrize("use_triton", [False, True])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((X, X, torch.zeros(1, 8)), r"has shape \[1, 8\], but must be that of x = \[2, 8\]"),
        ((X, X.half(), X), "is float16, but must be float32"),
        ((X.long(), X.long(), X.long()), "x is int64"),
        ((X, X, torch.zeros(2, 8, device="meta")), "is on meta but x is on cpu"),
        ((torch.zeros(2, 0), torch.zeros(2, 0), torch.zeros(2, 0)), "D above zero"),
    ],
)
def test_bad_inputs_are_refused(use_triton: bool, arguments: tuple[Tensor, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        adaln.layernorm_modulate(*arguments, eps=EPS, use_triton=use_triton)
    with pytest.raises(ValueError, match=message):
        adaln.gated_residual(*arguments, use_triton=use_triton)


def test_too_wide_rows_and_cpu_tensors_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from ross_kernels.adaln import triton_impl

    wide = torch.zeros(1, triton_impl.MAX_WIDTH + 1)
    monkeypatch.setattr(triton_impl, "INTERPRETED", True)
    with pytest.raises(ValueError, match="rows of at most 16384; pass use_triton=False"):
        adaln.gated_residual(wide, wide, wide, use_triton=True)
    monkeypatch.setattr(triton_impl, "INTERPRETED", False)
    with pytest.raises(ValueError, match="run on CUDA tensors"):
        adaln.layernorm_modulate(X, X, X, eps=EPS, use_triton=True)
