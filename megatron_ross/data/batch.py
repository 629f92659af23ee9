"""The unit that moves from the data engine to the pipeline: one microbatch.

Shape legend: b sequences per microbatch, s tokens per sequence, n images in the microbatch, P image side in pixels,
K denoiser draws per image.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class ImageSpan:
    """Where one image's tokens lie in a sample's expanded token sequence, and how to get its pixels."""

    start: int  # index of the first image token
    index: int  # 0-based number of the image within its sample
    load_pixels: Callable[[], Tensor]  # -> float32 [3, P, P], normalised as the vision tower wants it
    reconstruct: bool = True  # False: the image is seen by the language model but not reconstructed
    read_bytes: Callable[[], bytes] | None = None  # the undecoded file, for decoders that do more than one at a time
    name: str = ""  # record and file, for messages
    stamp: Callable[[], str] | None = None  # the state of the file, found without reading it: see `Source.image_stamp`


@dataclass(frozen=True)
class RossSample:
    """One training sample, tokenised, images expanded to spans of `num_image_tokens` x IMAGE_TOKEN_ID.

    `input_ids` and `labels` are int64 [s] at the same positions (labels are NOT shifted); ignored labels are -100.
    """

    sample_id: int  # index in the data set: the key of all randomness that belongs to the sample
    input_ids: Tensor
    labels: Tensor
    images: tuple[ImageSpan, ...] = ()
    mismatch: bool = False  # tokenisation mismatch: every label is masked, as published
    lacks_images: bool = False  # its text says <image>, but the record brings none
    num_images_cut: int = 0  # images that `max_length` left no room for; the sequence ends before the first of them


@dataclass
class NoiseDraws:
    """Explicit random draws for parity tests; normally they are derived from `noise_keys`.

    t: int64 [K, n]; eps: float32 [K, n, 4*C, n_grid, n_grid]; posterior: float32 [n, C, 2*n_grid, 2*n_grid].
    """

    t: Tensor
    eps: Tensor
    posterior: Tensor


@dataclass
class RossMicrobatch:
    """What every pipeline stage of a data-parallel replica sees of one microbatch.

    Images are ordered as they appear: by sequence, then by position. Only the ranks that need pixels get them:
    `pixels` holds this rank's tensor-parallel share (see `parallel/shares.py`), or is None. `latents` holds the same
    share's VAE posterior moments (mean, log variance) where they come from a cache; zeros for images of weight 0.

    With `reference_dummy_images` a text-only sample adds one dummy image (all-zero pixels) at its place in the order:
    it counts in n, `pixels`, `noise_keys` and has weight 1, but recon_start is -1 and `image_mask` has no place for it.
    """

    tokens: Tensor  # int64 [b, s]; 0 at image positions and padding
    labels: Tensor  # int64 [b, s]; already shifted: labels[:, i] is the target of position i; -100 = ignored
    position_ids: Tensor  # int64 [b, s]
    image_mask: Tensor  # bool [b, s]; True where an image embedding goes
    num_images: int  # n
    recon_start: Tensor  # int64 [n]; flat position (row * s + first token) of image i; -1 = a dummy image
    recon_weight: Tensor  # float32 [n]; 1 = reconstruct this image, 0 = leave it out (e.g. truncated)
    noise_keys: Tensor  # int64 [n, 3]: epoch, sample id, image index
    sample_ids: list[int]
    pixels: Tensor | None = None  # float32 [n_share, 3, P, P]
    latents: Tensor | None = None  # float16 [n_share, 2, C, 2 * n_grid, 2 * n_grid]
    draws: NoiseDraws | None = None
    cu_seqlens: Tensor | None = None  # int32 [num_samples + 1] when samples are packed (b == 1)
    max_seqlen: int | None = None
    lengths: list[int] = field(default_factory=list)  # tokens of each sample, without padding
    sample_spans: Tensor | None = None  # int64 [2, num_samples]: flat position of each sample's first token, sample id
    num_supervised_tokens: int = field(init=False)

    def __post_init__(self) -> None:
        self.num_supervised_tokens = int((self.labels >= 0).sum())

    def to(self, device: torch.device) -> RossMicrobatch:
        """Move every tensor to `device`, in place; returns self."""
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(self, name, value.to(device, non_blocking=True))
        if self.draws is not None:
            self.draws = NoiseDraws(*(getattr(self.draws, f).to(device) for f in ("t", "eps", "posterior")))
        return self


def samples_at(batch: RossMicrobatch, positions: Tensor) -> Tensor:
    """Sample ids int64 [n] at flat positions int64 [n] that lie in a sample, not in padding."""
    assert batch.sample_spans is not None, "a microbatch from `collate` has them"
    starts, ids = batch.sample_spans
    return ids[torch.searchsorted(starts, positions, right=True) - 1]


def image_token_positions(batch: RossMicrobatch, num_image_tokens: int) -> tuple[Tensor, Tensor]:
    """Where every image's tokens lie: flat positions (row * s + token) int64 [n, N], and which exist, bool [n, N].

    Tokens cut off by truncation do not exist, nor do those of a text-only sample's dummy image.
    """
    start = batch.recon_start[:, None]
    positions = start + torch.arange(num_image_tokens, device=start.device)
    row_length = batch.tokens.shape[1]
    end = (start // row_length + 1) * row_length
    if batch.cu_seqlens is not None:
        bounds = batch.cu_seqlens.to(torch.int64)
        segment = torch.searchsorted(bounds, start.clamp_min(0).contiguous(), right=True)
        end = bounds[segment.clamp_max(bounds.numel() - 1)]
    inside = (start >= 0) & (positions < end)
    is_image = batch.image_mask.flatten()[positions.clamp(0, batch.tokens.numel() - 1)]
    return positions, inside & is_image
