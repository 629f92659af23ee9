"""Letter D: the reconstruction loss. LLM outputs at the image tokens condition a denoiser of the image's VAE latents.

Each tensor-parallel rank handles its share of the images with a whole denoiser and VAE; the returned sum is that
share's part, and the ranks' parts add up to the microbatch's loss.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_ross import ops
from megatron_ross.config.model import RossModelConfig
from megatron_ross.data.batch import NoiseDraws, RossMicrobatch, image_token_positions
from megatron_ross.data.collate import image_share
from megatron_ross.losses import recon_loss_sum
from megatron_ross.models.denoiser import RossDenoiser, to_grid, to_tokens
from megatron_ross.models.diffusion import cosine_tables, respace, sample
from megatron_ross.models.latents import LatentEncoder, group_latents
from megatron_ross.models.loss_breakdown import LossBreakdown
from megatron_ross.parallel.groups import ParallelGroups
from megatron_ross.platform import current_device
from megatron_ross.precision import DTYPES, in_tf32


class ReconstructionHead(nn.Module):
    """Denoiser and VAE target.

    Args:
        model, config, groups: architecture, Megatron's configuration, process groups.
        seed: run seed of the noise; with a sample's key it determines every draw.
        num_draws: K (timestep, noise) draws per image.
        objective: `denoise`: the denoiser finds the noise in noised latents; `regress`: it gives the latents themselves
            (the posterior's mean) from the condition alone, in one pass at timestep 0 with zeros for an input.
        compute_dtype: `fp32` (published), `tf32` or `bf16` arithmetic in the denoiser.
        cached_latents: microbatches bring VAE moments, so there is no VAE here.
    """

    def __init__(
        self,
        model: RossModelConfig,
        config: TransformerConfig,
        groups: ParallelGroups,
        *,
        seed: int,
        num_draws: int,
        objective: str = "denoise",
        compute_dtype: str = "fp32",
        cached_latents: bool = False,
    ) -> None:
        super().__init__()
        assert model.denoiser is not None
        assert model.vae is not None
        self.model = model
        self.vae_config = model.vae
        self.groups = groups
        self.seed = seed
        self.num_draws = num_draws
        self.objective = objective
        self.allow_tf32 = compute_dtype == "tf32"
        device = current_device()
        self.denoiser = RossDenoiser(
            model.denoiser,
            in_channels=4 * model.vae.latent_channels,
            hidden_size=model.language.hidden_size,
            grid_size=model.vision.grid_size,
            compute_dtype=DTYPES[compute_dtype],
        ).to(device=device, dtype=config.params_dtype)
        self.latent_encoder = None if cached_latents else LatentEncoder(model.vae, model.vision).to(device=device)
        tables = cosine_tables().to(device)
        self.schedule = ops.NoiseSchedule(
            tables.sqrt_alphas_cumprod.float(), tables.sqrt_one_minus_alphas_cumprod.float()
        )

    def forward(
        self, hidden: Tensor, batch: RossMicrobatch, breakdown: LossBreakdown | None = None, *, skip: bool = False
    ) -> Tensor:
        """Sum over this rank's images of their mean squared error, of the noise or of the latents; fp32 scalar.

        Args:
            hidden: hidden states after the final norm [s, b, h], from `to_heads`.
            breakdown: gets the errors of single draws.
            skip: the loss has no weight, so no image is worth the work.
        """
        mine = image_share(batch.num_images, self.groups.tp.rank(), self.groups.tp.size())
        wanted = (batch.recon_weight[mine.start : mine.stop] > 0).nonzero().squeeze(1)
        if skip:
            wanted = wanted[:0]
        share = mine.start + wanted
        if wanted.numel() == 0:
            return self._no_loss(hidden, batch, share)
        condition = self._condition(hidden, batch, share)
        score = self._latent_error if self.objective == "regress" else self._noise_error
        squared_error, count, t = score(condition, batch, share, *self._posterior(batch, wanted))
        if breakdown is not None:
            breakdown.add_recon(squared_error, count, t, batch, share, self.schedule.signal.numel())
        return recon_loss_sum(squared_error, count, batch.recon_weight[share])

    def _noise_error(
        self, condition: Tensor, batch: RossMicrobatch, share: Tensor, mean: Tensor, logvar: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Squared errors of predicted noise, float32 [K, n_share], how many elements are in each, and timesteps."""
        noise = self._noise(batch, share)
        x_t, t = self._noised(mean, logvar, noise)
        return *ops.score(self._denoise(x_t, t, condition), noise), t

    def _latent_error(
        self, condition: Tensor, batch: RossMicrobatch, share: Tensor, mean: Tensor, logvar: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Squared errors of predicted latents, float32 [1, n_share], how many elements are in each, and timesteps 0."""
        vae = self.vae_config
        target = to_tokens(group_latents((mean - vae.shift_factor) * vae.scaling_factor))
        x_t, t = self._no_input(share.numel(), condition)
        error = self._denoise(x_t, t, condition).float().squeeze(0) - target
        squared_error = error.square().sum(dim=(1, 2))[None]
        return squared_error, torch.full_like(squared_error, target[0].numel(), dtype=torch.int64), t

    def image_conditions(self, hidden: Tensor, batch: RossMicrobatch) -> Tensor:
        """What all images of a microbatch give the denoiser: hidden states [s, b, h] -> [n, N, h]."""
        return self._condition(hidden, batch, torch.arange(batch.num_images, device=hidden.device))

    @torch.no_grad()
    def sample_latents(
        self, condition: Tensor, respacing: str, seeds: Sequence[int], denoiser: RossDenoiser | None = None
    ) -> Tensor:
        """Images painted from nothing but their conditions [n, N, h]: grouped latents, float32 [n, C4, g, g].

        Args:
            respacing: sampling steps, see `diffusion.respaced_timesteps`; `regress` takes one pass and no noise.
            seeds: of each image's noise.
            denoiser: a copy to sample with, beside training; without effect on `regress`.
        """
        if self.objective == "regress":
            x_t, t = self._no_input(condition.shape[0], condition)
            return to_grid(self._denoise(x_t, t, condition).float().squeeze(0))
        side = self.model.vision.grid_size
        shape = (4 * self.vae_config.latent_channels, side, side)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]

        def noise(_: int = 0) -> Tensor:
            return torch.stack([torch.randn(shape, generator=g) for g in generators]).to(condition.device)

        denoiser = denoiser or self.denoiser
        embedded = denoiser.embed_condition(condition)
        tables = respace(cosine_tables(), respacing).to(condition.device)
        return sample(lambda x, t: denoiser.predict_noise(x, t, embedded), noise(), noise, tables)

    def _posterior(self, batch: RossMicrobatch, wanted: Tensor) -> tuple[Tensor, Tensor]:
        """Moments [n_wanted, C, 2g, 2g] of images of this rank's share, encoded here or read from a cache."""
        if self.latent_encoder is None:
            assert batch.latents is not None
            mean, logvar = batch.latents[wanted].unbind(1)
            return mean.contiguous(), logvar.contiguous()
        assert batch.pixels is not None
        return self.latent_encoder.posterior(batch.pixels[wanted])

    def _noised(self, mean: Tensor, logvar: Tensor, noise: ops.Noise) -> tuple[Tensor, Tensor]:
        """Posterior moments -> noised latents [K, n_share, N, C4] and timesteps [K, n_share]."""
        vae = self.vae_config
        return ops.noise_latents(
            mean,
            logvar,
            noise,
            self.schedule,
            shift=vae.shift_factor,
            scaling=vae.scaling_factor,
            dtype=self.denoiser.compute_dtype,
        )

    def _no_loss(self, hidden: Tensor, batch: RossMicrobatch, nothing: Tensor) -> Tensor:
        """Zero, from a denoiser that runs on no image.

        Its autograd graph is that of other ranks: gradients become ready in the same order, so that reductions which
        overlap the backward pass (`overlap_grad_reduce`) meet those of ranks with images.
        """
        condition = self._condition(hidden, batch, nothing)
        return self._denoise(*self._no_input(0, condition), condition).float().sum()

    def _no_input(self, num_images: int, condition: Tensor) -> tuple[Tensor, Tensor]:
        """Zeros for latents and timesteps of one pass: [1, n, N, C4], [1, n]."""
        shape = (1, num_images, self.model.vision.num_image_tokens, 4 * self.vae_config.latent_channels)
        x_t = condition.new_zeros(shape, dtype=self.denoiser.compute_dtype)
        return x_t, torch.zeros((1, num_images), dtype=torch.int64, device=condition.device)

    def _denoise(self, x_t: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        def predict(condition: Tensor) -> Tensor:
            return self.denoiser(x_t, t, condition, token_major=True)

        return in_tf32(predict, condition) if self.allow_tf32 else predict(condition)

    def _condition(self, hidden: Tensor, batch: RossMicrobatch, share: Tensor) -> Tensor:
        """Hidden states at the tokens of the images `share`, [n_share, N, h]; zeros for dummy images."""
        rows = hidden.transpose(0, 1).flatten(0, 1)
        positions, exists = image_token_positions(batch, self.model.vision.num_image_tokens)
        positions, exists = positions[share], exists[share]
        return rows[positions.clamp(0, rows.shape[0] - 1)] * exists[..., None]

    def _noise(self, batch: RossMicrobatch, share: Tensor) -> ops.Noise:
        if batch.draws is not None:
            given = batch.draws
            return ops.explicit_noise(NoiseDraws(given.t[:, share], given.eps[:, share], given.posterior[share]))
        return ops.image_noise(
            self.seed,
            batch.noise_keys[share],
            num_draws=self.num_draws,
            num_timesteps=self.schedule.signal.numel(),
            latent_channels=self.vae_config.latent_channels,
            grid_size=self.model.vision.grid_size,
        )
