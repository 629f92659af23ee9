"""Devices of the kernel tests, and uninitialised memory that shows."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.kernels import interpreter

interpreter.prepare()


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """CPU: in the interpreter. CUDA: compiled; the interpreter cannot be used in the same process."""
    if request.param == "cpu" and torch.cuda.is_available():
        pytest.skip("the kernels are compiled in this process")
    return request.param


@pytest.fixture(autouse=True)
def nan_filled_memory() -> Iterator[None]:
    """`torch.empty` gives NaN (integers: their largest value), so that an element nobody writes is noticed."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
