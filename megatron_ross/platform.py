"""Runs the real Megatron Core on a machine without CUDA, on gloo.

Megatron Core asks `torch.cuda` for its device, streams and random state in places no configuration reaches. Where
CUDA is absent, `ensure_platform()` answers those questions for the CPU; where it is present, nothing is touched. This
is the only module that patches anything. Collectives, schedules, optimizers and checkpoints are Megatron's own.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch

_CPU = torch.device("cpu")


class _NullStream:
    """Stands in for a CUDA stream or event: on CPU everything is already in order."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def wait_stream(self, stream: object) -> None: ...

    def wait_event(self, event: object) -> None: ...

    def record_event(self, event: object = None) -> _NullStream:
        return self

    def record(self, stream: object = None) -> None: ...

    def synchronize(self) -> None: ...

    def wait(self, stream: object = None) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: object) -> float:
        return 0.0


def current_device() -> torch.device:
    """This rank's compute device: its CUDA device, or the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else _CPU


def distributed_backend() -> str:
    return "nccl" if torch.cuda.is_available() else "gloo"


def ensure_platform() -> None:
    """Prepare Megatron Core for this machine. Idempotent; call before building process groups or models."""
    if torch.cuda.is_available() or getattr(torch.cuda, "_megatron_ross_cpu", False):
        return
    _patch_device_queries()
    _patch_random_state()
    _patch_tensor_factories()
    setattr(torch.cuda, "_megatron_ross_cpu", True)  # noqa: B010  (a name torch does not know)


def _no_op() -> Callable[..., None]:
    """A new function each time: torch's compiler wants every patched name to be a different object."""
    return lambda *args, **kwargs: None


def _patch_device_queries() -> None:
    cuda = torch.cuda
    null = _NullStream()
    cuda.current_device = lambda: _CPU
    for name in ("set_device", "synchronize", "empty_cache"):
        setattr(cuda, name, _no_op())
    cuda.nvtx.range_push, cuda.nvtx.range_pop = _no_op(), _no_op()
    cuda.current_stream = lambda *args: null
    cuda.default_stream = lambda *args: null
    cuda.stream = lambda stream: contextlib.nullcontext()
    cuda.Stream = type("Stream", (_NullStream,), {})
    cuda.Event = type("Event", (_NullStream,), {})


def _patch_random_state() -> None:
    from megatron.core.tensor_parallel import random as megatron_random

    torch.cuda.manual_seed = lambda seed: torch.manual_seed(seed)
    for owner, name in ((torch.cuda, "get_rng_state"), (megatron_random, "_get_cuda_rng_state")):
        setattr(owner, name, lambda *args, **kwargs: torch.get_rng_state())
    for owner, name in ((torch.cuda, "set_rng_state"), (megatron_random, "_set_cuda_rng_state")):
        setattr(owner, name, lambda state, *args, **kwargs: torch.set_rng_state(state))


def _patch_tensor_factories() -> None:
    """`device="cuda"` means the CPU; `.cuda()` stays; `Tensor.type()` says torch.cuda.*, as the optimizer expects."""

    def on_cpu(factory):
        @functools.wraps(factory)
        def wrapped(*args: Any, **kwargs: Any):
            device = kwargs.get("device")
            if device is not None and str(device).startswith("cuda"):
                kwargs["device"] = _CPU
            return factory(*args, **kwargs)

        return wrapped

    for name in ("tensor", "zeros", "ones", "empty", "full", "arange", "empty_like", "zeros_like", "rand", "randn"):
        setattr(torch, name, on_cpu(getattr(torch, name)))
    torch.Tensor.cuda = lambda self, *args, **kwargs: self
    plain_type = torch.Tensor.type

    @functools.wraps(plain_type)
    def cuda_type(self: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any):
        if dtype is not None:
            return plain_type(self, dtype, *args, **kwargs)
        return plain_type(self).replace("torch.", "torch.cuda.", 1)

    torch.Tensor.type = cuda_type


def quieten() -> None:
    """Hide what users cannot act on: notes of libraries about each other, once per rank."""
    warnings.filterwarnings("ignore", module=r"megatron\.core|torch\.distributed|torch\.utils|torch\.autograd")
    warnings.filterwarnings("ignore", message=r".*grad attribute of a Tensor that is not a leaf.*")
    for name in ("megatron.core", "torch.distributed.checkpoint", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


def show_log(name: str) -> None:
    """Print what this logger of a library says: `quieten` hides it, and Python prints no INFO by itself. Idempotent."""
    logger = logging.getLogger(name)
    logger.setLevel(logging.INFO)
    if not logger.handlers:
        logger.addHandler(logging.StreamHandler(sys.stdout))
        logger.propagate = False
