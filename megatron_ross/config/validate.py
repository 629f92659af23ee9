"""Rules between settings, checked before any process group is made. Each message: setting, value, rule, fix."""

from __future__ import annotations

import os

from megatron_ross.config.blend import DataSource, data_sources, valid_source
from megatron_ross.config.cli import ConfigError
from megatron_ross.config.features import check_fp8_sizes, check_recompute_groups
from megatron_ross.config.layout import LayoutCosts, StageLayout, auto_layout, parse_layout
from megatron_ross.config.limits import check_limits
from megatron_ross.config.model import RossModelConfig
from megatron_ross.config.paths import expand_braces, is_url
from megatron_ross.config.schema import RunConfig
from megatron_ross.config.shown import shown
from megatron_ross.config.timesteps import NUM_TRAIN_TIMESTEPS, respaced_timesteps


def validate_run(run: RunConfig, world_size: int) -> None:
    """Rules that need no checkpoint.

    Raises:
        ConfigError: the first rule that is broken.
    """
    check_settings(run)
    _check_world(run, world_size)
    _check_paths(run)
    _check_packing(run)
    _check_schedule(run)
    _check_time_limits(run)
    _check_observation(run)
    _check_wandb(run)


def check_settings(run: RunConfig) -> None:
    """Rules of settings that also matter where nothing is trained, in checks of the data.

    Raises:
        ConfigError: the first rule that is broken.
    """
    check_limits(run)
    _check_shares(run)
    _check_losses(run)


def _check_shares(run: RunConfig) -> None:
    shares = {"max_bad_sample_share": run.data.max_bad_sample_share, "max_mismatch_share": run.data.max_mismatch_share}
    for name, share in shares.items():
        if not 0 <= share <= 1:
            raise ConfigError(f"{name}={share}: must be a share of the samples, from 0 to 1")


def _check_world(run: RunConfig, world_size: int) -> None:
    tp, pp = run.parallel.tensor_model_parallel_size, run.parallel.pipeline_model_parallel_size
    if world_size % (tp * pp):
        raise ConfigError(
            f"world size {world_size}: must be a multiple of tensor_model_parallel_size {tp} x "
            f"pipeline_model_parallel_size {pp} = {tp * pp}; start {tp * pp} ranks (or a multiple), or change the sizes"
        )
    dp = world_size // (tp * pp)
    mbs, gbs = run.data.micro_batch_size, run.data.global_batch_size
    if gbs % (mbs * dp):
        raise ConfigError(
            f"global_batch_size={gbs}: must be a multiple of micro_batch_size {mbs} x data-parallel size {dp}; "
            "change one of them"
        )


def _check_packing(run: RunConfig) -> None:
    length, tp = run.data.seq_length, run.parallel.tensor_model_parallel_size
    if run.data.packing and run.parallel.sequence_parallel and length % tp:
        raise ConfigError(
            f"seq_length={length}: packs of this length are split over tensor_model_parallel_size={tp} ranks by "
            f"sequence_parallel, so it must be a multiple; use {length - length % tp} or {length - length % tp + tp}"
        )


def _check_paths(run: RunConfig) -> None:
    try:
        sources = data_sources(run.data)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    for source in sources:
        _check_source(source)
    if run.data.valid_data_path:
        _check_source(valid_source(run.data))
    if not run.training.load and not run.training.init_from:
        raise ConfigError(
            "init_from='': name a checkpoint to start from (tools/convert_hf_to_megatron.py makes one), or load"
        )


def _check_source(source: DataSource) -> None:
    """Its local files exist; what a URL names is found out when it is opened."""
    try:
        paths = expand_braces(source.data_path)
    except ValueError as error:
        raise ConfigError(f"{source.prefix}data_path={shown(source.data_path)}: {error}") from None
    for path in paths:
        if not is_url(path) and not os.path.isfile(path):  # pathlib raises for names that no file can have
            raise ConfigError(f"{source.prefix}data_path={shown(path, 300)}: no such file")
    folder = source.image_folder
    if folder and not is_url(folder) and not os.path.isdir(folder):
        raise ConfigError(
            f"{source.prefix}image_folder={shown(folder, 300)}: no such folder; give the root of the image paths in "
            f"{source.prefix}data_path"
        )


def _check_schedule(run: RunConfig) -> None:
    training, optimizer = run.training, run.optimizer
    if training.train_iters is not None and training.train_iters < 1:
        raise ConfigError(f"train_iters={training.train_iters}: must be at least 1; leave it out to train num_epochs")
    if training.save_interval is not None and training.save_interval < 1:
        raise ConfigError(
            f"save_interval={training.save_interval}: must be at least 1; leave it out to save at the end only"
        )
    if training.save_interval is not None and not training.save:
        raise ConfigError(f"save_interval={training.save_interval}: needs save, the run folder to write checkpoints to")
    if training.loss_spike_factor and training.loss_spike_factor <= 1:
        raise ConfigError(f"loss_spike_factor={training.loss_spike_factor}: must be above 1, or 0 for no warnings")
    if optimizer.min_lr > optimizer.lr:
        raise ConfigError(f"min_lr={optimizer.min_lr}: must not exceed lr={optimizer.lr}")


def _check_losses(run: RunConfig) -> None:
    loss = run.loss
    if loss.lm_loss_weight == loss.recon_loss_weight == 0:
        raise ConfigError("lm_loss_weight=0, recon_loss_weight=0: nothing would be trained; give one of them a weight")


def _check_time_limits(run: RunConfig) -> None:
    """From the shortest: the last save, a step that stands still, a collective."""
    grace, collective = run.training.preemption_grace_seconds, run.parallel.distributed_timeout_minutes
    limit = run.training.hang_timeout_minutes
    if collective <= 0:
        raise ConfigError(f"distributed_timeout_minutes={collective}: must be above 0")
    if limit < 0 or (limit and 60 * limit < grace):
        raise ConfigError(
            f"hang_timeout_minutes={limit}: must be 0, or at least preemption_grace_seconds={grace}, "
            "so that a last save is not taken for a hang"
        )
    if limit >= collective:
        raise ConfigError(
            f"hang_timeout_minutes={limit}: must be 0, or below distributed_timeout_minutes={collective}; otherwise a "
            "collective fails before the ranks show where they stand"
        )


def _check_observation(run: RunConfig) -> None:
    data, observation = run.data, run.observation
    if data.valid_data_path and data.valid_split:
        raise ConfigError(
            f"valid_split={data.valid_split}: valid_data_path={shown(data.valid_data_path)} is set, too; "
            "give one of the two"
        )
    if data.valid_image_folder and not data.valid_data_path:
        raise ConfigError(f"valid_image_folder={shown(data.valid_image_folder)}: needs valid_data_path")
    for name in ("eval_interval", "sample_interval"):
        interval = getattr(observation, name)
        if interval is not None and not (data.valid_data_path or data.valid_split):
            raise ConfigError(
                f"{name}={interval}: needs held-out samples; name them with valid_data_path, or hold out a share of "
                "the training samples with valid_split"
            )
    if observation.eval_iters is not None and observation.eval_interval is None:
        raise ConfigError(f"eval_iters={observation.eval_iters}: needs eval_interval, how often to validate")
    if observation.sample_interval is not None:
        _check_samples(run)
    if observation.log_source_losses and not data.blend:
        raise ConfigError("log_source_losses=True: there is one source; list several under blend, or leave it out")


def _check_samples(run: RunConfig) -> None:
    interval, steps = run.observation.sample_interval, run.observation.picture_steps
    if not run.training.save:
        raise ConfigError(f"sample_interval={interval}: needs save, the run folder to write pictures and answers to")
    if run.parallel.tp_comm_overlap:
        raise ConfigError(
            f"sample_interval={interval}: tp_comm_overlap fixes the shape of every microbatch, and questions have "
            "another; leave one of the two out"
        )
    try:
        respaced_timesteps(NUM_TRAIN_TIMESTEPS, steps)
    except ValueError as error:
        raise ConfigError(f"picture_steps={shown(steps)}: {error}") from None


def _check_wandb(run: RunConfig) -> None:
    project = run.training.wandb_project
    if project and not run.training.save:
        raise ConfigError(f"wandb_project={shown(project)}: needs save, the folder that keeps the run's id")


def resolve_layout(
    run: RunConfig, model: RossModelConfig, world_size: int, costs: LayoutCosts | None = None
) -> StageLayout:
    """The stage layout of a run, with every rule that needs the model's architecture checked.

    `costs` are for `layout: auto`; `planner/auto.py` gives them. Without, decoder layers alone are spread evenly.

    Raises:
        ConfigError: the layout, the sizes and the model do not fit together.
    """
    _check_objective(run, model)
    check_anything_is_trained(run, model)
    parallel, language = run.parallel, model.language
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    for name, value in {
        "num_attention_heads": language.num_attention_heads,
        "num_query_groups": language.num_query_groups,
        "ffn_hidden_size": language.ffn_hidden_size,
    }.items():
        if value % tp:
            raise ConfigError(
                f"tensor_model_parallel_size={tp}: must divide the model's {name}={value}; "
                f"use one of {_divisors(value)}"
            )
    text = parallel.layout
    try:
        if text == "auto":
            text = auto_layout(
                num_layers=language.num_layers,
                pipeline_model_parallel_size=pp,
                virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size,
                has_denoiser=model.denoiser is not None,
                costs=costs,
            )
        layout = parse_layout(
            text,
            num_layers=language.num_layers,
            pipeline_model_parallel_size=pp,
            has_denoiser=model.denoiser is not None,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from None
    _check_interleaving(run, layout, world_size)
    check_fp8_sizes(run, language, layout)
    check_recompute_groups(run, layout)
    return layout


def _check_objective(run: RunConfig, model: RossModelConfig) -> None:
    """A denoiser that regresses knows no noise. One that says `denoise` may be untrained, so it may learn either."""
    asked = run.loss.recon_objective
    if model.denoiser is not None and model.denoiser.objective == "regress" and asked != "regress":
        raise ConfigError(
            f"recon_objective={asked}: the checkpoint's denoiser was trained with regress; set recon_objective to "
            "regress, or start from a checkpoint before that training"
        )


def check_anything_is_trained(run: RunConfig, model: RossModelConfig) -> None:
    """Some part is trained, and some loss reaches it.

    Raises:
        ConfigError: nothing would be trained.
    """
    loss, train = run.loss, run.trainability
    reconstructs = model.denoiser is not None and loss.recon_loss_weight > 0
    if not loss.supervises_text and not reconstructs:
        raise ConfigError(
            f"lm_loss_weight={loss.lm_loss_weight}: the model has no denoiser (it is LLaVA), so nothing would be "
            "trained; give the language loss a weight, or start from a model with one"
        )
    trains_denoiser = reconstructs and not train.freeze_mm_inv_projector
    trains_projector = not train.freeze_mm_mlp_adapter and model.projector.type != "identity"
    trains_others = not train.freeze_language_model or train.unfreeze_mm_vision_tower
    if not (trains_denoiser or trains_projector or trains_others):
        raise ConfigError(
            f"freeze_language_model={train.freeze_language_model}, freeze_mm_mlp_adapter={train.freeze_mm_mlp_adapter}"
            f", freeze_mm_inv_projector={train.freeze_mm_inv_projector}: no part is left that a loss would train; "
            "leave one of them out"
        )


def _check_interleaving(run: RunConfig, layout: StageLayout, world_size: int) -> None:
    parallel = run.parallel
    pp = parallel.pipeline_model_parallel_size
    chunks = layout.virtual_pipeline_model_parallel_size
    asked = parallel.virtual_pipeline_model_parallel_size
    if asked is not None and asked != (chunks or 1):
        raise ConfigError(
            f"virtual_pipeline_model_parallel_size={asked}: layout {layout} has {len(layout.stages)} stages on {pp} "
            f"pipeline ranks, that is {chunks or 1} chunk(s) each; change one of the two"
        )
    if chunks is None:
        if parallel.overlap_p2p_comm and pp > 1:
            raise ConfigError(
                f"overlap_p2p_comm=true: Megatron overlaps only the interleaved schedule, and layout {layout} has one "
                "chunk per rank; leave it out or give more stages"
            )
        return
    if pp == 1:
        raise ConfigError(f"layout {layout}: {chunks} chunks on one pipeline rank; interleaving needs at least 2 ranks")
    if parallel.overlap_p2p_comm is False or parallel.batch_p2p_comm:
        raise ConfigError(
            f"overlap_p2p_comm={parallel.overlap_p2p_comm}, batch_p2p_comm={parallel.batch_p2p_comm}: the interleaved "
            "schedule needs overlap_p2p_comm true and batch_p2p_comm false (with two pipeline ranks, batched messages "
            "silently swap activations); leave both out"
        )
    dp = world_size // (parallel.tensor_model_parallel_size * pp)
    num_microbatches = run.data.global_batch_size // (run.data.micro_batch_size * dp)
    if num_microbatches % pp:
        raise ConfigError(
            f"global_batch_size={run.data.global_batch_size}: gives {num_microbatches} microbatches per step; the "
            f"interleaved schedule needs a multiple of pipeline_model_parallel_size={pp}"
        )


def _divisors(value: int) -> str:
    return ", ".join(str(d) for d in range(1, min(value, 64) + 1) if value % d == 0)
