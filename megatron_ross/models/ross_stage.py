"""`RossStage`: what one pipeline stage computes, composed from the letters of the layout.

    V  pixels -> tower -> projector -> image embeddings at their places
    E  token embeddings, with image embeddings spliced in
    t  decoder layers         N  final norm
    D  reconstruction loss    H  language-model loss

All tensors between stages are [s, b, h] ([s/tp, b, h] under sequence parallelism). The last stage returns its loss; a
head on an earlier stage attaches its loss to the hidden states it passes on.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from megatron.core.enums import ModelType
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import make_viewless_tensor
from torch import Tensor

from megatron_ross.config.layout import StageSpec
from megatron_ross.config.model import RossModelConfig
from megatron_ross.config.schema import LossConfig
from megatron_ross.data.batch import RossMicrobatch
from megatron_ross.losses import LossScales
from megatron_ross.models.language import padded_vocab_size, rotary_embedding
from megatron_ross.models.layer_specs import decoder_layer_spec, final_norm
from megatron_ross.models.lm_head import VocabularyShard, lm_head_loss_sum
from megatron_ross.models.loss_breakdown import LossBreakdown
from megatron_ross.models.reconstruction import ReconstructionHead
from megatron_ross.models.vision_encoder import VisionEncoder
from megatron_ross.parallel.attached_loss import attach_loss
from megatron_ross.parallel.grad_sync import mark_shared_work
from megatron_ross.parallel.groups import ParallelGroups
from megatron_ross.parallel.param_gather import WaitFor, nothing_to_wait_for
from megatron_ross.parallel.shares import to_heads
from megatron_ross.platform import current_device

ReadHeads = Callable[["RossStage", Tensor, RossMicrobatch], None]
"""Gets a stage with heads, the hidden states [s, b, h] that they see, and the microbatch."""


class StepLosses:
    """Losses of the microbatches this rank has seen since the last `take()`; stay on the device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._values: dict[str, list[Tensor]] = {"lm": [], "recon": []}
        self._taken: dict[str, list[Tensor]] = {}

    def add(self, *, lm: Tensor | None = None, recon: Tensor | None = None) -> None:
        """Add scaled losses, so that the run's total is their sum over microbatches and ranks."""
        for name, value in (("lm", lm), ("recon", recon)):
            if value is not None:
                self._values[name].append(value.detach().double())

    def take(self) -> Tensor:
        """float64 [2]: summed lm and recon loss; resets."""
        self._taken, self._values = self._values, {name: [] for name in self._values}
        zero = torch.zeros((), dtype=torch.float64, device=self._device)
        return torch.stack([sum(values, start=zero) for values in self._taken.values()])

    def nonfinite(self) -> list[tuple[str, int]]:
        """Which losses of which microbatches, of those that `take()` summed up last, are NaN or Inf."""
        return [
            (name, i)
            for name, values in self._taken.items()
            for i, value in enumerate(values)
            if not torch.isfinite(value)
        ]


class RossStage(MegatronModule):
    """One virtual chunk of one pipeline rank.

    Args:
        model: the whole model's architecture.
        spec: what this stage holds.
        config: Megatron's transformer configuration of the run.
        groups: this rank's process groups.
        transformer_engine: build decoder layers from TransformerEngine.
        is_last: this stage returns the loss.
        loss: seed, draws and objective of the reconstruction loss, and whether there is a language loss.
        denoiser_dtype, cached_latents: see `ReconstructionHead`.
        vision_tower_dtype: see `VisionEncoder`.
        lm_head_chunk_tokens: most positions whose logits exist at the same time, see `lm_head_loss_sum`.
    """

    breakdown: LossBreakdown | None = None  # set while someone looks at single losses
    on_heads: ReadHeads | None = None  # called instead of computing losses

    def __init__(
        self,
        model: RossModelConfig,
        spec: StageSpec,
        config: TransformerConfig,
        groups: ParallelGroups,
        *,
        transformer_engine: bool,
        is_last: bool,
        vp_stage: int | None,
        loss: LossConfig,
        denoiser_dtype: str = "fp32",
        vision_tower_dtype: str | None = None,
        lm_head_chunk_tokens: int,
        cached_latents: bool = False,
    ) -> None:
        super().__init__(config=config)
        self.model_type = ModelType.encoder_or_decoder  # asked for by Megatron's schedules
        self.model_config = model
        self.spec = spec
        self.groups = groups
        self.is_last = is_last
        self.vp_stage = vp_stage
        self.lm_head_chunk_tokens = lm_head_chunk_tokens
        self.supervises_text = loss.supervises_text
        self.input_tensor: Tensor | None = None
        self.wait_for: WaitFor = nothing_to_wait_for  # before weights that Megatron does not wait for
        self.losses = StepLosses(current_device())
        if spec.has("V"):
            self.vision = VisionEncoder(model, config, groups, tower_dtype=vision_tower_dtype)
        if spec.has("E"):
            self.embedding = LanguageModelEmbedding(
                config=config,
                vocab_size=self._padded_vocab_size(),
                max_sequence_length=model.language.max_position_embeddings,
                position_embedding_type="rope",
            )
        if spec.num_layers:
            self.rotary_pos_emb = rotary_embedding(model.language)
            self.decoder = TransformerBlock(
                config=config,
                spec=decoder_layer_spec(transformer_engine=transformer_engine, attention=config.attention_backend.name),
                post_layer_norm=False,
                vp_stage=vp_stage,
            )
        if spec.has("N"):
            self.final_layernorm = final_norm(config, transformer_engine=transformer_engine)
        if spec.has("D"):
            self.reconstruction = ReconstructionHead(
                model,
                config,
                groups,
                seed=loss.seed,
                num_draws=loss.num_noise_draws,
                objective=loss.recon_objective,
                compute_dtype=denoiser_dtype,
                cached_latents=cached_latents,
            )
        if spec.has("H"):
            self._build_output_layer()
        self._mark_gradients()

    def _padded_vocab_size(self) -> int:
        return padded_vocab_size(self.model_config.language.vocab_size, self.groups.tp.size())

    def _build_output_layer(self) -> None:
        """The LM head. Tied weights: the embedding's own parameter on its stage, a synchronised copy elsewhere.

        Another chunk of the same rank has a copy, too: Megatron's data-parallel wrapper holds one chunk, and would
        reduce a gradient as soon as the first of two chunks is done with it.
        """
        # The loss multiplies by this weight itself. Megatron's layer would refuse fused accumulation without Apex.
        config = copy.copy(self.config)
        config.gradient_accumulation_fusion = False
        shares = self.model_config.language.share_embeddings_and_output_weights and self.spec.has("E")
        self.output_layer = ColumnParallelLinear(
            self.config.hidden_size,
            self._padded_vocab_size(),
            config=config,
            init_method=self.config.init_method,
            bias=False,
            skip_weight_param_allocation=shares,
        )
        if self.model_config.language.share_embeddings_and_output_weights and not shares:
            self.output_layer.weight.shared = True  # counted once in the gradient norm
            self.output_layer.weight.shared_embedding = True

    def _mark_gradients(self) -> None:
        """Tell gradient finalisation which parameters see only a part of their gradient on this rank."""
        for name in ("vision", "reconstruction"):
            if hasattr(self, name):
                mark_shared_work(getattr(self, name))
        tied = self.model_config.language.share_embeddings_and_output_weights
        if tied and self.spec.has("E") and not self.spec.has("H"):
            self.embedding.word_embeddings.weight.shared_embedding = True

    @property
    def output_weight(self) -> Tensor:
        """LM head weight of this rank [v/tp, h]."""
        weight = self.output_layer.weight
        return self.embedding.word_embeddings.weight if weight is None else weight

    def set_input_tensor(self, input_tensor: list[Tensor | None] | Tensor | None) -> None:
        """What the previous stage sent; called by Megatron's schedules."""
        self.input_tensor = input_tensor[0] if isinstance(input_tensor, list) else input_tensor

    def forward(self, batch: RossMicrobatch, scales: LossScales) -> Tensor:
        """Hidden states for the next stage, or on the last stage the scalar loss of this microbatch.

        Tensor-parallel ranks return the same LM loss but each its own images' share of the reconstruction loss.
        """
        hidden = self.backbone(batch)
        losses: list[Tensor] = []
        if self.spec.has("D") or self.spec.has("H"):
            full = to_heads(
                hidden, sequence_parallel=self.config.sequence_parallel, tp_group=self.groups.tp
            )  # [s, b, h]
            if self.on_heads is None:
                losses = self._losses_of(full, batch, scales)
            else:
                self.on_heads(self, full, batch)
                losses = [full.new_zeros(())]
        if self.is_last:
            return sum(losses[1:], start=losses[0])
        for loss in losses:
            hidden = attach_loss(hidden, loss, self.config.grad_scale_func)
        # What is sent must own its storage, and the schedule's backward pass wants a gradient for it.
        return make_viewless_tensor(hidden.contiguous(), requires_grad=True, keep_graph=hidden.requires_grad)

    def _losses_of(self, full: Tensor, batch: RossMicrobatch, scales: LossScales) -> list[Tensor]:
        """Scaled losses of this stage's heads, from hidden states [s, b, h]."""
        losses = []
        if self.spec.has("D"):
            self.wait_for(self.reconstruction)
            recon = self.reconstruction(full, batch, self.breakdown, skip=scales.recon == 0)
            losses.append(recon * scales.recon)
            self.losses.add(recon=losses[-1])
        if self.spec.has("H"):
            self.wait_for(self.output_layer)
            losses.append(self.lm_loss(full, batch) * scales.lm)
            self.losses.add(lm=losses[-1])
        return losses

    def backbone(self, batch: RossMicrobatch) -> Tensor:
        """Everything before the heads: V, E, t, N as far as this stage holds them; [s, b, h] or its sequence shard."""
        hidden = self.input_tensor
        if self.spec.has("V"):
            self.wait_for(self.vision)
            hidden = self.vision(batch)
        assert hidden is not None, "the schedule gave this stage no input"
        if self.spec.has("E"):
            hidden = self._splice(batch, hidden)
        if self.spec.num_layers:
            hidden = self.decoder(
                hidden_states=hidden,
                attention_mask=None,
                rotary_pos_emb=self._rotary(batch),
                packed_seq_params=_packed_seq_params(batch),
            )
        if self.spec.has("N"):
            hidden = self.final_layernorm(hidden)
        return hidden

    def _splice(self, batch: RossMicrobatch, image_embeddings: Tensor) -> Tensor:
        """Token embeddings, with `image_embeddings` [s, b, h] where `image_mask` is set."""
        embedded = self.embedding(input_ids=batch.tokens, position_ids=None)
        mask = batch.image_mask.t()[..., None]  # [s, b, 1]
        if self.config.sequence_parallel:
            mask = mask.chunk(self.groups.tp.size(), dim=0)[self.groups.tp.rank()]
        # Contiguous, or all that follows would have its strides, and matrix products would become batched ones.
        return torch.where(mask, image_embeddings.to(embedded.dtype), embedded).contiguous()

    def _rotary(self, batch: RossMicrobatch) -> Tensor:
        packed = batch.cu_seqlens is not None
        length = batch.max_seqlen if packed else batch.tokens.shape[1]
        return self.rotary_pos_emb(length, packed_seq=packed)

    def logits(self, rows: Tensor) -> Tensor:
        """Vocabulary-parallel logits [n, v/tp] of hidden states [n, h] from `to_heads`; padded ids are -inf."""
        return self._vocabulary.logits(rows, self.output_weight)

    @property
    def _vocabulary(self) -> VocabularyShard:
        return VocabularyShard(self.groups.tp, self.model_config.language.vocab_size)

    def lm_loss(self, hidden: Tensor, batch: RossMicrobatch) -> Tensor:
        """Summed cross entropy at supervised positions only: most positions of a sample carry no label.

        Where the loss has no weight, no position is worth the work; the autograd graph is the same.
        """
        rows = hidden.transpose(0, 1).flatten(0, 1)
        labels = batch.labels.flatten()
        positions = (labels >= 0).nonzero().squeeze(1) if self.supervises_text else labels.new_empty(0)
        breakdown = self.breakdown
        return lm_head_loss_sum(
            rows[positions],
            self.output_weight,
            labels[positions],
            self._vocabulary,
            chunk_tokens=self.lm_head_chunk_tokens,
            observe=None if breakdown is None else lambda losses: breakdown.add_lm(losses, batch, positions),
        )


def _packed_seq_params(batch: RossMicrobatch) -> PackedSeqParams | None:
    if batch.cu_seqlens is None:
        return None
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=batch.cu_seqlens,
        cu_seqlens_kv=batch.cu_seqlens,
        max_seqlen_q=batch.max_seqlen,
        max_seqlen_kv=batch.max_seqlen,
    )
