"""Names and shapes that the published code builds from a composite's config.json, written down from its modules.

It knows nothing of our tables and configs: the denoiser's channels come from `mm_inv_hidden_size`, its width from its
depth or from the test. `tests/golden/*.state_dict.txt`, which the published code has written, proves it right.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn

Shapes = dict[str, tuple[int, ...]]


def published_shapes(
    config: dict[str, Any], tower: dict[str, Any], vae: dict[str, Any], width: int | None = None
) -> Shapes:
    """All tensors of a composite, in no particular order.

    Args:
        config: its config.json.
        tower, vae: configs of the components that it names.
        width: of the denoiser, where it is not the published one of its depth.
    """
    shapes = _language(config)
    shapes |= {f"model.vision_tower.vision_tower.vision_model.{n}": s for n, s in _tower(tower).items()}
    hidden = config["hidden_size"]
    layers = re.fullmatch(r"mlp(\d)x_gelu", config["mm_projector_type"])
    assert layers is not None
    inputs = config["mm_hidden_size"]
    for layer in range(int(layers[1])):
        shapes |= _linear(f"model.mm_projector.{2 * layer}", hidden, inputs)
        inputs = hidden
    shapes |= {f"model.pixel_decoder.pixel_decoder.{n}": s for n, s in _vae(vae).items()}
    return shapes | {f"model.mm_inv_projector.net.{n}": s for n, s in _denoiser(config, width).items()}


class PublishedModule(nn.Module):
    """Parameters of given names and shapes, to load a state dict strictly into."""

    def __init__(self, shapes: Shapes, device: str = "cpu") -> None:
        super().__init__()
        for name, shape in shapes.items():
            *path, last = name.split(".")
            module: nn.Module = self
            for part in path:
                if part not in module._modules:
                    module.add_module(part, nn.Module())
                module = module.get_submodule(part)
            module.register_parameter(last, nn.Parameter(torch.empty(shape, device=device), requires_grad=False))


def _linear(name: str, outputs: int, inputs: int, bias: bool = True) -> Shapes:
    return {f"{name}.weight": (outputs, inputs)} | ({f"{name}.bias": (outputs,)} if bias else {})


def _norm(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def _conv(name: str, outputs: int, inputs: int, kernel: int) -> Shapes:
    return {f"{name}.weight": (outputs, inputs, kernel, kernel), f"{name}.bias": (outputs,)}


def _language(config: dict[str, Any]) -> Shapes:
    hidden, ffn, bias = config["hidden_size"], config["intermediate_size"], config["model_type"] == "ross_qwen2"
    keys = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    shapes: Shapes = {"model.embed_tokens.weight": (config["vocab_size"], hidden), "model.norm.weight": (hidden,)}
    for layer in (f"model.layers.{i}" for i in range(config["num_hidden_layers"])):
        for name, rows in (("q_proj", hidden), ("k_proj", keys), ("v_proj", keys)):
            shapes |= _linear(f"{layer}.self_attn.{name}", rows, hidden, bias)
        shapes |= _linear(f"{layer}.self_attn.o_proj", hidden, hidden, bias=False)
        for name in ("gate_proj", "up_proj"):
            shapes |= _linear(f"{layer}.mlp.{name}", ffn, hidden, bias=False)
        shapes |= _linear(f"{layer}.mlp.down_proj", hidden, ffn, bias=False)
        shapes |= {f"{layer}.{norm}.weight": (hidden,) for norm in ("input_layernorm", "post_attention_layernorm")}
    return shapes | {"lm_head.weight": (config["vocab_size"], hidden)}


def _tower(config: dict[str, Any]) -> Shapes:
    hidden, ffn, patch = config["hidden_size"], config["intermediate_size"], config["patch_size"]
    patches, is_clip = (config["image_size"] // patch) ** 2, config["model_type"] == "clip_vision_model"
    shapes: Shapes = {
        "embeddings.patch_embedding.weight": (hidden, 3, patch, patch),
        "embeddings.position_embedding.weight": (patches + is_clip, hidden),
    }
    if is_clip:
        shapes |= {"embeddings.class_embedding": (hidden,)} | _norm("pre_layrnorm", hidden)
    else:
        shapes |= {"embeddings.patch_embedding.bias": (hidden,), "head.probe": (1, 1, hidden)}
        shapes |= {"head.attention.in_proj_weight": (3 * hidden, hidden), "head.attention.in_proj_bias": (3 * hidden,)}
        shapes |= _linear("head.attention.out_proj", hidden, hidden) | _norm("head.layernorm", hidden)
        shapes |= _linear("head.mlp.fc1", ffn, hidden) | _linear("head.mlp.fc2", hidden, ffn)
    for layer in (f"encoder.layers.{i}" for i in range(config["num_hidden_layers"])):
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= _linear(f"{layer}.self_attn.{name}", hidden, hidden)
        shapes |= _linear(f"{layer}.mlp.fc1", ffn, hidden) | _linear(f"{layer}.mlp.fc2", hidden, ffn)
        shapes |= _norm(f"{layer}.layer_norm1", hidden) | _norm(f"{layer}.layer_norm2", hidden)
    return shapes | _norm("post_layernorm", hidden)


def _vae(config: dict[str, Any]) -> Shapes:
    widths, latents, depth = config["block_out_channels"], config["latent_channels"], config["layers_per_block"]
    shapes = _conv("encoder.conv_in", widths[0], 3, 3) | _conv("encoder.conv_out", 2 * latents, widths[-1], 3)
    shapes |= _conv("decoder.conv_in", widths[-1], latents, 3) | _conv("decoder.conv_out", 3, widths[0], 3)
    sides = (("encoder", "down", widths, depth, widths[0]), ("decoder", "up", widths[::-1], depth + 1, widths[-1]))
    for side, way, outputs, layers, inputs in sides:
        for block, width in enumerate(outputs):
            for layer in range(layers):
                shapes |= _resnet(f"{side}.{way}_blocks.{block}.resnets.{layer}", width, inputs)
                inputs = width
            if block < len(outputs) - 1:
                shapes |= _conv(f"{side}.{way}_blocks.{block}.{way}samplers.0.conv", width, width, 3)
        middle = f"{side}.mid_block"
        for layer in range(2):
            shapes |= _resnet(f"{middle}.resnets.{layer}", widths[-1], widths[-1])
        shapes |= _norm(f"{middle}.attentions.0.group_norm", widths[-1])
        for name in ("to_q", "to_k", "to_v", "to_out.0"):
            shapes |= _linear(f"{middle}.attentions.0.{name}", widths[-1], widths[-1])
        shapes |= _norm(f"{side}.conv_norm_out", outputs[-1])
    return shapes


def _resnet(name: str, outputs: int, inputs: int) -> Shapes:
    shapes = _norm(f"{name}.norm1", inputs) | _conv(f"{name}.conv1", outputs, inputs, 3)
    shapes |= _norm(f"{name}.norm2", outputs) | _conv(f"{name}.conv2", outputs, outputs, 3)
    return shapes | (_conv(f"{name}.conv_shortcut", outputs, inputs, 1) if outputs != inputs else {})


def _denoiser(config: dict[str, Any], width: int | None) -> Shapes:
    kind = re.fullmatch(r"denoiser_vit(\d+)x", config["mm_inv_projector_type"])
    assert kind is not None
    depth, channels = int(kind[1]), config["mm_inv_hidden_size"]
    width = width or {8: 1280, 12: 1536}.get(depth, 1024)
    shapes: Shapes = {"pos_embed": (1, config["image_embed_len"], width)} | _conv("x_embedder.proj", width, channels, 1)
    shapes |= _linear("t_embedder.mlp.0", width, 256) | _linear("t_embedder.mlp.2", width, width)
    shapes |= _linear("z_embedder.1", width, config["hidden_size"])
    for block in (f"blocks.{i}" for i in range(depth)):
        shapes |= _linear(f"{block}.attn.qkv", 3 * width, width) | _linear(f"{block}.attn.proj", width, width)
        shapes |= _linear(f"{block}.mlp.fc1", 4 * width, width) | _linear(f"{block}.mlp.fc2", width, 4 * width)
        shapes |= _linear(f"{block}.adaLN_modulation.1", 6 * width, width)
    shapes |= _linear("final_layer.linear", channels, width)
    return shapes | _linear("final_layer.adaLN_modulation.1", 2 * width, width)
