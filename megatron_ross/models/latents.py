"""Reconstruction target: frozen VAE latents of the image, and the way back from latents to pixels.

The VAE sees the very pixels the vision tower saw, un-normalised and resized to two latent cells per patch. Latents are
shifted, scaled, and each 2x2 window is folded into channels, so that one grouped latent position belongs to one patch.

Shape legend: n images, P tower input side, g patches per side, C VAE latent channels, S = 16 g VAE input side.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn

from megatron_ross.config.model import VaeConfig, VisionConfig


def group_latents(z: Tensor) -> Tensor:
    """[n, C, 2g, 2g] -> [n, 4C, g, g]; channel c*4 + row*2 + column of a 2x2 window."""
    n, channels, height, width = z.shape
    windows = z.reshape(n, channels, height // 2, 2, width // 2, 2)  # F.pixel_unshuffle, but n may be 0
    return windows.permute(0, 1, 3, 5, 2, 4).reshape(n, channels * 4, height // 2, width // 2)


def ungroup_latents(z: Tensor) -> Tensor:
    """Inverse of `group_latents`."""
    return F.pixel_shuffle(z, 2)


class LatentEncoder(nn.Module):
    """A complete, frozen diffusers AutoencoderKL (`vae`) with the image and latent conventions of Ross.

    Args:
        config: the auto-encoder.
        vision: the tower whose normalised pixels come in; gives mean, standard deviation and grid size.
    """

    def __init__(self, config: VaeConfig, vision: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.image_size, self.grid_size = vision.image_size, vision.grid_size
        self.vae = AutoencoderKL.from_config(dict(config.hf_config)).requires_grad_(False).eval()
        self.image_mean = vision.image_mean  # plain numbers: a buffer would lose precision when the module is cast
        self.image_std = vision.image_std

    @torch.no_grad()
    def vae_input(self, pixels: Tensor) -> Tensor:
        """Normalised pixels [n, 3, P, P] -> float32 [n, 3, S, S] in [-1, 1]."""
        mean, std = torch.tensor([self.image_mean, self.image_std], device=pixels.device)[..., None, None]
        unit = pixels.float() * std + mean
        signed = (unit * 2 - 1).clamp(-1, 1)
        return F.interpolate(signed, size=(16 * self.grid_size,) * 2, mode="bilinear", align_corners=False)

    @torch.no_grad()
    def posterior(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Posterior of normalised pixels [n, 3, P, P]: mean and clamped log variance, float32 [n, C, 2g, 2g] each.

        n may be 0.
        """
        images = self.vae_input(pixels)
        if images.shape[0] == 0:
            empty = images.new_zeros(0, self.config.latent_channels, 2 * self.grid_size, 2 * self.grid_size)
            return empty, empty.clone()
        parts = [self.vae.encode(part.to(self.vae.dtype)).latent_dist for part in images.split(_images_at_once(images))]
        return torch.cat([part.mean.float() for part in parts]), torch.cat([part.logvar.float() for part in parts])

    @torch.no_grad()
    def sample(self, mean: Tensor, logvar: Tensor, noise: Tensor) -> Tensor:
        """Draw from the posterior and bring it to diffusion space.

        Args:
            mean, logvar: posterior moments [n, C, 2g, 2g].
            noise: standard normal, same shape.

        Returns:
            Grouped latents, float32 [n, 4C, g, g].
        """
        z = mean + torch.exp(0.5 * logvar) * noise
        return group_latents((z - self.config.shift_factor) * self.config.scaling_factor)

    def forward(self, pixels: Tensor, noise: Tensor) -> Tensor:
        """Pixels [n, 3, P, P] and posterior noise [n, C, 2g, 2g] -> diffusion target, float32 [n, 4C, g, g]."""
        return self.sample(*self.posterior(pixels), noise)

    @torch.no_grad()
    def decode_latents(self, z: Tensor) -> Tensor:
        """Grouped latents [n, 4C, g, g] -> images, float32 [n, 3, S, S], about [-1, 1] (not clamped)."""
        latents = ungroup_latents(z) / self.config.scaling_factor + self.config.shift_factor
        return self.vae.decode(latents.to(self.vae.dtype)).sample.float()

    @torch.no_grad()
    def round_trip(self, pixels: Tensor) -> Tensor:
        """Encode to the posterior mean and decode: normalised pixels [n, 3, P, P] -> [n, 3, S, S], about [-1, 1]."""
        mean, logvar = self.posterior(pixels)
        return self.decode_latents(self.sample(mean, logvar, torch.zeros_like(mean)))


def _images_at_once(images: Tensor) -> int:
    """On a CPU one image after the other: its tensors stay in the caches, and their memory is used again."""
    return 1 if images.device.type == "cpu" else images.shape[0]
