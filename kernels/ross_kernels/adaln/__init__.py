"""Adaptive LayerNorm of a diffusion transformer whose shift, scale and gate differ per token.

Public calls: `layernorm_modulate`, `gated_residual`. Both check their inputs, then run the Triton kernels
(`use_triton=True`) or the PyTorch definition in reference.py; both give the same values, up to rounding.
"""

from __future__ import annotations

from torch import Tensor

from ross_kernels.adaln import reference
from ross_kernels.checks import FLOAT_DTYPES, require_dtype, require_one_device, require_runnable, require_shape

__all__ = ["gated_residual", "layernorm_modulate"]


def layernorm_modulate(x: Tensor, shift: Tensor, scale: Tensor, *, eps: float, use_triton: bool) -> Tensor:
    """LayerNorm over the last dimension without affine parameters, then x * (1 + scale) + shift.

    Args:
        x, shift, scale: one shape [..., D], one dtype (fp16, bf16 or fp32); leading dimensions may be empty. shift and
            scale are read in place if they are slices of one [..., m D] tensor.
        eps: added to the variance.
        use_triton: run the kernels, not the definition. They are differentiable once and round only the result.

    Returns:
        Shape and dtype of x, contiguous.

    Raises:
        ValueError: shapes, dtypes or devices differ or are not supported.
    """
    _check(x=x, shift=shift, scale=scale)
    if not use_triton:
        return reference.layernorm_modulate(x, shift, scale, eps)
    from ross_kernels.adaln import autograd  # needs Triton, which CPU installations may lack

    _check_kernel(x, autograd.triton_impl.MAX_WIDTH, autograd.triton_impl.INTERPRETED)
    return autograd.LayerNormModulate.apply(x, shift, scale, eps)


def gated_residual(x: Tensor, gate: Tensor, y: Tensor, *, use_triton: bool) -> Tensor:
    """x + gate * y; see `layernorm_modulate` for arguments, result and errors."""
    _check(x=x, gate=gate, y=y)
    if not use_triton:
        return reference.gated_residual(x, gate, y)
    from ross_kernels.adaln import autograd  # needs Triton, which CPU installations may lack

    _check_kernel(x, autograd.triton_impl.MAX_WIDTH, autograd.triton_impl.INTERPRETED)
    return autograd.GatedResidual.apply(x, gate, y)


def _check(**tensors: Tensor) -> None:
    x = tensors["x"]
    if x.dim() < 1 or not x.shape[-1]:
        raise ValueError(f"x has shape {list(x.shape)}, but must be [..., D] with D above zero")
    require_dtype("x", x, FLOAT_DTYPES)
    for name, tensor in tensors.items():
        require_shape(name, tensor, tuple(x.shape), "that of x")
        require_dtype(name, tensor, (x.dtype,))
    require_one_device(tensors)


def _check_kernel(x: Tensor, max_width: int, interpreted: bool) -> None:
    require_runnable(x, interpreted)
    if x.shape[-1] > max_width:
        raise ValueError(
            f"x is {x.shape[-1]} wide, but the kernels hold rows of at most {max_width}; pass use_triton=False"
        )
