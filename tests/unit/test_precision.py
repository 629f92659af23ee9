"""TF32 products: on in a module's forward and backward pass, off before, between and after."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from megatron_ross.precision import in_tf32


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


class Spy(torch.autograd.Function):
    """Identity that writes down the switch in both directions."""

    @staticmethod
    def forward(ctx, x: Tensor, seen: list[tuple[str, bool]], name: str) -> Tensor:
        ctx.seen, ctx.name = seen, name
        seen.append((f"{name} forward", torch.backends.cuda.matmul.allow_tf32))
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        ctx.seen.append((f"{ctx.name} backward", torch.backends.cuda.matmul.allow_tf32))
        return grad, None, None


@pytest.mark.parametrize("already_on", [False, True])
def test_switch_follows_the_module(already_on: bool) -> None:
    torch.backends.cuda.matmul.allow_tf32 = already_on
    seen: list[tuple[str, bool]] = []
    leaf = torch.ones(2, 3, requires_grad=True)
    before = Spy.apply(leaf, seen, "before")
    inside = in_tf32(lambda x: Spy.apply(x * 2, seen, "inside"), before)
    Spy.apply(inside, seen, "after").sum().backward()
    outside = already_on
    assert seen == [
        ("before forward", outside),
        ("inside forward", True),
        ("after forward", outside),
        ("after backward", outside),
        ("inside backward", True),
        ("before backward", outside),
    ]
    assert torch.backends.cuda.matmul.allow_tf32 is already_on
    torch.testing.assert_close(leaf.grad, torch.full((2, 3), 2.0))


def test_without_a_gradient_only_the_forward_pass_is_switched() -> None:
    seen: list[tuple[str, bool]] = []
    in_tf32(lambda x: Spy.apply(x, seen, "inside"), torch.ones(2))
    assert seen == [("inside forward", True)]
    assert not torch.backends.cuda.matmul.allow_tf32


def test_an_error_leaves_the_switch_as_it_was() -> None:
    with pytest.raises(ZeroDivisionError):
        in_tf32(lambda x: x / (1 // 0), torch.ones(2))
    assert not torch.backends.cuda.matmul.allow_tf32
