"""One global batch through the training code in one layout, with everything that comes out gathered on rank 0."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ross.checkpoint.loading import load_weights
from megatron_ross.checkpoint.manifest import Manifest
from megatron_ross.config.features import sequence_multiple
from megatron_ross.config.layout import StageLayout
from megatron_ross.config.model import RossModelConfig
from megatron_ross.config.schema import RunConfig
from megatron_ross.config.validate import resolve_layout
from megatron_ross.data.batch import NoiseDraws, RossMicrobatch, RossSample
from megatron_ross.data.collate import collate
from megatron_ross.parallel.grad_sync import finalize_gradients
from megatron_ross.parallel.groups import ParallelGroups, destroy_groups, initialize_groups
from megatron_ross.parity.gather import gather_gradients, gather_parameters
from megatron_ross.platform import ensure_platform, quieten
from megatron_ross.training.build import build_optimizer, build_stages, wrap_ddp
from megatron_ross.training.step import compute_gradients, loss_scales
from tests.helpers.batches import make_batch

SETTINGS: dict[str, Any] = {
    "global_batch_size": 8,
    "seed": 11,
    "lr": 1e-2,
    "lr_warmup_fraction": 0.0,
    # Large against rounding noise: the update is then a smooth function of the gradient.
    "adam_eps": 1e-2,
}


@dataclass(frozen=True)
class Outcome:
    """One step: losses of the global batch; by checkpoint name, gradients and parameters after the update."""

    lm_loss: float
    recon_loss: float
    grad_norm: float
    gradients: dict[str, Tensor]
    parameters: dict[str, Tensor]


@dataclass
class Session:
    """A model in one layout; `close()` it before the next."""

    run: RunConfig
    model: RossModelConfig
    layout: StageLayout
    groups: ParallelGroups
    stages: list
    chunks: list
    optimizer: Any

    def close(self) -> None:
        destroy_groups()

    def microbatches(self, samples: list[RossSample], *, epoch: int = 0) -> list[RossMicrobatch]:
        """This data-parallel rank's microbatches, placed as the loader places them."""
        mbs, multiple = self.run.data.micro_batch_size, sequence_multiple(self.run)
        length = -(-max(len(s.input_ids) for s in samples) // multiple) * multiple
        return [
            collate(
                [(epoch, sample) for sample in samples[start : start + mbs]],
                length,
                image_size=self.model.vision.image_size,
                tp_rank=self.groups.tp.rank(),
                tp_size=self.groups.tp.size(),
                want_pixels=any(s.spec.has("V") or s.spec.has("D") for s in self.stages),
                reference_dummy_images=self.run.loss.loss_mode == "reference",
            ).to(torch.cuda.current_device())
            for start in range(self.groups.dp.rank() * mbs, len(samples), mbs * self.groups.dp.size())
        ]

    def losses_and_gradients(self, batches: list[RossMicrobatch]) -> tuple[float, float]:
        scales = loss_scales(batches, self.run.loss, self.groups)
        return compute_gradients(self.chunks, self.optimizer, batches, scales, self.groups)

    def step(self, batches: list[RossMicrobatch]) -> Outcome:
        """Losses, gradients and one update."""
        lm, recon = self.losses_and_gradients(batches)
        gradients = gather_gradients(self.stages, self.model, self.optimizer, self.groups)
        self.optimizer.prepare_grads()
        norm = float(self.optimizer.get_grad_norm())
        self.optimizer.step_with_ready_grads()
        parameters = gather_parameters(self.stages, self.model, trainable_only=True)
        return Outcome(lm, recon, norm, gradients, parameters)


def open_session(path: Path, flat: dict[str, Any]) -> Session:
    """Build stages in the layout of `flat` and load the imported checkpoint at `path`. A collective call."""
    quieten()
    ensure_platform()
    run = RunConfig.from_flat(SETTINGS | flat)
    model = Manifest.read(path).model
    layout = resolve_layout(run, model, dist.get_world_size())
    tied = model.language.share_embeddings_and_output_weights
    groups = initialize_groups(run.parallel, layout, tie_embeddings=tied, seed=run.loss.seed)
    try:
        stages = build_stages(model, run, layout, groups)
        load_weights(path, stages)
        chunks = wrap_ddp(stages, run)
        stages[0].config.finalize_model_grads_func = lambda *args, **kwargs: finalize_gradients(chunks, groups)
        return Session(run, model, layout, groups, stages, chunks, build_optimizer(chunks, run))
    except BaseException:
        destroy_groups()
        raise


def one_step(
    rank: int, world_size: int, path: Path, kind: str, flat: dict[str, Any], draws: NoiseDraws | None = None
) -> Outcome | None:
    """For `run_ranks`: one optimizer step on a batch of `tests.helpers.batches`; the outcome on rank 0."""
    session = open_session(path, flat)
    try:
        outcome = session.step(session.microbatches(make_batch(kind, session.model)))
    finally:
        session.close()
    return outcome if rank == 0 else None


def relative(got: Tensor, expected: Tensor, floor: float = 0.0) -> float:
    """||got - expected|| / max(||expected||, floor)."""
    difference = float((got.double() - expected.double()).norm())
    return difference / max(float(expected.double().norm()), floor, 1e-30)


def worst_gradient(got: dict[str, Tensor], expected: dict[str, Tensor]) -> tuple[float, str]:
    """Largest relative error over all tensors and its name; gradients that are zero but for rounding count as such."""
    assert sorted(got) == sorted(expected), sorted(set(got) ^ set(expected))
    floor = 1e-4 * max(float(t.double().norm()) for t in expected.values())
    return max((relative(got[name], expected[name], floor), name) for name in expected)
