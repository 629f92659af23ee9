"""Letter V: pixels to image embeddings at their places in the sequence; tensor-parallel ranks share out the images."""

from __future__ import annotations

import torch
from megatron.core.tensor_parallel.mappings import scatter_to_sequence_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_ross.config.model import RossModelConfig
from megatron_ross.data.batch import RossMicrobatch, image_token_positions
from megatron_ross.data.collate import image_share
from megatron_ross.models.projector import build_projector
from megatron_ross.models.vision import empty_tower
from megatron_ross.parallel.groups import ParallelGroups
from megatron_ross.parallel.shares import gather_shares
from megatron_ross.platform import current_device
from megatron_ross.precision import DTYPES, in_tf32


class VisionEncoder(nn.Module):
    """Vision tower and projector. Both are whole on every tensor-parallel rank; the images are shared out.

    `tower_dtype` is the tower's storage and arithmetic: fp32, tf32, bf16; None is the decoder's.
    """

    def __init__(
        self,
        model: RossModelConfig,
        config: TransformerConfig,
        groups: ParallelGroups,
        *,
        tower_dtype: str | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.groups = groups
        self.image_size = model.vision.image_size
        self.tower_dtype = config.params_dtype if tower_dtype is None else DTYPES[tower_dtype]
        self.allow_tf32 = tower_dtype == "tf32"
        self.num_image_tokens = model.vision.num_image_tokens
        device = current_device()
        self.vision_tower = empty_tower(model.vision).to(device=device, dtype=self.tower_dtype)
        self.projector = build_projector(model.projector, model.vision.hidden_size, model.language.hidden_size)
        self.projector.to(device=device, dtype=config.params_dtype)

    def forward(self, batch: RossMicrobatch) -> Tensor:
        """Embeddings of the images at their places, zeros elsewhere: [s, b, h], or this rank's shard of it."""
        embeddings = self._embed_share(batch)
        embeddings = gather_shares(embeddings, batch.num_images, self.groups.tp)
        hidden = self._place(embeddings, batch)
        if self.config.sequence_parallel:
            hidden = scatter_to_sequence_parallel_region(hidden, group=self.groups.tp)
        return hidden

    def _embed_share(self, batch: RossMicrobatch) -> Tensor:
        """[n_share, N, h] for this rank's images."""
        share = image_share(batch.num_images, self.groups.tp.rank(), self.groups.tp.size())
        pixels = batch.pixels
        if not share:
            # Run on no image: the graph is that of other ranks, so their gradients become ready in the same order.
            pixels = torch.zeros(0, 3, self.image_size, self.image_size, device=batch.tokens.device)
        if pixels is None or pixels.shape[0] != len(share):
            raise RuntimeError(
                f"this rank needs the pixels of images {share.start}..{share.stop - 1} of its microbatch, "
                f"the loader gave {None if pixels is None else pixels.shape[0]}"
            )
        pixels = pixels.to(self.tower_dtype)
        features = in_tf32(self.vision_tower, pixels) if self.allow_tf32 else self.vision_tower(pixels)
        return self.projector(features.to(self.config.params_dtype))

    def _place(self, embeddings: Tensor, batch: RossMicrobatch) -> Tensor:
        positions, exists = image_token_positions(batch, self.num_image_tokens)
        flat = embeddings.new_zeros((batch.tokens.numel(), self.config.hidden_size))
        flat = flat.index_copy(0, positions[exists], embeddings[exists])
        return flat.view(*batch.tokens.shape, -1).transpose(0, 1).contiguous()
