"""Where a step's time goes: seconds per part of a model, forward and backward, from hooks at the parts' borders.

A part's backward pass lasts from the gradient of its output to the gradient of its input. What comes before the first
of them is the LM head's. The GPU is waited for at every border, so these runs are not the timed ones.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

FIRST_BACKWARD = "head"


def clock() -> float:
    """Seconds, when everything that was started is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


class Timeline:
    """Watches modules and methods; `seconds` sums up what they took, by part."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.enabled = False
        self._begin = 0.0
        self._since_loss: float | None = None

    def watch(self, part: str, module: nn.Module) -> None:
        """A module with one input and one output that carry gradients."""

        def before(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            if not self.enabled:
                return
            inputs = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.requires_grad]
            if inputs and torch.is_grad_enabled():
                inputs[0].register_hook(lambda grad: self._end_backward(part))
            self._begin = clock()

        def after(_: nn.Module, args: tuple, output: Any) -> None:
            if not self.enabled:
                return
            self.seconds[part] += clock() - self._begin
            tensor = output if isinstance(output, Tensor) else output[0]
            if tensor.requires_grad:
                tensor.register_hook(lambda grad: self._start_backward())

        module.register_forward_pre_hook(before, with_kwargs=True)
        module.register_forward_hook(after)

    def watch_method(self, part: str, owner: Any, name: str) -> None:
        """A method without a backward pass of its own."""
        method: Callable[..., Any] = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            if not self.enabled:
                return method(*args, **kwargs)
            begin = clock()
            result = method(*args, **kwargs)
            self.seconds[part] += clock() - begin
            return result

        setattr(owner, name, timed)

    def loss(self, loss: Tensor) -> None:
        """Backward starts from this tensor."""

        def start(grad: Tensor) -> None:
            self._since_loss = clock()

        if self.enabled:
            loss.register_hook(start)

    def _start_backward(self) -> None:
        now = clock()
        if self._since_loss is not None:
            self.seconds[FIRST_BACKWARD] += now - self._since_loss
            self._since_loss = None
        self._begin = now

    def _end_backward(self, part: str) -> None:
        self.seconds[part] += clock() - self._begin
