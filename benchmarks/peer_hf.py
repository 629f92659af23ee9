"""The same recipe with Hugging Face modules and plain PyTorch, as one would write it without this project.

Qwen2ForCausalLM, SiglipVisionModel and AutoencoderKL as they come, scaled-dot-product attention, fused AdamW. Samples
are padded on the right to the longest of their batch, and a batch holds one modality, as in the published sampler.
Padding on the right needs no attention mask: causal attention never looks at it, which lets the fast kernel run. What
the published code does, this does: the whole tower runs, logits of all positions exist, every noise draw embeds its own
copy of the condition, the VAE encodes online.

Shape legend: b samples, s tokens, n images, K draws, g patches per side, N = g*g, C latent channels, C4 = 4 C.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from peer_denoiser import PlainDenoiser
from step_timeline import Timeline
from torch import Tensor, nn
from torch.func import functional_call
from transformers import Qwen2Config, Qwen2ForCausalLM, SiglipVisionConfig, SiglipVisionModel

from megatron_ross import ops
from megatron_ross.config.model import IGNORE_LABEL, IMAGE_TOKEN_ID, LanguageModelConfig, RossModelConfig
from megatron_ross.data.batch import NoiseDraws, RossSample
from megatron_ross.models.diffusion import cosine_tables


@dataclass
class PeerBatch:
    """Padded samples of one modality."""

    input_ids: Tensor  # int64 [b, s]; 0 at images and padding
    labels: Tensor  # int64 [b, s], not shifted
    pixels: Tensor | None  # float32 [n, 3, P, P]; one image per sample, or none at all
    image_start: int  # of every sample's image
    draws: NoiseDraws | None

    def to(self, device: torch.device) -> PeerBatch:
        """Move every tensor, in place; returns self."""
        self.input_ids, self.labels = self.input_ids.to(device), self.labels.to(device)
        if self.pixels is not None and self.draws is not None:
            self.pixels = self.pixels.to(device)
            self.draws = NoiseDraws(*(x.to(device) for x in (self.draws.t, self.draws.eps, self.draws.posterior)))
        return self


class HfRoss(nn.Module):
    """Ross from Hugging Face parts. Trains the adapters in stage 1, and the language model, too, in stage 2."""

    def __init__(self, config: RossModelConfig, stage: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        assert config.denoiser is not None
        assert config.vae is not None
        self.config, self.dtype = config, dtype
        width, hidden = config.vision.hidden_size, config.language.hidden_size
        with device, _default_dtype(dtype):
            self.llm = Qwen2ForCausalLM(_qwen2_config(config.language))
            self.tower = SiglipVisionModel(SiglipVisionConfig.from_dict(config.vision.hf_config))
            self.projector = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, hidden))
            self.denoiser = PlainDenoiser(
                depth=config.denoiser.depth,
                width=config.denoiser.width,
                heads=config.denoiser.num_heads,
                mlp_ratio=config.denoiser.mlp_ratio,
                num_features=config.denoiser.frequency_embedding_size,
                channels=4 * config.vae.latent_channels,
                hidden_size=hidden,
                grid=config.vision.grid_size,
            )
        with device:
            self.vae = AutoencoderKL.from_config(config.vae.hf_config)
        self.to(device)  # modules of diffusers ignore the default device
        self.tables = cosine_tables().to(device)
        self.requires_grad_(True)
        for frozen in (self.tower, self.vae, *([self.llm] if stage == 1 else [])):
            frozen.requires_grad_(False)
        self.denoiser.pos_embed.requires_grad_(stage == 1)
        self.tower.eval()
        self.vae.eval()

    def forward(self, batch: PeerBatch, num_labels: int, num_images: int) -> tuple[Tensor, Tensor]:
        """Shares of the step's language and reconstruction loss, with its number of labels and images."""
        hidden = self.llm.model(inputs_embeds=self.embed(batch)).last_hidden_state
        recon = hidden.new_zeros((), dtype=torch.float32)
        if batch.pixels is not None:
            end = batch.image_start + self.config.vision.num_image_tokens
            recon = self.recon_loss(hidden[:, batch.image_start : end], batch) / num_images
        return self.lm_loss(hidden, batch, num_labels), recon

    def embed(self, batch: PeerBatch) -> Tensor:
        """Token embeddings with the projected image features in their places, [b, s, h]."""
        embeds = self.llm.model.embed_tokens(batch.input_ids)
        if batch.pixels is None:
            return embeds
        with torch.no_grad():
            states = self.tower(batch.pixels.to(self.dtype), output_hidden_states=True).hidden_states
        images = self.projector(states[self.config.vision.select_layer])
        start = batch.image_start
        return torch.cat([embeds[:, :start], images, embeds[:, start + images.shape[1] :]], dim=1)

    def lm_loss(self, hidden: Tensor, batch: PeerBatch, num_labels: int) -> Tensor:
        """Hugging Face's own loss on the logits of all positions."""
        logits = self.llm.lm_head(hidden)
        return self.llm.loss_function(
            logits=logits,
            labels=batch.labels,
            vocab_size=self.config.language.vocab_size,
            num_items_in_batch=torch.tensor(num_labels, device=logits.device),
        )

    def recon_loss(self, condition: Tensor, batch: PeerBatch) -> Tensor:
        """Sum over images of the mean squared noise error; condition [n, N, h]."""
        assert batch.draws is not None
        num_draws, z = batch.draws.t.shape[0], self.latents(batch)
        t, eps = batch.draws.t.flatten(), batch.draws.eps.flatten(0, 1)
        signal = self.tables.sqrt_alphas_cumprod.float()[t][:, None, None, None]
        sigma = self.tables.sqrt_one_minus_alphas_cumprod.float()[t][:, None, None, None]
        x_t = signal * z.repeat(num_draws, 1, 1, 1) + sigma * eps
        # As published: stored like the rest of the model, and computed in fp32.
        weights = {name: p.float() for name, p in self.denoiser.named_parameters()}
        predicted = functional_call(self.denoiser, weights, (x_t, t, condition.float().repeat(num_draws, 1, 1)))
        return F.mse_loss(predicted, eps) * z.shape[0]

    @torch.no_grad()
    def latents(self, batch: PeerBatch) -> Tensor:
        """Pixels to grouped latents [n, C4, g, g]."""
        assert batch.draws is not None
        assert batch.pixels is not None
        vision, vae = self.config.vision, self.config.vae
        assert vae is not None
        mean, std = (
            torch.tensor(v, device=batch.pixels.device)[:, None, None] for v in (vision.image_mean, vision.image_std)
        )
        images = ((batch.pixels * std + mean) * 2 - 1).clamp(-1, 1)
        images = F.interpolate(images, size=(16 * vision.grid_size,) * 2, mode="bilinear")
        posterior = self.vae.encode(images).latent_dist
        z = posterior.mean + posterior.std * batch.draws.posterior
        return F.pixel_unshuffle((z - vae.shift_factor) * vae.scaling_factor, 2)

    def watch(self, timeline: Timeline) -> None:
        """Time the parts of the step."""
        timeline.watch("tower", self.tower)
        timeline.watch("projector", self.projector)
        timeline.watch("decoder", self.llm.model)
        timeline.watch("denoiser", self.denoiser)
        timeline.watch_method("vae", self, "latents")
        timeline.watch_method("head", self, "lm_loss")

    def published_tensors(self) -> dict[str, Tensor]:
        """Weights by their names in published composite checkpoints."""
        parts = {
            "model.vision_tower.vision_tower.vision_model.": getattr(self.tower, "vision_model", self.tower),
            "model.mm_projector.": self.projector,
            "model.mm_inv_projector.net.": self.denoiser,
            "model.pixel_decoder.pixel_decoder.": self.vae,
            "": self.llm,
        }
        return {prefix + name: t for prefix, part in parts.items() for name, t in part.state_dict().items()}


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """New parameters have this dtype: 7B of them would not fit in fp32 first."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _qwen2_config(language: LanguageModelConfig) -> Qwen2Config:
    return Qwen2Config(
        vocab_size=language.vocab_size,
        hidden_size=language.hidden_size,
        intermediate_size=language.ffn_hidden_size,
        num_hidden_layers=language.num_layers,
        num_attention_heads=language.num_attention_heads,
        num_key_value_heads=language.num_query_groups,
        head_dim=language.kv_channels,
        max_position_embeddings=language.max_position_embeddings,
        rms_norm_eps=language.layernorm_epsilon,
        rope_parameters={"rope_type": "default", "rope_theta": language.rotary_base},
        tie_word_embeddings=language.share_embeddings_and_output_weights,
        use_cache=False,
        attn_implementation="sdpa",
    )


def make_batches(
    samples: Sequence[tuple[int, RossSample]],
    config: RossModelConfig,
    max_size: int,
    seed: int,
    num_draws: int,
    device: torch.device,
) -> list[PeerBatch]:
    """Padded batches of up to `max_size` samples, those with and without an image apart; (epoch, sample) come in."""
    groups = ([p for p in samples if p[1].images], [p for p in samples if not p[1].images])
    return [
        _make_batch(group[i : i + max_size], config, seed, num_draws).to(device)
        for group in groups
        for i in range(0, len(group), max_size)
    ]


def _make_batch(
    samples: Sequence[tuple[int, RossSample]], config: RossModelConfig, seed: int, num_draws: int
) -> PeerBatch:
    pad = nn.utils.rnn.pad_sequence
    ids = pad([sample.input_ids for _, sample in samples], batch_first=True)
    labels = pad([sample.labels for _, sample in samples], batch_first=True, padding_value=IGNORE_LABEL)
    batch = PeerBatch(ids.masked_fill(ids == IMAGE_TOKEN_ID, 0), labels, None, 0, None)
    if samples[0][1].images:
        spans = [sample.images[0] for _, sample in samples]
        assert len({span.start for span in spans}) == 1, "the plain splice wants images at one place"
        assert config.vae is not None
        batch.image_start = spans[0].start
        batch.pixels = torch.stack([span.load_pixels() for span in spans])
        # The very numbers that our step draws, so that losses can be compared; drawing them is not timed here.
        batch.draws = ops.draw_noise(
            seed,
            torch.tensor([(epoch, sample.sample_id, 0) for epoch, sample in samples]),
            num_draws=num_draws,
            num_timesteps=1000,
            latent_channels=config.vae.latent_channels,
            grid_size=config.vision.grid_size,
        )
    return batch
