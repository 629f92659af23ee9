"""The LLM's `TransformerConfig`: from our model and run settings to Megatron's fields."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_ross.config.layout import StageLayout
from megatron_ross.config.model import LanguageModelConfig
from megatron_ross.config.schema import ComputeConfig, ParallelConfig


def padded_vocab_size(vocab_size: int, tensor_model_parallel_size: int) -> int:
    """Rows of the embedding so that every tensor-parallel rank holds as many; export cuts the padding off again."""
    return -(-vocab_size // tensor_model_parallel_size) * tensor_model_parallel_size


def transformer_config(
    model: LanguageModelConfig,
    parallel: ParallelConfig,
    compute: ComputeConfig,
    layout: StageLayout,
    *,
    transformer_engine: bool = False,
    attention_backend: str = "local",
) -> TransformerConfig:
    """Megatron's configuration of the decoder and of the pipeline schedule; the last two arguments as in `Features`."""
    dtype = torch.bfloat16 if compute.bf16 else torch.float32
    interleaved = layout.virtual_pipeline_model_parallel_size is not None
    overlap = interleaved if parallel.overlap_p2p_comm is None else parallel.overlap_p2p_comm
    return TransformerConfig(
        **_architecture(model),
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=layout.virtual_pipeline_model_parallel_size,
        pipeline_model_parallel_layout=layout.megatron_layout(),
        sequence_parallel=parallel.sequence_parallel and parallel.tensor_model_parallel_size > 1,
        overlap_p2p_comm=overlap,
        batch_p2p_comm=(not overlap) if parallel.batch_p2p_comm is None else parallel.batch_p2p_comm,
        # Losses are normalised by global counts before backward: Megatron must not divide them again.
        calculate_per_token_loss=True,
        bf16=compute.bf16,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        # Overlapped sends may still be reading an output when Megatron frees it.
        deallocate_pipeline_outputs=not overlap,
        recompute_granularity=compute.recompute_granularity,
        recompute_method=compute.recompute_method,
        recompute_num_layers=compute.recompute_num_layers,
        recompute_modules=compute.recompute_modules,
        tp_comm_overlap=parallel.tp_comm_overlap,
        gradient_accumulation_fusion=compute.gradient_accumulation_fusion,
        attention_backend=AttnBackend[attention_backend],
        **_fp8(compute),
        # Fusions compiled at run time pay off on GPU only.
        bias_activation_fusion=torch.cuda.is_available(),
        bias_dropout_fusion=torch.cuda.is_available(),
        apply_rope_fusion=transformer_engine,  # its kernel, which knows packed sequences
    )


def _fp8(compute: ComputeConfig) -> dict[str, Any]:
    """Megatron's fields of the same names, as they are."""
    names = (
        "fp8",
        "fp8_recipe",
        "fp8_margin",
        "fp8_amax_history_len",
        "fp8_amax_compute_algo",
        "fp8_wgrad",
        "first_last_layers_bf16",
        "num_layers_at_start_in_bf16",
        "num_layers_at_end_in_bf16",
    )
    return {name: getattr(compute, name) for name in names}


def _architecture(model: LanguageModelConfig) -> dict[str, Any]:
    return {
        "num_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "ffn_hidden_size": model.ffn_hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "num_query_groups": model.num_query_groups,
        "kv_channels": model.kv_channels,
        "normalization": "RMSNorm",
        "layernorm_epsilon": model.layernorm_epsilon,
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "add_bias_linear": False,
        "add_qkv_bias": model.add_qkv_bias,
        "init_method_std": model.init_method_std,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
    }


def rotary_embedding(model: LanguageModelConfig) -> RotaryEmbedding:
    """Rotary position embedding of the whole head; llama-3 scaling where the model has it.

    Raises:
        ValueError: a scaling Megatron does not know.
    """
    scaling = model.rope_scaling or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in ("default", "llama3", "linear"):
        raise ValueError(f"rope_scaling={kind!r} is not supported; use a model with default, linear or llama3 scaling")
    return RotaryEmbedding(
        kv_channels=model.kv_channels,
        rotary_percent=1.0,
        seq_len_interpolation_factor=scaling.get("factor") if kind == "linear" else None,
        rotary_base=model.rotary_base,
        rope_scaling=kind == "llama3",
        rope_scaling_factor=scaling.get("factor", 8.0),
    )
