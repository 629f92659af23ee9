"""A small AutoencoderKL with FLUX's structure that can paint the quickstart's pictures, saved as diffusers saves it.

Training an auto-encoder from noise takes hours. Here the encoder is written down instead of trained: with its residual
branches at zero it is a chain of linear maps of 2x2 blocks, and those are set to principal components, so that the
latent of an 8x8 block is its 16 strongest components. The decoder is then trained on these latents for a minute.
Structure as in FLUX.1: four levels, 8x down, 16 latent channels, no quant convolutions, the same scaling and shift.

    python examples/quickstart/toy_vae.py --data DIR --output DIR
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from jsonargparse import auto_cli
from torch import Tensor, nn
from toy_images import VAE_SIZE, load_training_images, vae_input
from tqdm import trange

LATENT_CHANNELS = 16
SCALING_FACTOR, SHIFT_FACTOR = 0.3611, 0.1159  # FLUX.1's: diffusion sees (latent - shift) * scaling
POSTERIOR_STD = 0.1  # in diffusion space
CONSTANT = 20.0  # see `_write_output`
CROP = 64  # the decoder is trained on crops: it is convolutional
IMAGES_FOR_COMPONENTS = 500
BAR_ROW = 2  # of the progress bar: make_components.py shows three at once


def build_vae() -> AutoencoderKL:
    """FLUX's auto-encoder, narrow. Residual branches start at zero, paths around them at the identity."""
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 16, 32, 64),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=2,
        sample_size=VAE_SIZE,
        scaling_factor=SCALING_FACTOR,
        shift_factor=SHIFT_FACTOR,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    for name, module in vae.named_modules():
        if name.endswith(("conv2", "to_out.0")):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
        elif name.endswith(("conv_shortcut", "upsamplers.0.conv", "encoder.conv_in", "decoder.conv_in")):
            nn.init.dirac_(module.weight)
            nn.init.zeros_(module.bias)
    return vae


def _components(x: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Principal components of vectors [n, d]: mean [d], orthonormal directions [count, d], strongest first.

    With fewer dimensions than `count` the rest is zero.
    """
    mean = x.mean(0)
    _, vectors = torch.linalg.eigh((x - mean).double().T @ (x - mean).double() / len(x))
    kept = min(count, x.shape[1])
    directions = torch.zeros(count, x.shape[1])
    directions[:kept] = vectors.flip(1).T[:kept].float()
    # The sign of an eigenvector is a library's choice: make its largest entry positive.
    largest = directions.gather(1, directions.abs().argmax(1, keepdim=True))
    return mean, torch.where(largest < 0, -directions, directions)


@torch.no_grad()
def write_encoder(vae: AutoencoderKL, images: Tensor) -> None:
    """Set the encoder to principal components of 2x2, 4x4 and 8x8 blocks of `images` [n, 3, S, S]."""
    encoder = vae.encoder
    features = images
    for level in range(3):
        conv = encoder.down_blocks[level].downsamplers[0].conv
        used = features.shape[1]
        blocks = F.unfold(features, 2, stride=2).transpose(1, 2).flatten(0, 1)  # vectors (channel, row, column)
        count = LATENT_CHANNELS if level == 2 else conv.out_channels
        mean, directions = _components(blocks, count)
        conv.weight.zero_()
        conv.bias.zero_()
        # diffusers pads on the right and below only, so the first two rows and columns of the kernel are the 2x2 block
        conv.weight[:count, :used, :2, :2] = directions.unflatten(1, (used, 2, 2))
        conv.bias[:count] = -directions @ mean
        features = F.conv2d(F.pad(features, (0, 1, 0, 1)), conv.weight[:count, :used], conv.bias[:count], stride=2)
    _write_output(vae, features)


def _write_output(vae: AutoencoderKL, latents: Tensor) -> None:
    """Carry the components through the group norm and SiLU in front of the encoder's last convolution, unchanged.

    A group norm divides by the picture's own deviation. Channels with a large constant, +CONSTANT and -CONSTANT, make
    that nearly the same for all pictures. SiLU is undone by silu(u) - silu(-u) = u. So each run of 8 channels holds two
    components, their negatives, and four constants; every group consists of whole runs.
    """
    encoder = vae.encoder
    shortcut = encoder.down_blocks[3].resnets[0].conv_shortcut
    shortcut.weight.zero_()
    positive = torch.tensor([8 * (i // 2) + i % 2 for i in range(LATENT_CHANNELS)])
    channels = torch.arange(LATENT_CHANNELS)
    shortcut.weight[positive, channels] = 1.0
    shortcut.weight[positive + 2, channels] = -1.0
    shortcut.bias.copy_(CONSTANT * torch.tensor([0.0, 0.0, 0.0, 0.0, 1.0, -1.0, 1.0, -1.0]).repeat(8))
    group_deviation = (CONSTANT**2 / 2 + latents.square().mean() / 2).sqrt()
    gain = group_deviation / (SCALING_FACTOR * latents.std())
    out = encoder.conv_out
    out.weight.zero_()
    out.weight[channels, positive, 1, 1] = gain
    out.weight[channels, positive + 2, 1, 1] = -gain
    out.bias[:LATENT_CHANNELS] = SHIFT_FACTOR
    out.bias[LATENT_CHANNELS:] = 2 * torch.log(torch.tensor(POSTERIOR_STD / SCALING_FACTOR))


def train_decoder(vae: AutoencoderKL, pixels: Tensor, steps: int, batch: int, lr: float) -> float:
    """Teach the decoder to paint crops from their latents; returns the last loss.

    Args:
        pixels: uint8 [n, 3, P, P].
    """
    vae.encoder.requires_grad_(False)
    vae.to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(vae.decoder.parameters(), lr=lr, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, lr, total_steps=steps, pct_start=0.05, cycle_momentum=False
    )
    progress = trange(steps, desc="auto-encoder", unit="step", position=BAR_ROW)
    for _ in progress:
        images = vae_input(pixels[torch.randint(len(pixels), (batch,))])
        row, column = (8 * int(i) for i in torch.randint((VAE_SIZE - CROP) // 8 + 1, (2,)))
        images = images[:, :, row : row + CROP, column : column + CROP].contiguous(memory_format=torch.channels_last)
        with torch.no_grad():
            latents = vae.encode(images).latent_dist.sample()
        error = vae.decode(latents).sample - images
        loss = error.square().mean() + 0.5 * error.abs().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(vae.decoder.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        progress.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
    return loss.item()


@torch.no_grad()
def round_trip_psnr(vae: AutoencoderKL, images: Tensor) -> float:
    """Mean PSNR in dB of decode(encode(images)), images in [-1, 1]."""
    painted = vae.decode(vae.encode(images).latent_dist.mean).sample.clamp(-1, 1)
    return float((-10 * torch.log10(((painted - images) / 2).square().mean((1, 2, 3)))).mean())


def make_vae(data: Path, output: Path, seed: int = 0, steps: int = 800, batch: int = 4, lr: float = 3e-3) -> str:
    """Make the auto-encoder for the images of `make_data.py`.

    Args:
        data: folder that make_data.py wrote.
        output: folder for `save_pretrained`.
        seed: of the initial weights and batches.

    Returns:
        A line that says what was made.
    """
    torch.set_num_threads(1)  # the three components are made at the same time
    torch.manual_seed(seed)
    pixels, _ = load_training_images(data)
    vae = build_vae()
    write_encoder(vae, vae_input(pixels[:IMAGES_FOR_COMPONENTS]))
    train_decoder(vae, pixels, steps, batch, lr)
    psnr = round_trip_psnr(vae, vae_input(pixels[-32:]))
    vae.to(memory_format=torch.contiguous_format).save_pretrained(output)
    parameters = sum(p.numel() for p in vae.parameters())
    return f"auto-encoder: {parameters:,} parameters, round trip {psnr:.1f} dB"


if __name__ == "__main__":
    print(auto_cli(make_vae, as_positional=False))
