"""Name table of the language model: Qwen2, Qwen2.5, Llama-2, Llama-3, Vicuna (Hugging Face names of `*ForCausalLM`)."""

from __future__ import annotations

from megatron_ross.config.model import LanguageModelConfig
from megatron_ross.convert.mapping import GroupedQkv, Part, Stacked, TensorMapping, direct

IGNORED_BUFFERS = (r"(.*\.)?rotary_emb\.inv_freq",)
"""Computed tables that old checkpoints store; they are recomputed, never read."""


def language_mappings(config: LanguageModelConfig) -> list[TensorMapping]:
    """Embedding, decoder layers and final norm, in the order of the Hugging Face state dict; not the LM head."""
    hidden = config.hidden_size
    rows: list[TensorMapping] = [
        direct("embedding.word_embeddings.weight", "model.embed_tokens.weight", config.vocab_size, hidden)
    ]
    for index in range(config.num_layers):
        rows += _layer_mappings(config, f"decoder.layers.{index}.", f"model.layers.{index}.")
    rows.append(direct("final_layernorm.weight", "model.norm.weight", hidden))
    return rows


def head_mappings(config: LanguageModelConfig) -> list[TensorMapping]:
    """The LM head; empty when it shares the embedding's weight."""
    if config.share_embeddings_and_output_weights:
        return []
    return [direct("output_layer.weight", "lm_head.weight", config.vocab_size, config.hidden_size)]


def _layer_mappings(config: LanguageModelConfig, key: str, name: str) -> list[TensorMapping]:
    hidden, ffn = config.hidden_size, config.ffn_hidden_size
    q_rows = config.num_attention_heads * config.kv_channels
    kv_rows = config.num_query_groups * config.kv_channels
    projections = {"q_proj": q_rows, "k_proj": kv_rows, "v_proj": kv_rows}

    def qkv(kind: str, *columns: int) -> TensorMapping:
        parts = tuple(Part(f"{name}self_attn.{p}.{kind}", (rows, *columns)) for p, rows in projections.items())
        return GroupedQkv(f"{key}self_attention.linear_qkv.{kind}", parts, config.num_query_groups)

    gate_up = tuple(Part(f"{name}mlp.{p}.weight", (ffn, hidden)) for p in ("gate_proj", "up_proj"))
    return [
        qkv("weight", hidden),
        *([qkv("bias")] if config.add_qkv_bias else []),
        direct(f"{key}self_attention.linear_proj.weight", f"{name}self_attn.o_proj.weight", hidden, q_rows),
        Stacked(f"{key}mlp.linear_fc1.weight", gate_up),
        direct(f"{key}mlp.linear_fc2.weight", f"{name}mlp.down_proj.weight", hidden, ffn),
        direct(f"{key}self_attention.linear_qkv.layer_norm_weight", f"{name}input_layernorm.weight", hidden),
        direct(f"{key}mlp.linear_fc1.layer_norm_weight", f"{name}post_attention_layernorm.weight", hidden),
    ]
