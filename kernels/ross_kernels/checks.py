"""What every public kernel call checks before it launches; each refusal is one line that says what to change."""

from __future__ import annotations

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def require_shape(name: str, tensor: Tensor, shape: tuple[int, ...], meaning: str) -> None:
    """`tensor` has exactly `shape`; `meaning` names its dimensions, e.g. "[K, n]"."""
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} has shape {list(tensor.shape)}, but must be {meaning} = {list(shape)}")


def require_dtype(name: str, tensor: Tensor, allowed: tuple[torch.dtype, ...]) -> None:
    if tensor.dtype not in allowed:
        wanted = " or ".join(str(d).removeprefix("torch.") for d in allowed)
        raise ValueError(f"{name} is {str(tensor.dtype).removeprefix('torch.')}, but must be {wanted}; convert it")


def require_one_device(tensors: dict[str, Tensor]) -> None:
    """All tensors are on the device of the first."""
    first_name, first = next(iter(tensors.items()))
    for name, tensor in tensors.items():
        if tensor.device != first.device:
            raise ValueError(f"{name} is on {tensor.device} but {first_name} is on {first.device}; move one of them")


def require_runnable(tensor: Tensor, interpreted: bool) -> None:
    """Compiled kernels need CUDA tensors on the current device, where Triton launches; its interpreter takes any."""
    if interpreted:
        return
    if not tensor.is_cuda:
        raise ValueError(
            f"the Triton kernels run on CUDA tensors, but these are on {tensor.device}; pass use_triton=False for the "
            "PyTorch definition, or set TRITON_INTERPRET=1 before the start to interpret the kernels"
        )
    if tensor.device.index != (current := torch.cuda.current_device()):
        raise ValueError(
            f"the Triton kernels run on the current device, cuda:{current}, but these tensors are on {tensor.device}; "
            f"call torch.cuda.set_device({tensor.device.index}) first"
        )
