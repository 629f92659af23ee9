"""Runs recorded cases of one model through the real pipeline schedule, in the layout asked for."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ross.checkpoint.loading import load_weights
from megatron_ross.checkpoint.manifest import Manifest, resolve_checkpoint
from megatron_ross.config.layout import StageLayout
from megatron_ross.config.schema import OptimizerSettings, RunConfig, TrainabilityConfig
from megatron_ross.convert.importer import plan_checkpoint, write_checkpoint
from megatron_ross.data.batch import NoiseDraws, RossMicrobatch, RossSample
from megatron_ross.losses import BatchCounts, LossScales, reference_scales
from megatron_ross.parallel.grad_sync import finalize_gradients
from megatron_ross.parallel.groups import ParallelGroups, destroy_groups, initialize_groups
from megatron_ross.parity.fixture import Case, FixtureModel, case_samples, microbatches, recorded_draws
from megatron_ross.parity.gather import gather_gradients, gather_parameters
from megatron_ross.planner.auto import resolve_layout
from megatron_ross.platform import current_device
from megatron_ross.training.build import build_optimizer, build_stages, wrap_ddp
from megatron_ross.training.step import StepResult, compute_gradients, count, run_schedule, train_step


@dataclass(frozen=True)
class CaseResult:
    """What our pipeline computed; tensors are whole, on rank 0 only ({} and None elsewhere)."""

    lm_loss: float
    recon_loss: float
    gradients: dict[str, Tensor]
    final_hidden: Tensor | None  # [B, S, h] after the final norm


class ImportedModel:
    """A fixture's checkpoint, imported with the project's own converter into a temporary folder by rank 0."""

    def __init__(self, fixture: FixtureModel) -> None:
        self._folder = None
        outcome: list[str | None] = [None, None]
        if dist.get_rank() == 0:
            self._folder = tempfile.mkdtemp(prefix="parity_")
            try:
                tower, vae = (str(fixture.root / fixture.metadata[k]) for k in ("vision_tower", "auto_encoder"))
                plan = plan_checkpoint(str(fixture.checkpoint), tower, vae)
                outcome[0] = str(write_checkpoint(plan, Path(self._folder) / "imported"))
            except (ValueError, OSError) as error:
                outcome[1] = str(error)
        dist.broadcast_object_list(outcome)
        if outcome[1] is not None:
            raise ValueError(outcome[1])
        assert outcome[0] is not None
        self.path = resolve_checkpoint(outcome[0])
        self.model = Manifest.read(self.path).model

    def close(self) -> None:
        """Remove the temporary folder, when no rank needs it any more."""
        dist.barrier()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)


class Session:
    """The model in one layout and trainability, ready to run batches. Close it before building another."""

    def __init__(
        self,
        imported: ImportedModel,
        run: RunConfig,
        trainability: TrainabilityConfig,
        *,
        reconstructs: bool = True,
        lr: float = 0.0,
    ) -> None:
        self.run = replace(run, trainability=trainability, optimizer=OptimizerSettings(lr=lr, lr_warmup_fraction=0.0))
        self.model = imported.model if reconstructs else replace(imported.model, denoiser=None, vae=None)
        self.layout = self._layout(reconstructs)
        self.groups = self._groups()
        self.stages = build_stages(self.model, self.run, self.layout, self.groups)
        load_weights(imported.path, self.stages)
        self.chunks = wrap_ddp(self.stages, self.run)
        self.stages[0].config.finalize_model_grads_func = lambda *a, **k: finalize_gradients(self.chunks, self.groups)
        self.optimizer = build_optimizer(self.chunks, self.run)

    def _layout(self, reconstructs: bool) -> StageLayout:
        run = self.run
        if not reconstructs:
            text = run.parallel.layout.replace("D", "")
            run = replace(run, parallel=replace(run.parallel, layout=text))
        return resolve_layout(run, self.model, dist.get_world_size())

    def _groups(self) -> ParallelGroups:
        tied = self.model.language.share_embeddings_and_output_weights
        return initialize_groups(self.run.parallel, self.layout, tie_embeddings=tied, seed=1)

    def close(self) -> None:
        destroy_groups()

    def batches(self, samples: list[RossSample], draws: NoiseDraws | None) -> list[RossMicrobatch]:
        """This rank's microbatches of a recorded batch, on the device."""
        parallel = self.run.parallel
        made = microbatches(
            samples,
            draws,
            self.model,
            self.groups,
            micro_batch_size=self.run.data.micro_batch_size,
            seq_multiple=parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1,
        )
        return [batch.to(current_device()) for batch in made]

    def reference_scales(self, batches: list[RossMicrobatch]) -> list[LossScales]:
        """The recorded batch is one published microbatch, however we split it."""
        counts = [count(batch) for batch in batches]
        table = [[c.supervised_tokens, c.images, c.image_slots] for c in counts]
        totals = torch.tensor(table, device=current_device()).sum(0)
        dist.all_reduce(totals, group=self.groups.dp)
        scales = reference_scales(BatchCounts(*totals.tolist()), 1, self.run.loss.num_noise_draws, 1.0)
        return [scales] * len(batches)

    def run_case(self, case: Case) -> CaseResult:
        """Losses, gradients and final hidden states of a recorded case, reference normalisation."""
        batches = self.batches(case_samples(case, self.model), case_draws(case))
        capture = HiddenCapture(self)
        lm, recon = compute_gradients(self.chunks, self.optimizer, batches, self.reference_scales(batches), self.groups)
        hidden = capture.gather()
        return CaseResult(lm, recon, gather_gradients(self.stages, self.model, self.optimizer, self.groups), hidden)

    def train_on(self, samples: list[RossSample], draws: NoiseDraws) -> StepResult:
        """One optimizer step at constant learning rate."""
        batches = self.batches(samples, draws)
        return train_step(self.chunks, self.optimizer, batches, self.reference_scales(batches), self.groups)

    def forward(self, batches: list[RossMicrobatch]) -> None:
        """Forward only, losses ignored."""
        with torch.no_grad():
            run_schedule(self.chunks, batches, [LossScales(0.0, 0.0)] * len(batches), forward_only=True)

    def parameters(self) -> dict[str, Tensor]:
        """Trainable parameters under Hugging Face names, on rank 0."""
        return gather_parameters(self.stages, self.model, trainable_only=True)


def case_draws(case: Case) -> NoiseDraws | None:
    """The case's recorded draws, None when it does not reconstruct."""
    if not case.reconstructs:
        return None
    return recorded_draws(*(case.tensors[f"draw.{name}"] for name in ("t", "eps", "vae_noise")))


class HiddenCapture:
    """Records the output of the final norm in every microbatch of the next schedule run."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._outputs: list[Tensor] = []
        self._hooks = [
            stage.final_layernorm.register_forward_hook(lambda module, args, out: self._outputs.append(out.detach()))
            for stage in session.stages
            if stage.spec.has("N")
        ]

    def gather(self) -> Tensor | None:
        """[B, S, h] of the whole batch on rank 0, in sample order; removes the hooks. A collective call."""
        for hook in self._hooks:
            hook.remove()
        groups = self._session.groups
        mine = [self._whole(output) for output in self._outputs]
        is_source = bool(mine) and groups.tp.rank() == 0
        parts: list = [None] * dist.get_world_size() if dist.get_rank() == 0 else []
        payload = (groups.dp.rank(), mine) if is_source else None
        dist.gather_object(payload, parts if dist.get_rank() == 0 else None)
        sources = sorted((p for p in parts if p is not None), key=lambda p: p[0])
        if not sources:
            return None
        interleaved = [mb for mbs in zip(*(hidden for _, hidden in sources), strict=True) for mb in mbs]
        length = max(h.shape[0] for h in interleaved)
        padded = [torch.nn.functional.pad(h, (0, 0, 0, 0, 0, length - h.shape[0])) for h in interleaved]
        return torch.cat(padded, dim=1).transpose(0, 1)

    def _whole(self, output: Tensor) -> Tensor:
        """[s, b, h] from this rank's sequence shard."""
        groups = self._session.groups
        if not self._session.stages[0].config.sequence_parallel:
            return output.cpu()
        parts = [torch.empty_like(output) for _ in range(groups.tp.size())]
        dist.all_gather(parts, output.contiguous(), group=groups.tp)
        return torch.cat(parts).cpu()
