"""From a model and a run configuration to Megatron model chunks, optimizer and learning-rate schedule."""

from __future__ import annotations

import math
import os

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, ParamKey, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_ross.compat import probe
from megatron_ross.config.features import attention_environment, resolve_features
from megatron_ross.config.layout import StageLayout
from megatron_ross.config.model import RossModelConfig
from megatron_ross.config.schema import OptimizerSettings, RunConfig, TrainabilityConfig
from megatron_ross.models.language import transformer_config
from megatron_ross.models.ross_stage import RossStage
from megatron_ross.parallel.groups import ParallelGroups
from megatron_ross.parallel.param_gather import gathered_parameters
from megatron_ross.training.adam import use_adam
from megatron_ross.training.schedule import Schedule


def build_stages(
    model: RossModelConfig, run: RunConfig, layout: StageLayout, groups: ParallelGroups
) -> list[RossStage]:
    """This rank's stages, one per virtual chunk, with the run's trainability. Weights are not loaded yet."""
    features = resolve_features(run, probe())
    # TransformerEngine reads these when a layer first attends.
    os.environ |= attention_environment(features.attention.name)
    config = transformer_config(
        model.language,
        run.parallel,
        run.compute,
        layout,
        transformer_engine=features.transformer_engine,
        attention_backend=features.attention.name,
    )
    chunks = layout.chunks_of_rank(groups.pp.rank())
    stages = [
        RossStage(
            model,
            spec,
            config,
            groups,
            transformer_engine=features.transformer_engine,
            is_last=spec.index == len(layout.stages) - 1,
            vp_stage=chunk if len(chunks) > 1 else None,
            loss=run.loss,
            denoiser_dtype=run.compute.denoiser_dtype,
            vision_tower_dtype=run.compute.vision_tower_dtype,
            lm_head_chunk_tokens=run.compute.lm_head_chunk_tokens,
            cached_latents=bool(run.data.latent_cache),
        )
        for chunk, spec in enumerate(chunks)
    ]
    for stage in stages:
        set_trainability(stage, run.trainability)
        if not run.loss.supervises_text and stage.spec.has("H"):
            freeze_head(stage)
    return stages


def set_trainability(stage: RossStage, trainability: TrainabilityConfig) -> None:
    """Freeze and unfreeze parameters; the VAE is always frozen."""
    stage.requires_grad_(not trainability.freeze_language_model)
    if stage.spec.has("V"):
        stage.vision.projector.requires_grad_(not trainability.freeze_mm_mlp_adapter)
        stage.vision.vision_tower.set_trainable(trainability.unfreeze_mm_vision_tower)
    if stage.spec.has("D"):
        if stage.reconstruction.latent_encoder is not None:
            stage.reconstruction.latent_encoder.requires_grad_(False)
        denoiser = stage.reconstruction.denoiser
        trains = not trainability.freeze_mm_inv_projector
        denoiser.requires_grad_(trains)
        table = trainability.train_denoiser_position_table
        denoiser.pos_embed.requires_grad_(trains and (trainability.freeze_language_model if table is None else table))


def freeze_head(stage: RossStage) -> None:
    """An LM head of its own gets no gradient from a language loss without weight; tied, it is the embedding."""
    if not stage.model_config.language.share_embeddings_and_output_weights:
        stage.output_layer.requires_grad_(False)


def wrap_ddp(stages: list[RossStage], run: RunConfig) -> list[DistributedDataParallel]:
    """Megatron's data-parallel wrapper; gradients are summed in fp32."""
    parallel = run.parallel
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=True,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
        # With several chunks the schedule starts the gathers, a chunk ahead.
        align_param_gather=parallel.overlap_param_gather and len(stages) > 1,
        bucket_size=parallel.ddp_bucket_size,
        average_in_collective=False,
    )
    chunks = [
        DistributedDataParallel(stage.config, ddp_config, stage, disable_bucketing=index > 0)
        for index, stage in enumerate(stages)
    ]
    config = stages[0].config
    if parallel.overlap_grad_reduce:
        config.no_sync_func = _one_or_list([chunk.no_sync for chunk in chunks])
    if parallel.overlap_param_gather:
        for stage, chunk in zip(stages, chunks, strict=True):
            stage.wait_for = gathered_parameters(chunk)
        if len(chunks) > 1:
            config.param_sync_func = [chunk.start_param_sync for chunk in chunks]
    return chunks


def _one_or_list(functions: list):
    return functions[0] if len(functions) == 1 else functions


def build_optimizer(chunks: list[DistributedDataParallel], run: RunConfig) -> MegatronOptimizer:
    """The run's AdamW in Megatron's distributed optimizer; per-module learning rates as parameter groups."""
    settings = run.optimizer
    config = OptimizerConfig(
        optimizer="adam",
        lr=settings.lr,
        min_lr=settings.min_lr,
        weight_decay=settings.weight_decay,
        adam_beta1=settings.adam_beta1,
        adam_beta2=settings.adam_beta2,
        adam_eps=settings.adam_eps,
        # Megatron clips at any positive value: infinity measures the norm and never scales.
        clip_grad=settings.clip_grad if settings.clip_grad > 0 else math.inf,
        bf16=run.compute.bf16,
        params_dtype=torch.bfloat16 if run.compute.bf16 else torch.float32,
        use_distributed_optimizer=True,
        overlap_param_gather=run.parallel.overlap_param_gather,
    )
    adam = resolve_features(run, probe()).adam.name
    optimizer = get_megatron_optimizer(
        config, chunks, config_overrides=_group_overrides(settings), use_gloo_process_groups=torch.cuda.is_available()
    )
    use_adam(optimizer, adam)
    config_of_schedule = chunks[0].module.config
    config_of_schedule.grad_scale_func = optimizer.scale_loss
    return optimizer


def _group_overrides(settings: OptimizerSettings) -> dict[ParamKey, dict[str, float]]:
    """No weight decay on biases and norms; own learning rates for projector, denoiser and tower."""
    from megatron.core.optimizer.optimizer_config import ParamPredicate

    one_dimensional = ParamPredicate(name="one_dimensional", fn=lambda parameter: parameter.dim() == 1)
    overrides = {ParamKey(predicate=one_dimensional): {"wd_mult": 0.0}} if settings.weight_decay else {}
    modules = {
        "*vision.projector.*": settings.mm_projector_lr,
        "*reconstruction.denoiser.*": settings.mm_inv_projector_lr,
        "*vision.vision_tower.*": settings.mm_vision_tower_lr,
    }
    for pattern, lr in modules.items():
        if lr is not None:
            # To the module's peak as min_lr is to lr; with lr 0, which leaves min_lr nothing but 0, it is 0.
            least = settings.min_lr * lr / settings.lr if settings.lr else 0.0
            overrides[ParamKey(name=pattern)] = {"max_lr": lr, "min_lr": least}
    return overrides


def build_scheduler(
    optimizer: MegatronOptimizer, settings: OptimizerSettings, schedule: Schedule, consumed_sequences: int = 0
) -> OptimizerParamScheduler:
    """Learning rate by sequences: linear warm-up from 0 (the first step changes nothing), then decay to `min_lr`.

    Nothing of it comes from a checkpoint: a run that resumes has the schedule of its own settings, from the place
    where it stands.
    """
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=settings.lr,
        min_lr=settings.min_lr,
        lr_warmup_steps=schedule.warmup,
        lr_decay_steps=schedule.length,
        lr_decay_style=schedule.style,
        start_wd=settings.weight_decay,
        end_wd=settings.weight_decay,
        wd_incr_steps=schedule.length,
        wd_incr_style="constant",
    )
    scheduler.step(increment=consumed_sequences - schedule.start)
    return scheduler
