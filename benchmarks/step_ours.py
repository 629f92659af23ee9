"""This project's training step on one process: the code that `pretrain_ross.py` runs, fed with samples in memory."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from step_samples import Pack
from step_timeline import Timeline
from torch import Tensor

from megatron_ross.checkpoint.model_state import model_sharded_state
from megatron_ross.config.model import RossModelConfig
from megatron_ross.config.schema import RunConfig
from megatron_ross.convert.layouts import ross_mappings
from megatron_ross.data.batch import ImageSpan, RossMicrobatch
from megatron_ross.data.collate import LatentLoader, collate_packed
from megatron_ross.models.latents import LatentEncoder
from megatron_ross.parallel.grad_sync import finalize_gradients
from megatron_ross.parallel.groups import ParallelGroups, destroy_groups, initialize_groups
from megatron_ross.planner.auto import resolve_layout
from megatron_ross.platform import current_device, quieten
from megatron_ross.training.build import build_optimizer, build_stages, wrap_ddp
from megatron_ross.training.latents import posterior_moments
from megatron_ross.training.main import start_process_group
from megatron_ross.training.step import StepResult, loss_scales, train_step


def start_single_process() -> None:
    """A process group of one."""
    quieten()
    if not torch.distributed.is_initialized():
        os.environ.setdefault("MASTER_ADDR", "localhost")
        start_process_group(timeout_minutes=10)


@dataclass
class OurStep:
    """Stages, optimizer and groups of one run configuration."""

    run: RunConfig
    model: RossModelConfig
    groups: ParallelGroups
    stages: list
    chunks: list
    optimizer: Any
    moments: dict[str, Tensor]
    """Cached VAE posterior moments by image; empty if the VAE runs online."""

    @classmethod
    def build(cls, model: RossModelConfig, settings: dict[str, Any]) -> OurStep:
        """As the trainer builds; `settings` are flat keys of a run. Undoes the groups of the build before."""
        run = RunConfig.from_flat(settings)
        layout = resolve_layout(run, model, 1)
        destroy_groups()
        groups = initialize_groups(run.parallel, layout, tie_embeddings=False, seed=run.loss.seed)
        stages = build_stages(model, run, layout, groups)
        return cls(run, model, groups, stages, [], None, {})

    def finish(self, tensors: dict[str, Tensor] | None) -> None:
        """Load published tensors (None: random ones), and wrap what is trained."""
        if tensors is None:
            for parameter in self.stages[0].parameters():
                torch.nn.init.normal_(parameter, std=0.02)
        else:
            load_published(self.model, self.stages[0], tensors)
        self.chunks = wrap_ddp(self.stages, self.run)
        self.stages[0].config.finalize_model_grads_func = lambda *args, **kwargs: finalize_gradients(
            self.chunks, self.groups
        )
        self.optimizer = build_optimizer(self.chunks, self.run)

    def cache_latents(self, packs: Sequence[Pack], encoder: LatentEncoder | None) -> None:
        """Moments of these samples' images, as tools/cache_latents.py makes them; zeros without an encoder."""
        for span in (span for pack in packs for _, sample in pack for span in sample.images):
            if encoder is None:
                self.moments[span.name] = torch.zeros(self.latent_shape, dtype=torch.float16)
            else:
                pixels = span.load_pixels()[None].to(current_device())
                self.moments[span.name] = posterior_moments(encoder, pixels)[0]

    def batches(self, packs: Sequence[Pack]) -> list[RossMicrobatch]:
        """One microbatch per pack, on the device."""

        def load(spans: Sequence[ImageSpan | None]) -> list[Tensor]:
            return [self.moments[span.name] for span in spans if span is not None]

        latents = LatentLoader(self.latent_shape, load) if self.run.data.latent_cache else None
        return [
            collate_packed(
                [pack], self.run.data.seq_length, image_size=self.model.vision.image_size, latents=latents
            ).to(current_device())
            for pack in packs
        ]

    def step(self, batches: list[RossMicrobatch]) -> StepResult:
        """Losses, gradients and an update."""
        scales = loss_scales(batches, self.run.loss, self.groups)
        return train_step(self.chunks, self.optimizer, batches, scales, self.groups)

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Moments of one image: mean and log variance."""
        assert self.model.vae is not None
        side = 2 * self.model.vision.grid_size
        return (2, self.model.vae.latent_channels, side, side)

    def watch(self, timeline: Timeline) -> None:
        """Time the parts of the step."""
        (stage,) = self.stages
        timeline.watch("tower", stage.vision.vision_tower)
        timeline.watch("projector", stage.vision.projector)
        timeline.watch("decoder", stage.decoder)
        timeline.watch("denoiser", stage.reconstruction.denoiser)
        if stage.reconstruction.latent_encoder is not None:
            timeline.watch_method("vae", stage.reconstruction.latent_encoder, "posterior")
        timeline.watch_method("head", stage, "lm_loss")
        timeline.watch_method("optimizer", self.optimizer, "step_with_ready_grads")
        stage.register_forward_hook(lambda module, args, loss: timeline.loss(loss))


def load_published(model: RossModelConfig, stage: Any, tensors: dict[str, Tensor]) -> None:
    """Put tensors with published names into a stage, through the converter's own table."""
    merged = {m.key: m for m in ross_mappings(model)}
    with torch.no_grad():
        for sharded in model_sharded_state(stage).values():
            mapping = merged[sharded.key]
            sharded.data.copy_(mapping.merge([tensors[part.name] for part in mapping.parts]))
