"""Whose AdamW runs inside Megatron's distributed optimizer.

Megatron takes the first of TransformerEngine, Apex and torch that can be imported, even where it cannot run (on a CPU),
and torch's without its fused kernel. Here the choice is the run's.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer

from megatron_ross.checkpoint.optimizer_state import distributed_optimizers
from megatron_ross.platform import current_device

_HYPERPARAMETERS = ("lr", "betas", "eps", "weight_decay")


def use_adam(optimizer: MegatronOptimizer, implementation: str) -> None:
    """Replace the inner optimizers, before any step, by those of `implementation`: transformer_engine, apex or torch.

    Parameters, groups and hyperparameters stay; only what the old class has added to the groups is left behind.
    """
    adam, options = _adam(implementation)
    for distributed in distributed_optimizers(optimizer):
        inner = distributed.optimizer
        assert not inner.state, "this optimizer has stepped"
        hyperparameters = {name: inner.defaults[name] for name in _HYPERPARAMETERS}
        # A constructor refuses Megatron's parameters, which are views of a buffer; so they come after it.
        replacement = adam([torch.zeros(1, device=current_device())], **hyperparameters, **options)
        left_behind = set(inner.defaults) - set(_HYPERPARAMETERS)
        replacement.param_groups = [
            replacement.defaults | {name: value for name, value in group.items() if name not in left_behind}
            for group in inner.param_groups
        ]
        distributed.optimizer = replacement


def _adam(implementation: str) -> tuple[Any, dict[str, Any]]:
    """The class, and its options beside the hyperparameters."""
    if implementation == "transformer_engine":
        from transformer_engine.pytorch.optimizers import FusedAdam

        return FusedAdam, {"adam_w_mode": True}
    if implementation == "apex":
        from apex.optimizers import FusedAdam as ApexAdam

        return ApexAdam, {"adam_w_mode": True}
    return torch.optim.AdamW, {"fused": True}
