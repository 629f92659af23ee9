"""Name table of the image auto-encoder: diffusers' AutoencoderKL as used by FLUX, encoder and decoder."""

from __future__ import annotations

from typing import Any

from megatron_ross.config.model import VaeConfig
from megatron_ross.convert.mapping import TensorMapping, direct


def vae_mappings(config: VaeConfig) -> list[TensorMapping]:
    """Every tensor of the auto-encoder, in the order of the diffusers state dict."""
    hf = config.hf_config
    rows = _Rows(hf)
    rows.encoder()
    rows.decoder()
    latents = hf["latent_channels"]
    if hf.get("use_quant_conv", True):
        rows.conv("quant_conv", 2 * latents, 2 * latents, kernel=1)
    if hf.get("use_post_quant_conv", True):
        rows.conv("post_quant_conv", latents, latents, kernel=1)
    return rows.mappings


class _Rows:
    """Collects table rows; an auto-encoder tensor has the same name on both sides."""

    def __init__(self, hf_config: dict[str, Any]) -> None:
        self.hf = hf_config
        self.widths: list[int] = list(hf_config["block_out_channels"])
        self.mappings: list[TensorMapping] = []

    def tensor(self, name: str, *shape: int) -> None:
        self.mappings.append(direct(f"vae.{name}", name, *shape))

    def affine(self, name: str, *weight_shape: int) -> None:
        self.tensor(f"{name}.weight", *weight_shape)
        self.tensor(f"{name}.bias", weight_shape[0])

    def conv(self, name: str, outputs: int, inputs: int, kernel: int = 3) -> None:
        self.affine(name, outputs, inputs, kernel, kernel)

    def resnet(self, name: str, outputs: int, inputs: int) -> None:
        self.affine(f"{name}.norm1", inputs)
        self.conv(f"{name}.conv1", outputs, inputs)
        self.affine(f"{name}.norm2", outputs)
        self.conv(f"{name}.conv2", outputs, outputs)
        if outputs != inputs:
            self.conv(f"{name}.conv_shortcut", outputs, inputs, kernel=1)

    def middle(self, name: str, width: int) -> None:
        if self.hf.get("mid_block_add_attention", True):
            attention = f"{name}.attentions.0"
            self.affine(f"{attention}.group_norm", width)
            for projection in ("to_q", "to_k", "to_v", "to_out.0"):
                self.affine(f"{attention}.{projection}", width, width)
        for index in range(2):
            self.resnet(f"{name}.resnets.{index}", width, width)

    def encoder(self) -> None:
        widths = self.widths
        self.conv("encoder.conv_in", widths[0], self.hf["in_channels"])
        inputs = widths[0]
        for block, outputs in enumerate(widths):
            for index in range(self.hf["layers_per_block"]):
                self.resnet(f"encoder.down_blocks.{block}.resnets.{index}", outputs, inputs)
                inputs = outputs
            if block < len(widths) - 1:
                self.conv(f"encoder.down_blocks.{block}.downsamplers.0.conv", outputs, outputs)
        self.middle("encoder.mid_block", widths[-1])
        self.affine("encoder.conv_norm_out", widths[-1])
        self.conv("encoder.conv_out", 2 * self.hf["latent_channels"], widths[-1])

    def decoder(self) -> None:
        widths = self.widths[::-1]
        self.conv("decoder.conv_in", widths[0], self.hf["latent_channels"])
        inputs = widths[0]
        for block, outputs in enumerate(widths):
            for index in range(self.hf["layers_per_block"] + 1):
                self.resnet(f"decoder.up_blocks.{block}.resnets.{index}", outputs, inputs)
                inputs = outputs
            if block < len(widths) - 1:
                self.conv(f"decoder.up_blocks.{block}.upsamplers.0.conv", outputs, outputs)
        self.middle("decoder.mid_block", widths[0])
        self.affine("decoder.conv_norm_out", widths[-1])
        self.conv("decoder.conv_out", self.hf["out_channels"], widths[-1])
