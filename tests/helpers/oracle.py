"""What Ross computes, once more: one process, float64, plain PyTorch and transformers modules, no code of the stages.

Reads a composite checkpoint in the published format. Every sample runs alone and unpadded; gradients come from autograd
under the checkpoint's own names. Only the random draws are ours, keyed by the sample.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.func import functional_call
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from megatron_ross import ops
from megatron_ross.config.model import RossModelConfig
from megatron_ross.data.batch import NoiseDraws, RossSample

TOWER = "model.vision_tower.vision_tower.vision_model."
PROJECTOR = "model.mm_projector."
DENOISER = "model.mm_inv_projector.net."
VAE = "model.pixel_decoder.pixel_decoder."
_SUFFIXES_OF_LANGUAGE = ("model.embed_tokens.", "model.layers.", "model.norm.", "lm_head.")
_LANGUAGE_MODELS = {"qwen2": (Qwen2Config, Qwen2ForCausalLM), "llama": (LlamaConfig, LlamaForCausalLM)}
_TOWERS = {
    "siglip_vision_model": (SiglipVisionConfig, SiglipVisionModel),
    "clip_vision_model": (CLIPVisionConfig, CLIPVisionModel),
}


@dataclass(frozen=True)
class OracleResult:
    """Losses of the global batch, weighted as in training, and the gradient of their sum by checkpoint name."""

    lm_loss: float
    recon_loss: float
    gradients: dict[str, Tensor]


class Oracle:
    """A model in float64.

    Args:
        composite: folder with config.json and model.safetensors.
        model: the same model's configuration; gives the parts' own configurations.
    """

    def __init__(self, composite: Path, model: RossModelConfig) -> None:
        self.model = model
        tensors = load_file(composite / "model.safetensors")
        self.weights = {name: t.double().requires_grad_() for name, t in tensors.items()}
        config = json.loads((composite / "config.json").read_text())
        config_class, model_class = _LANGUAGE_MODELS[model.language.family]
        fields = {k: v for k, v in config.items() if k not in ("model_type", "architectures", "torch_dtype")}
        self.language = model_class(config_class.from_dict(fields)).double()
        config_class, tower_class = _TOWERS[model.vision.model_type]
        self.tower = tower_class(config_class.from_dict(dict(model.vision.hf_config))).double()
        if model.vae is not None:
            self.vae = AutoencoderKL.from_config(dict(model.vae.hf_config)).double().eval()
            self.vae.load_state_dict({k.removeprefix(VAE): v for k, v in self.weights.items() if k.startswith(VAE)})

    def run(
        self,
        samples: list[RossSample],
        *,
        seed: int,
        num_draws: int = 4,
        lm_loss_weight: float = 1.0,
        recon_loss_weight: float = 1.0,
        epoch: int = 0,
        draws: NoiseDraws | None = None,
        objective: str = "denoise",
    ) -> OracleResult:
        """Default mode: one mean over all supervised tokens, one over all reconstructed images.

        `draws` replaces the keyed draws; its images are counted through the whole batch.
        """
        lm_sums, recon_sums, num_tokens = [], [], 0
        for sample in samples:
            hidden = self._hidden(sample)
            targets = sample.labels[1:]
            logits = hidden[:-1] @ self._head().T
            lm_sums.append(F.cross_entropy(logits[targets >= 0], targets[targets >= 0], reduction="sum"))
            num_tokens += int((targets >= 0).sum())
            for span in sample.images if self.model.denoiser is not None else ():
                if not span.reconstruct:
                    continue
                condition = hidden[span.start : span.start + self.model.vision.num_image_tokens]
                if objective == "regress":
                    recon_sums.append(self._regression(span.load_pixels().double(), condition))
                    continue
                if draws is None:
                    drawn = self._draws(seed, (epoch, sample.sample_id, span.index), num_draws)
                else:
                    i = len(recon_sums)
                    drawn = NoiseDraws(draws.t[:, i], draws.eps[:, i], draws.posterior[i])
                recon_sums.append(self._reconstruction(span.load_pixels().double(), condition, drawn))
        zero = torch.zeros((), dtype=torch.float64)
        lm = lm_loss_weight * sum(lm_sums, start=zero) / max(1, num_tokens)
        recon = recon_loss_weight * sum(recon_sums, start=zero) / max(1, len(recon_sums))
        names, leaves = zip(*self.weights.items(), strict=True)
        found = torch.autograd.grad(lm + recon, leaves, allow_unused=True)
        gradients = {name: g for name, g in zip(names, found, strict=True) if g is not None}
        return OracleResult(lm.item(), recon.item(), gradients)

    def _head(self) -> Tensor:
        return self.weights.get("lm_head.weight", self.weights["model.embed_tokens.weight"])

    def _hidden(self, sample: RossSample) -> Tensor:
        """[s, h] after the final norm."""
        embedded = F.embedding(sample.input_ids.clamp_min(0), self.weights["model.embed_tokens.weight"])
        pieces, done = [], 0
        for span in sample.images:
            image = self._project(self._features(span.load_pixels().double()))
            pieces += [embedded[done : span.start], image[: len(embedded) - span.start]]
            done = min(len(embedded), span.start + len(image))
        inputs = torch.cat([*pieces, embedded[done:]])
        weights = {
            name.removeprefix("model."): t
            for name, t in self.weights.items()
            if name.startswith(_SUFFIXES_OF_LANGUAGE) and not name.startswith("lm_head.")
        }
        return functional_call(self.language.model, weights, (), {"inputs_embeds": inputs[None]}).last_hidden_state[0]

    def _features(self, pixels: Tensor) -> Tensor:
        """[N, d]: the selected hidden state of one image, without class token."""
        weights = {n: self.weights[TOWER + n.removeprefix("vision_model.")] for n, _ in self.tower.named_parameters()}
        arguments = {"pixel_values": pixels[None], "output_hidden_states": True}
        states = functional_call(self.tower, weights, (), arguments).hidden_states
        selected = states[self.model.vision.select_layer][0]
        return selected[1:] if self.model.vision.model_type == "clip_vision_model" else selected

    def _project(self, x: Tensor) -> Tensor:
        names = sorted(n for n in self.weights if n.startswith(PROJECTOR) and n.endswith("weight"))
        for i, name in enumerate(names):
            x = F.gelu(x) if i else x
            x = x @ self.weights[name].T + self.weights[name.replace("weight", "bias")]
        return x

    def _draws(self, seed: int, key: tuple[int, int, int], num_draws: int) -> NoiseDraws:
        """t [K], eps [K, C4, g, g], posterior [C, 2g, 2g] of one image."""
        drawn = ops.draw_noise(
            seed,
            torch.tensor([key]),
            num_draws=num_draws,
            num_timesteps=1000,
            latent_channels=self.model.vae.latent_channels,
            grid_size=self.model.vision.grid_size,
        )
        return NoiseDraws(drawn.t[:, 0], drawn.eps[:, 0], drawn.posterior[0])

    def _reconstruction(self, pixels: Tensor, hidden: Tensor, draws: NoiseDraws) -> Tensor:
        """Mean squared noise error of one image over its draws."""
        target = self._latents(pixels, draws.posterior.double())
        eps = draws.eps.double()
        alphas = _cosine_alphas_cumprod()[draws.t][:, None, None, None]
        noised = alphas.sqrt() * target + (1 - alphas).sqrt() * eps
        condition = F.layer_norm(hidden, hidden.shape[-1:], eps=1e-5)
        return (self._denoise(noised, draws.t, condition) - eps).square().mean()

    def _regression(self, pixels: Tensor, hidden: Tensor) -> Tensor:
        """Mean squared error of one image's latents, which the network gives without having seen any."""
        config = self.vae.config
        target = self._latents(pixels, torch.zeros(config.latent_channels, 1, 1, dtype=torch.float64))
        condition = F.layer_norm(hidden, hidden.shape[-1:], eps=1e-5)
        given = self._denoise(torch.zeros_like(target)[None], torch.zeros(1, dtype=torch.int64), condition)
        return (given[0] - target).square().mean()

    @torch.no_grad()
    def _latents(self, pixels: Tensor, noise: Tensor) -> Tensor:
        """[C4, g, g]"""
        vision = self.model.vision
        mean, std = (torch.tensor(v, dtype=torch.float64)[:, None, None] for v in (vision.image_mean, vision.image_std))
        signed = ((pixels * std + mean) * 2 - 1).clamp(-1, 1)
        side = 16 * (vision.image_size // vision.patch_size)
        posterior = self.vae.encode(F.interpolate(signed[None], (side, side), mode="bilinear")).latent_dist
        z = posterior.mean[0] + torch.exp(posterior.logvar[0] / 2) * noise
        config = self.vae.config
        return F.pixel_unshuffle((z - config.shift_factor) * config.scaling_factor, 2)

    def _linear(self, x: Tensor, name: str) -> Tensor:
        weight = self.weights[f"{DENOISER}{name}.weight"]
        return x @ weight.flatten(1).T + self.weights[f"{DENOISER}{name}.bias"]

    def _denoise(self, noised: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """[K, C4, g, g], [K], [N, h] -> predicted noise [K, C4, g, g]."""
        grid = noised.shape[-1]
        x = self._linear(noised.flatten(2).transpose(1, 2), "x_embedder.proj") + self.weights[DENOISER + "pos_embed"]
        frequencies = 10000.0 ** (-torch.arange(128, dtype=torch.float64) / 128)
        angles = t[:, None].double() * frequencies
        time = self._linear(torch.cat([angles.cos(), angles.sin()], 1), "t_embedder.mlp.0")
        time = self._linear(F.silu(time), "t_embedder.mlp.2")
        c = F.silu(time[:, None] + self._linear(F.silu(condition), "z_embedder.1"))
        for block in range(self.model.denoiser.depth):
            x = self._block(x, c, f"blocks.{block}.")
        shift, scale = self._linear(c, "final_layer.adaLN_modulation.1").chunk(2, -1)
        out = self._linear(_modulated(x, shift, scale), "final_layer.linear")
        return out.transpose(1, 2).unflatten(2, (grid, grid))

    def _block(self, x: Tensor, activated: Tensor, name: str) -> Tensor:
        modulation = self._linear(activated, name + "adaLN_modulation.1").chunk(6, -1)
        qkv = self._linear(_modulated(x, *modulation[:2]), name + "attn.qkv")
        q, k, v = (p.unflatten(-1, (self.model.denoiser.num_heads, -1)).transpose(1, 2) for p in qkv.chunk(3, -1))
        weights = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1)
        x = x + modulation[2] * self._linear((weights @ v).transpose(1, 2).flatten(2), name + "attn.proj")
        inner = F.gelu(self._linear(_modulated(x, *modulation[3:5]), name + "mlp.fc1"), approximate="tanh")
        return x + modulation[5] * self._linear(inner, name + "mlp.fc2")


def _modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return nn.functional.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


def _cosine_alphas_cumprod(num_steps: int = 1000) -> Tensor:
    def bar(s: float) -> float:
        return math.cos((s + 0.008) / 1.008 * math.pi / 2) ** 2

    betas = [min(1 - bar((i + 1) / num_steps) / bar(i / num_steps), 0.999) for i in range(num_steps)]
    return torch.cumprod(1 - torch.tensor(betas, dtype=torch.float64), 0)
