"""Bounds of single settings: what lies outside would be allocated, waited for, or turn weights into NaN.

They are far beyond any sensible run. A run that needs more changes the number here, where its reason stands.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_ross.config.cli import ConfigError
from megatron_ross.config.schema import RunConfig
from megatron_ross.config.shown import shown


@dataclass(frozen=True)
class Limit:
    """From `low` to `high`, both included; `why` ends the message about a larger value. None: no lower bound here."""

    low: float | None
    high: float
    why: str


_RANKS = "that many ranks cannot be started"
_RATE = "weights would not stay finite"
_STEPS = "no run has so many steps"
_LAYERS = "no model has so many decoder layers"
_FIRST_MOMENT = "at 1 a running mean never moves"

LIMITS: dict[str, Limit] = {
    "tensor_model_parallel_size": Limit(1, 4096, _RANKS),
    "pipeline_model_parallel_size": Limit(1, 4096, _RANKS),
    "virtual_pipeline_model_parallel_size": Limit(1, 1024, _LAYERS),
    "ddp_bucket_size": Limit(None, 2**40, "a message holds this many numbers"),
    "distributed_timeout_minutes": Limit(0, 30 * 24 * 60, "a lost rank would hold the others for longer than 30 days"),
    "fp8_margin": Limit(-64, 64, "FP8 scales would leave the range of fp32"),
    "fp8_amax_history_len": Limit(1, 65536, "every FP8 tensor keeps this many maxima"),
    "num_layers_at_start_in_bf16": Limit(None, 1024, _LAYERS),
    "num_layers_at_end_in_bf16": Limit(None, 1024, _LAYERS),
    "lm_head_chunk_tokens": Limit(1, 2**24, "logits of this many tokens may exist at the same time"),
    "recompute_num_layers": Limit(None, 1024, _LAYERS),
    "lm_loss_weight": Limit(0, 1e6, _RATE),
    "recon_loss_weight": Limit(0, 1e6, _RATE),
    "num_noise_draws": Limit(1, 1024, "the denoiser runs on this many copies of every image"),
    "seed": Limit(0, 2**62, "random keys are 64-bit numbers"),
    "lr": Limit(0, 100, _RATE),
    "min_lr": Limit(0, 100, _RATE),
    "mm_projector_lr": Limit(0, 100, _RATE),
    "mm_inv_projector_lr": Limit(0, 100, _RATE),
    "mm_vision_tower_lr": Limit(0, 100, _RATE),
    "lr_warmup_fraction": Limit(0, 1, "it is a share of the steps"),
    "lr_warmup_iters": Limit(0, 10**9, _STEPS),
    "weight_decay": Limit(0, 100, _RATE),
    "adam_beta1": Limit(0, 0.9999999, _FIRST_MOMENT),
    "adam_beta2": Limit(0, 0.9999999, _FIRST_MOMENT),
    "adam_eps": Limit(0, 1, "weights would not move"),
    "clip_grad": Limit(0, 1e9, "it would clip nothing; 0 says so"),
    "skip_nonfinite_steps": Limit(0, 10**9, _STEPS),
    "max_empty_steps": Limit(1, 10**9, _STEPS),
    "seq_length": Limit(1, 2**24, "a microbatch of this many tokens is allocated whole"),
    "micro_batch_size": Limit(1, 65536, "a microbatch is in memory whole"),
    "global_batch_size": Limit(1, 2**24, "the findings of a step are agreed on at once"),
    "packing_lookahead": Limit(1, 65536, "every pack is chosen among all of them"),
    "num_workers": Limit(1, 1024, "each is a thread of every rank"),
    "num_prefetch_steps": Limit(0, 1024, "that many global batches are held in memory"),
    "train_iters": Limit(None, 10**9, _STEPS),
    "num_epochs": Limit(0, 1e6, _STEPS),
    "save_interval": Limit(None, 10**9, _STEPS),
    "save_retain_last": Limit(1, 10**9, _STEPS),
    "save_retain_interval": Limit(1, 10**9, _STEPS),
    "hang_timeout_minutes": Limit(0, 30 * 24 * 60, "a run that stands still would do so for longer than 30 days"),
    "loss_spike_factor": Limit(0, 1e9, "no loss would be a spike; 0 says so"),
    "log_interval": Limit(1, 10**9, _STEPS),
    "valid_split": Limit(0, 0.999999, "nothing would be left to train on"),
    "eval_interval": Limit(1, 10**9, _STEPS),
    "eval_iters": Limit(1, 10**9, "no data set has so many batches"),
    "sample_interval": Limit(1, 10**9, _STEPS),
    "num_pictures": Limit(0, 1024, "they are painted at the same time"),
    "num_answers": Limit(0, 1024, "the questions go through the model at the same time"),
    "answer_max_new_tokens": Limit(1, 4096, "every token costs a forward pass"),
    "log_timestep_buckets": Limit(0, 1000, "training has this many timesteps"),
    "preemption_grace_seconds": Limit(0, 24 * 3600, "no scheduler waits for longer than a day"),
}


def check_limits(run: RunConfig) -> None:
    """Every number of a run lies within its bounds.

    Raises:
        ConfigError: the first that does not, its bound and why.
    """
    flat = run.to_flat()
    for name, limit in LIMITS.items():
        if flat[name] is not None:
            _check(name, flat[name], limit)


def _check(name: str, value: object, limit: Limit) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or value != value:
        raise ConfigError(f"{name}={shown(value)}: must be a number")
    assert isinstance(value, int | float)
    if limit.low is not None and value < limit.low:
        rule = "must not be negative" if limit.low == 0 else f"must be at least {limit.low}"
        raise ConfigError(f"{name}={shown(value)}: {rule}")
    if value > limit.high:
        raise ConfigError(f"{name}={shown(value)}: must be at most {limit.high:,}, because {limit.why}")
