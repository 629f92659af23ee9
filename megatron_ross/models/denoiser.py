"""Denoiser that makes the LLM's outputs at image tokens predictive of the image: a small diffusion transformer (DiT).

It predicts the noise in a noised VAE latent, conditioned per token on the LLM's output at the same patch (Ross,
arXiv 2410.09575; DiT, arXiv 2212.09748). Parameter names are those of published checkpoints behind
`model.mm_inv_projector.net.`.

Shape legend: K noise draws per image, n images, g patches per side, N = g*g tokens, C4 channels of a grouped latent
(4 x VAE channels), h LLM width, D denoiser width.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_ross import ops
from megatron_ross.config.model import DenoiserConfig

CONDITION_NORM_EPS = 1e-5
BLOCK_NORM_EPS = 1e-6


def normalize_condition(hidden_states: Tensor) -> Tensor:
    """LayerNorm over the last dimension without affine parameters, eps 1e-5."""
    return F.layer_norm(hidden_states, hidden_states.shape[-1:], eps=CONDITION_NORM_EPS)


def to_tokens(latents: Tensor) -> Tensor:
    """[..., C, g, g] -> [..., g*g, C], row-major."""
    return latents.flatten(-2).transpose(-1, -2)


def to_grid(tokens: Tensor) -> Tensor:
    """Inverse of `to_tokens`: [..., N, C] -> [..., C, g, g] (contiguous)."""
    g = math.isqrt(tokens.shape[-2])
    return tokens.transpose(-1, -2).reshape(*tokens.shape[:-2], tokens.shape[-1], g, g)


def timestep_features(t: Tensor, num_features: int, max_period: float = 10000.0) -> Tensor:
    """Sinusoidal features of timesteps: cosines first, then sines, float32 [*t.shape, num_features]."""
    half = num_features // 2
    exponents = torch.arange(half, dtype=torch.float32, device=t.device) / half
    angles = t[..., None].float() * torch.exp(-math.log(max_period) * exponents)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def position_table(width: int, grid_size: int) -> Tensor:
    """Fixed 2-D sine-cosine table, float32 [1, g*g, D]: column index in the first half, row index in the second.

    Raises:
        ValueError: `width` is not a multiple of 4.
    """
    if width % 4:
        raise ValueError(f"denoiser width {width} must be a multiple of 4 (sine and cosine of row and column)")
    frequencies = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angles = torch.arange(grid_size, dtype=torch.float64)[:, None] * frequencies
    one_axis = torch.cat([angles.sin(), angles.cos()], dim=1)  # [g, D/2]
    columns = one_axis[None, :, :].expand(grid_size, -1, -1)
    rows = one_axis[:, None, :].expand(-1, grid_size, -1)
    return torch.cat([columns, rows], dim=-1).reshape(1, grid_size**2, width).float()


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm without affine parameters (eps 1e-6), then x * (1 + scale) + shift; all of one shape."""
    return ops.layernorm_modulate(x, shift, scale, BLOCK_NORM_EPS)


class Linear(nn.Linear):
    """nn.Linear that computes in its input's dtype whatever dtype its parameters are stored in."""

    bias: nn.Parameter

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))


class PatchEmbedding(nn.Module):
    """Linear map of every latent position, stored as the 1x1 convolution it is in published checkpoints."""

    def __init__(self, in_channels: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, width, kernel_size=1)

    def forward(self, tokens: Tensor) -> Tensor:
        """[..., N, C4] -> [..., N, D]."""
        weight, bias = self.proj.parameters()
        return F.linear(tokens, weight.flatten(1).to(tokens.dtype), bias.to(tokens.dtype))


class TimestepEmbedding(nn.Module):
    """Sinusoidal features and a two-layer MLP."""

    def __init__(self, num_features: int, width: int) -> None:
        super().__init__()
        self.num_features = num_features
        self.mlp = nn.Sequential(Linear(num_features, width), nn.SiLU(), Linear(width, width))

    def forward(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        """int64 [...] -> `dtype` [..., D]."""
        return self.mlp(timestep_features(t, self.num_features).to(dtype))


class Attention(nn.Module):
    """Full self-attention over the tokens of one image; `qkv` stacks q, k and v as three blocks of D rows."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = Linear(width, 3 * width)
        self.proj = Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[rows, N, D] -> [rows, N, D]."""
        rows, n_tokens, width = x.shape
        qkv = self.qkv(x).view(rows, n_tokens, 3, self.num_heads, width // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        out = F.scaled_dot_product_attention(q, k, v) if rows else v  # fused kernels may refuse an empty batch
        return self.proj(out.transpose(1, 2).reshape(rows, n_tokens, width))


class Mlp(nn.Module):
    """Two linears with tanh-approximated GELU between."""

    def __init__(self, width: int, hidden_width: int) -> None:
        super().__init__()
        self.fc1 = Linear(width, hidden_width)
        self.fc2 = Linear(hidden_width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Block(nn.Module):
    """DiT block whose modulation differs per token."""

    def __init__(self, config: DenoiserConfig) -> None:
        super().__init__()
        self.attn = Attention(config.width, config.num_heads)
        self.mlp = Mlp(config.width, int(config.width * config.mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), Linear(config.width, 6 * config.width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """x, c: [rows, N, D] -> [rows, N, D]."""
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c).chunk(6, dim=-1)
        x = ops.gated_residual(x, gate_attn, self.attn(modulate(x, shift_attn, scale_attn)))
        return ops.gated_residual(x, gate_mlp, self.mlp(modulate(x, shift_mlp, scale_mlp)))


class FinalLayer(nn.Module):
    """Modulated norm and the map back to latent channels."""

    def __init__(self, width: int, out_channels: int) -> None:
        super().__init__()
        self.linear = Linear(width, out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), Linear(width, 2 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """x, c: [rows, N, D] -> [rows, N, C4]."""
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=-1)
        return self.linear(modulate(x, shift, scale))


class RossDenoiser(nn.Module):
    """Predicts the noise of noised latents from the LLM's outputs at the image tokens.

    Parameters may be stored in any float dtype; everything is computed in `compute_dtype`.

    Args:
        config: depth, width, heads.
        in_channels: C4, channels of a grouped latent.
        hidden_size: h, width of the LLM.
        grid_size: g, patches per side.
        compute_dtype: dtype of all arithmetic; published training uses float32.

    Raises:
        ValueError: the width is not divisible by the number of heads or by 4.
    """

    def __init__(
        self,
        config: DenoiserConfig,
        in_channels: int,
        hidden_size: int,
        grid_size: int,
        compute_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        if config.width % config.num_heads:
            raise ValueError(
                f"denoiser width {config.width} is not divisible by its {config.num_heads} heads; change either"
            )
        self.config = config
        self.grid_size = grid_size
        self.compute_dtype = compute_dtype
        self.x_embedder = PatchEmbedding(in_channels, config.width)
        self.t_embedder = TimestepEmbedding(config.frequency_embedding_size, config.width)
        self.z_embedder = nn.Sequential(nn.SiLU(), Linear(hidden_size, config.width))
        self.pos_embed = nn.Parameter(position_table(config.width, grid_size), requires_grad=False)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.final_layer = FinalLayer(config.width, in_channels)

    def forward(self, x_t: Tensor, t: Tensor, condition: Tensor, *, token_major: bool = False) -> Tensor:
        """Predict the noise of K draws per image.

        Args:
            x_t: noised grouped latents [K, n, C4, g, g]; if `token_major`, [K, n, N, C4].
            t: timesteps, int64 [K, n].
            condition: the LLM's hidden states after its final norm at the image tokens [n, N, h].
            token_major: latents come in and go out as tokens, which is how they are computed.

        Returns:
            Predicted noise in `compute_dtype`, shaped like x_t. Works for n == 0 (all gradients are then zero).
        """
        with torch.autocast(x_t.device.type, enabled=False):
            predict = self.predict_tokens if token_major else self.predict_noise
            return predict(x_t, t, self.embed_condition(condition))

    def embed_condition(self, condition: Tensor) -> Tensor:
        """Hidden states [n, N, h] -> condition embedding [n, N, D], shared by all draws and timesteps of an image."""
        return self.z_embedder(normalize_condition(condition.to(self.compute_dtype)))

    def predict_noise(self, x_t: Tensor, t: Tensor, condition_embedding: Tensor) -> Tensor:
        """`forward` with the condition already embedded; leading dimensions [K, n] or, for one draw, [n].

        Args:
            x_t: [..., n, C4, g, g].
            t: int64 [..., n].
            condition_embedding: [n, N, D], from `embed_condition`.
        """
        return to_grid(self.predict_tokens(to_tokens(x_t), t, condition_embedding))

    def predict_tokens(self, x_t: Tensor, t: Tensor, condition_embedding: Tensor) -> Tensor:
        """`predict_noise` of token-major latents [..., n, N, C4]."""
        dtype = self.compute_dtype
        x = self.x_embedder(x_t.to(dtype)) + self.pos_embed.to(dtype)
        c = self.t_embedder(t, dtype)[..., None, :] + condition_embedding
        lead = x.shape[:-2]
        x, c = x.flatten(0, -3), c.flatten(0, -3)
        for block in self.blocks:
            x = block(x, c)
        return self.final_layer(x, c).unflatten(0, lead)

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Published initialisation.

        Xavier-uniform linears with zero biases; normal(0.02) for the time and condition embeddings; zero for everything
        that modulates and for the output, so that a fresh denoiser predicts zero.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.xavier_uniform_(module.weight.view(module.weight.shape[0], -1), generator=generator)
                module.bias.zero_()  # type: ignore[union-attr]  # all of them have one
        for embedding in (self.t_embedder.mlp, self.z_embedder):
            for module in embedding.modules():
                if isinstance(module, Linear):
                    nn.init.normal_(module.weight, std=0.02, generator=generator)
        for layer in (*self.blocks, self.final_layer):
            nn.init.zeros_(layer.adaLN_modulation[1].weight)
        nn.init.zeros_(self.final_layer.linear.weight)
        self.pos_embed.copy_(position_table(self.config.width, self.grid_size))
