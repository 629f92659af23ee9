"""Kernels in Triton's interpreter, whatever was imported before.

Triton decides at `@triton.jit` whether a function is compiled or interpreted. By the time these tests are collected
other tests have imported Triton with the interpreter off, so its own `tl.sum` is a compiled function, which interpreted
kernels cannot call. `prepare` therefore decorates it again and imports our kernels, all with the interpreter on, and
leaves no environment variable behind. Where there is a GPU nothing is done: kernels are compiled there.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import triton
import triton.language as tl

KERNEL_MODULES = (
    "ross_kernels.philox_triton",
    "ross_kernels.noise_mse.triton_impl",
    "ross_kernels.adaln.triton_impl",
)


def jit(function: Callable[..., Any]) -> Any:
    """`triton.jit`, interpreted where there is no GPU."""
    if torch.cuda.is_available():
        return triton.jit(function)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        return triton.jit(function)


def prepare() -> None:
    """Make the kernels interpreted in this process if it has no GPU.

    Raises:
        RuntimeError: they have been imported as compiled ones already.
    """
    if torch.cuda.is_available():
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        if isinstance(tl.sum, triton.runtime.JITFunction):
            tl.sum = triton.jit(tl.sum.fn)
        for name in KERNEL_MODULES:
            if not getattr(importlib.import_module(name), "INTERPRETED", True):
                raise RuntimeError(f"{name} was imported before with Triton's interpreter off; import it lazily")
