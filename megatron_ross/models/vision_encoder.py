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
from megatron_ross.models.vision import VisionTower
from megatron_ross.parallel.groups import ParallelGroups
from megatron_ross.parallel.shares import connect, gather_shares
from megatron_ross.platform import current_device


class VisionEncoder(nn.Module):
    """Vision tower and projector. Both are whole on every tensor-parallel rank; the images are shared out."""

    def __init__(self, model: RossModelConfig, config: TransformerConfig, groups: ParallelGroups) -> None:
        super().__init__()
        self.config = config
        self.groups = groups
        self.num_image_tokens = model.vision.num_image_tokens
        device = current_device()
        self.vision_tower = VisionTower(model.vision).to(device=device, dtype=config.params_dtype)
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
        if not share:
            device = current_device()
            shape = (0, self.num_image_tokens, self.config.hidden_size)
            return torch.zeros(shape, dtype=self.config.params_dtype, device=device) + connect(self)
        pixels = batch.pixels
        if pixels is None or pixels.shape[0] != len(share):
            raise RuntimeError(
                f"this rank needs the pixels of images {share.start}..{share.stop - 1} of its microbatch, "
                f"the loader gave {None if pixels is None else pixels.shape[0]}"
            )
        return self.projector(self.vision_tower(pixels.to(self.config.params_dtype)))

    def _place(self, embeddings: Tensor, batch: RossMicrobatch) -> Tensor:
        positions, exists = image_token_positions(batch, self.num_image_tokens)
        flat = embeddings.new_zeros((batch.tokens.numel(), self.config.hidden_size))
        flat = flat.index_copy(0, positions[exists], embeddings[exists])
        return flat.view(*batch.tokens.shape, -1).transpose(0, 1).contiguous()
