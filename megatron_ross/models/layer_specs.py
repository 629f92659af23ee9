"""Decoder layer specifications: TransformerEngine where it is installed and a GPU is used, else local modules.

The local specification is Megatron's own with three replacements: norms that know sequence parallelism, an attention
core that runs packed sequences and uses PyTorch's fused attention, and linear layers whose frozen weights cost less.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_ross.platform import current_device


class RMSNorm(nn.Module):
    """RMS norm in fp32 over the last dimension, as in Llama and Qwen2.

    The weight is tagged `sequence_parallel`, so that Megatron sums its partial gradients over tensor-parallel ranks.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float, **kwargs) -> None:
        super().__init__()
        self.eps = eps
        device = current_device()
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=device))
        setattr(self.weight, "sequence_parallel", config.sequence_parallel)  # noqa: B010

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * normed.to(x.dtype)


class SdpaCoreAttention(nn.Module):
    """Causal attention through `scaled_dot_product_attention`; grouped queries; padded or packed sequences."""

    def __init__(self, config: TransformerConfig, softmax_scale: float | None = None, **kwargs) -> None:
        super().__init__()
        self.dropout = config.attention_dropout
        self.softmax_scale = softmax_scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type=None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """query [s, b, heads, d], key and value [s, b, groups, d] -> [s, b, heads*d]; packed: all without b."""
        if packed_seq_params is None:
            out = self._attend(*(x.permute(1, 2, 0, 3) for x in (query, key, value)))
            return out.permute(2, 0, 1, 3).flatten(2).contiguous()
        bounds = packed_seq_params.cu_seqlens_q.tolist()
        segments = [
            self._attend(*(x[start:end].transpose(0, 1)[None] for x in (query, key, value)))[0].transpose(0, 1)
            for start, end in itertools.pairwise(bounds)
        ]
        return torch.cat(segments).flatten(1)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """[b, heads, s, d] each; key and value may have fewer heads."""
        if query.device.type == "cpu":
            # The CPU's backward pass takes one thread per sequence and key head: a packed sample with one group, one.
            key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
        return F.scaled_dot_product_attention(
            query,
            key,
            value,
            is_causal=True,
            dropout_p=self.dropout if self.training else 0.0,
            scale=self.softmax_scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )


class _ContiguousGradient(torch.autograd.Function):
    """Identity; the gradient that goes on is contiguous."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad.contiguous()


class _FlatGradient:
    """Mixed into Megatron's linear layers, for frozen weights.

    Megatron multiplies the gradient [s, b, n] by a frozen weight as it comes. Where it is not contiguous, torch makes
    that a batched product, several times slower than one of two matrices: stage 1 would take longer than stage 2, whose
    gradients Megatron flattens.
    """

    weight: Tensor

    def forward(self, *args, **kwargs) -> tuple[Tensor, Tensor | None]:
        output, bias = super().forward(*args, **kwargs)  # type: ignore[misc]
        return output if self.weight.requires_grad else _ContiguousGradient.apply(output), bias


class FlatColumnParallelLinear(_FlatGradient, ColumnParallelLinear):
    """Megatron's, with a flat gradient."""


class FlatRowParallelLinear(_FlatGradient, RowParallelLinear):
    """Megatron's, with a flat gradient."""


def decoder_layer_spec(*, transformer_engine: bool, attention: str = "local") -> ModuleSpec:
    """Specification of one decoder layer; with `local` attention, TransformerEngine's layer runs PyTorch's."""
    if transformer_engine:
        spec = get_gpt_layer_with_transformer_engine_spec()
        if attention == "local":
            spec.submodules.self_attention.submodules.core_attention = SdpaCoreAttention
        return spec
    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    spec.submodules.input_layernorm = RMSNorm
    spec.submodules.pre_mlp_layernorm = RMSNorm
    self_attention, mlp = _submodules(spec.submodules.self_attention), _submodules(spec.submodules.mlp)
    self_attention.core_attention = SdpaCoreAttention
    self_attention.linear_qkv, self_attention.linear_proj = FlatColumnParallelLinear, FlatRowParallelLinear
    mlp.linear_fc1, mlp.linear_fc2 = FlatColumnParallelLinear, FlatRowParallelLinear
    return spec


def _submodules(spec: Any) -> Any:
    """The parts of a module's specification, which newer Megatron versions write as a partial call."""
    return spec.keywords["submodules"] if isinstance(spec, functools.partial) else spec.submodules


def final_norm(config: TransformerConfig, *, transformer_engine: bool) -> nn.Module:
    """The norm between the last decoder layer and the heads."""
    norm: type = RMSNorm
    if transformer_engine:
        from megatron.core.extensions.transformer_engine import TENorm

        norm = TENorm
    return norm(config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon)
