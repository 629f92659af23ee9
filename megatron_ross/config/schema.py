"""Every setting of a training run, as frozen dataclasses. Names are Megatron-LM's where Megatron-LM has one.

In YAML and on the command line all fields are flat: `micro_batch_size: 2` or `--micro-batch-size 2`.
The model's architecture is not here: it comes with the checkpoint (`config/model.py`).
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, Literal


@dataclass(frozen=True)
class ParallelConfig:
    """How the model lies over ranks."""

    tensor_model_parallel_size: int = 1
    """Ranks that share each decoder layer's matrices and each microbatch's images."""
    pipeline_model_parallel_size: int = 1
    """Ranks in a pipeline."""
    virtual_pipeline_model_parallel_size: int | None = None
    """Chunks per pipeline rank for the interleaved schedule; None reads it off `layout`."""
    sequence_parallel: bool = False
    """Split activations between the tensor-parallel regions along the sequence."""
    layout: str = "auto"
    """What each stage holds, e.g. `VEt*2|t*2NDH` (see config/layout.py); `auto` balances stages by predicted cost."""
    overlap_p2p_comm: bool | None = None
    """Overlap pipeline sends with compute; None turns it on exactly when the schedule is interleaved."""
    batch_p2p_comm: bool | None = None
    """Batch sends and receives; None means the opposite of overlap_p2p_comm."""
    overlap_grad_reduce: bool = False
    """Reduce gradients over data-parallel ranks while the backward pass goes on."""
    overlap_param_gather: bool = False
    """Gather updated parameters over data-parallel ranks while the forward pass goes on; needs overlap_grad_reduce."""
    ddp_bucket_size: int | None = None
    """Parameters per message of the two overlaps; None is Megatron's choice, at least 40 million."""
    tp_comm_overlap: bool = False
    """Overlap tensor-parallel messages with matrix products, through TransformerEngine's user buffers."""
    distributed_timeout_minutes: float = 30.0
    """A collective that waits longer fails the run; longer than hang_timeout_minutes, which shows where ranks stand."""


@dataclass(frozen=True)
class ComputeConfig:
    """Precision, kernels and memory."""

    bf16: bool = False
    """bf16 parameters with fp32 main weights and fp32 gradient reduction; otherwise everything is fp32."""
    denoiser_dtype: Literal["fp32", "bf16", "tf32"] = "fp32"
    """Arithmetic of the denoiser; published training uses fp32."""
    vision_tower_dtype: Literal["fp32", "bf16", "tf32"] | None = None
    """Storage and arithmetic of the vision tower; None is the decoder's, bf16 or fp32."""
    transformer_impl: Literal["auto", "local", "transformer_engine"] = "auto"
    """Decoder layers; `auto` takes TransformerEngine's when it is installed and a GPU is used."""
    attention_backend: Literal["auto", "flash", "fused", "unfused", "local"] = "auto"
    """The decoder's attention: flash-attn, cuDNN or plain through TransformerEngine, or PyTorch's (`local`); `auto`
    leaves it to TransformerEngine where that can run, else takes PyTorch's."""
    fp8: Literal["hybrid", "e4m3"] | None = None
    """FP8 products in the decoder's linear layers; `hybrid` keeps gradients in e5m2."""
    fp8_recipe: Literal["delayed", "tensorwise", "blockwise", "mxfp8"] = "delayed"
    """How FP8 scales are found: from past maxima, from this tensor's, or per block of it."""
    fp8_margin: int = 0
    """`delayed`: scales leave this many powers of two between the largest value and the format's limit."""
    fp8_amax_history_len: int = 1
    """`delayed`: how many past maxima a scale looks at."""
    fp8_amax_compute_algo: Literal["most_recent", "max"] = "most_recent"
    """`delayed`: take the newest of these maxima, or the largest."""
    fp8_wgrad: bool = True
    """`delayed`: false computes weight gradients in bf16."""
    first_last_layers_bf16: bool = False
    """Keep decoder layers at both ends out of FP8."""
    num_layers_at_start_in_bf16: int = 1
    """With first_last_layers_bf16: how many of the first layers."""
    num_layers_at_end_in_bf16: int = 1
    """With first_last_layers_bf16: how many of the last layers."""
    gradient_accumulation_fusion: bool = False
    """Weight-gradient products add to the fp32 gradient buffer directly."""
    lm_head_chunk_tokens: int = 4096
    """Most supervised tokens of a microbatch whose logits exist at the same time; beyond, the LM head goes chunk by
    chunk and computes its logits again in the backward pass."""
    recompute_granularity: Literal["full", "selective"] | None = None
    """Compute activations again in the backward pass instead of keeping them: those of whole layers, or of some
    modules."""
    recompute_method: Literal["uniform", "block"] | None = None
    """`full`: `uniform` recomputes groups of recompute_num_layers, `block` only the first recompute_num_layers of a
    stage."""
    recompute_num_layers: int | None = None
    """`full`: layers in a group (uniform), or recomputed layers of each stage (block)."""
    recompute_modules: list[str] | None = None
    """What `selective` computes again: core_attn, mlp; None is Megatron's [core_attn]."""


@dataclass(frozen=True)
class TrainabilityConfig:
    """What is trained. Defaults are stage 2; stage 1 sets `freeze_language_model: true`."""

    freeze_language_model: bool = False
    """Freeze embedding, decoder layers, final norm and LM head."""
    freeze_mm_mlp_adapter: bool = False
    """Freeze the projector."""
    freeze_mm_inv_projector: bool = False
    """Freeze the denoiser."""
    unfreeze_mm_vision_tower: bool = False
    """Train the vision tower, too."""
    train_denoiser_position_table: bool | None = None
    """The sin-cos table: None trains it exactly when the language model is frozen, as the published stage 1."""


@dataclass(frozen=True)
class LossConfig:
    """How losses are formed and normalised."""

    loss_mode: Literal["token_mean", "reference"] = "token_mean"
    """`token_mean`: sums over the global batch divided by its supervised tokens and real images; `reference`: the mean
    of microbatch means, with text-only samples diluting the reconstruction loss, as published."""
    lm_loss_weight: float = 1.0
    """0 trains on images alone: the LM head does not run, answers are not supervised, and records need none."""
    recon_loss_weight: float = 1.0
    """0 trains without reconstruction: neither denoiser nor VAE runs."""
    recon_objective: Literal["denoise", "regress"] = "denoise"
    """`denoise`: predict the noise in noised latents, as published; `regress`: the same network gives the clean latents
    in one pass, from the language model's outputs alone."""
    num_noise_draws: int = 4
    """K: independent (timestep, noise) draws per image; `regress` draws nothing."""
    seed: int = 42
    """Of the order of samples and of all noise."""

    @property
    def supervises_text(self) -> bool:
        """The language loss counts; otherwise no token has a label."""
        return self.lm_loss_weight > 0

    @property
    def denoiser_passes(self) -> int:
        """How often the denoiser runs on every image."""
        if self.recon_loss_weight == 0:
            return 0
        return self.num_noise_draws if self.recon_objective == "denoise" else 1


@dataclass(frozen=True)
class OptimizerSettings:
    """AdamW and its schedule."""

    optimizer_impl: Literal["auto", "transformer_engine", "apex", "torch"] = "auto"
    """Whose fused AdamW; `auto` takes the first of them that is installed and runs here."""
    lr: float = 1e-3
    """Highest learning rate, of every part that has none of its own."""
    min_lr: float = 0.0
    """Learning rate at the end of the decay."""
    mm_projector_lr: float | None = None
    """Learning rate of the projector; None is lr."""
    mm_inv_projector_lr: float | None = None
    """Learning rate of the denoiser; None is lr."""
    mm_vision_tower_lr: float | None = None
    """Learning rate of the vision tower, where it is trained; None is lr."""
    lr_decay_style: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls from lr to min_lr after the warm-up."""
    lr_warmup_fraction: float | None = 0.03
    """Share of the steps with rising learning rate, from 0; rounded up. Where batch sizes change: of the samples."""
    lr_warmup_iters: int | None = None
    """The same as a number of steps; overrides lr_warmup_fraction."""
    lr_continue: Literal["constant", "rewarm", "schedule"] | None = None
    """The learning rate of a run that had ended and is made longer: `constant` is lr all the time, `rewarm` a new
    warm-up and decay over what is left, `schedule` what a run of the whole length has there. None refuses to go on."""
    weight_decay: float = 0.0
    """AdamW's, of matrices; not of biases and norms."""
    adam_beta1: float = 0.9
    """Decay of the running mean of gradients."""
    adam_beta2: float = 0.999
    """Decay of the running mean of squared gradients."""
    adam_eps: float = 1e-8
    """Added to the root of the second moment."""
    clip_grad: float = 0.0
    """Clip gradients to this global norm; 0 does not clip, as the published recipes."""
    skip_nonfinite_steps: int = 0
    """How many steps with NaN or Inf gradients may be skipped before the run stops."""
    max_empty_steps: int = 20
    """So many steps in a row that train nothing stop the run, or an epoch of them, or a run, if that is shorter: steps
    without a supervised token (with lm_loss_weight 0: without an image), or with a gradient norm of exactly 0."""

    @property
    def moves_weights(self) -> bool:
        """Whether any learning rate is above 0."""
        return any((self.lr, self.mm_projector_lr, self.mm_inv_projector_lr, self.mm_vision_tower_lr))


@dataclass(frozen=True)
class DataConfig:
    """Where samples come from and how they are batched."""

    data_path: str = ""
    """JSON or JSONL, parquet, or WebDataset tars ("shards/{000000..000099}.tar"), with records of the forms in
    docs/data.md; local, or a URL of fsspec."""
    image_folder: str = ""
    """Where the image names of a JSON file start."""
    allow_image_symlinks: bool = False
    """Follow symbolic links out of image_folder, for data sets that are linked in from other disks. For records you
    trust: a name then reaches whatever a link in image_folder points to. It still cannot leave the folder by `..`."""
    blend: list[dict[str, Any]] = field(default_factory=list)
    """Several sources instead of data_path: a list of {data_path, image_folder, weight or epochs}; see docs/data.md."""
    valid_data_path: str = ""
    """Samples for validation, in the formats of data_path."""
    valid_image_folder: str = ""
    """Where the image names of valid_data_path start."""
    valid_split: float = 0.0
    """Instead of valid_data_path: share of the training samples (of every source of a blend) that is held out for
    validation and never trained on; the same ones whatever the seed."""
    template: Literal["plain", "qwen_2", "v1", "llama3"] = "qwen_2"
    """How conversations become text: `plain` (captions, stage 1), `qwen_2`, `v1` (Vicuna) or `llama3`; it must fit
    the tokenizer."""
    seq_length: int = 2048
    """Longest sample in tokens, images included; longer ones are truncated."""
    micro_batch_size: int = 1
    """Samples (or packs) of one forward pass on one data-parallel rank."""
    global_batch_size: int = 8
    """Samples (or packs) of one optimizer step, over all ranks."""
    group_by_modality_length: bool = False
    """Order samples by modality and length as the published sampler does; otherwise a plain shuffle."""
    packing: bool = False
    """Pack several samples into sequences of seq_length tokens; samples never attend to each other."""
    packing_lookahead: int = 64
    """Samples that packing may choose from."""
    image_aspect_ratio: Literal["square", "pad"] | None = None
    """How an image becomes square: `pad` in the mean colour, or `square`, by the tower's own processor (CLIP's crops
    the centre, SigLIP's stretches). None is the checkpoint's; the run's checkpoints keep what it was trained with."""
    image_conversion: Literal["viewer", "published"] | None = None
    """How an image file becomes 8-bit RGB: as a viewer shows it (16-bit and float scaled, transparency on white, EXIF
    orientation), or as `published`, which clips, drops and ignores these. None is `viewer`, but a run that resumes
    goes on with what its checkpoint was trained with; the run's checkpoints keep it."""
    image_decoder: Literal["pillow", "dali"] = "pillow"
    """`pillow` resizes exactly as the published preprocessing; `dali` is NVIDIA DALI, on the GPU where there is one."""
    latent_cache: str = ""
    """Folder of VAE moments that tools/cache_latents.py wrote: training reads them and loads no VAE."""
    num_workers: int = 4
    """Threads per rank that decode images."""
    max_bad_sample_share: float = 0.01
    """Broken samples are skipped and written to a quarantine file; above this share of the samples consumed so far (of
    1,000 or the whole set, until so many are consumed) the run stops."""
    max_mismatch_share: float = 0.01
    """The same for samples masked because their tokens do not add up (`tokenization mismatch`)."""
    num_prefetch_steps: int = 2
    """Global batches prepared ahead by a background thread."""


@dataclass(frozen=True)
class TrainingConfig:
    """Length of the run, checkpoints and logs."""

    train_iters: int | None = None
    """Optimizer steps; None trains `num_epochs`."""
    num_epochs: float = 1.0
    """Passes over the data, unless train_iters is given; may be a fraction."""
    save: str = ""
    """Run folder; checkpoints go to <save>/checkpoints. Empty saves nothing."""
    save_interval: int | None = None
    """Save every this many steps, and at the end."""
    async_save: bool = False
    """Write checkpoints in a thread beside training, from a copy in CPU memory."""
    save_retain_last: int | None = None
    """Keep this many of the newest checkpoints; None keeps all (or the newest, where save_retain_interval is set)."""
    save_retain_interval: int | None = None
    """Keep every checkpoint whose iteration is a multiple of this, besides the newest."""
    save_failure: Literal["stop", "continue"] = "stop"
    """What follows when a checkpoint cannot be written: the run ends, or trains on and tries again at the next."""
    save_trainable_only: bool = False
    """Checkpoints of stage 1 without the frozen weights; they name the checkpoint that holds those."""
    load: str = ""
    """Resume from this run's checkpoints (weights, optimizer, schedule, data position)."""
    init_from: str = ""
    """Start from the weights of this checkpoint."""
    verify_checkpoint: bool = False
    """Compare the files of the checkpoint to load with its checksums first."""
    log_interval: int = 10
    """Print and log metrics every this many steps."""
    tensorboard: bool = True
    """Write TensorBoard files to <save>/tensorboard."""
    wandb_project: str = ""
    """Log to Weights & Biases under this project; needs the extra `wandb`, and save, where the run's id is kept."""
    preemption_grace_seconds: float = 120.0
    """After SIGTERM or SIGUSR1: time to finish the step and save before a rank gives up."""
    hang_timeout_minutes: float = 20.0
    """A step, save or load that takes longer ends the run, and every rank prints where it stands; 0 waits for ever."""
    rerun_mode: Literal["disabled", "validate_results", "report_determinism_stats"] = "disabled"
    """Megatron's rerun state machine: repeat a step whose loss is not finite, or every step, on the same data."""
    loss_spike_factor: float = 3.0
    """Warn of a loss above this many medians of the last hundred steps; 0 never warns."""
    log_straggler: bool = False
    """Report the slowest and fastest ranks with every log line (Megatron's detector; GPUs only)."""


@dataclass(frozen=True)
class ObservationConfig:
    """Looking at a run while it trains (docs/observing.md). None of it changes what is trained; off by default."""

    eval_interval: int | None = None
    """Validate every this many steps, and at the end; needs valid_data_path or valid_split."""
    eval_iters: int | None = None
    """Global batches per validation, always the same ones; None takes all of the held-out samples."""
    sample_interval: int | None = None
    """Paint and answer held-out samples every this many steps, and at the end; needs held-out samples and save."""
    num_pictures: int = 4
    """Held-out images to reconstruct; 0 reconstructs none."""
    picture_steps: str = "50"
    """Sampling steps of the denoiser, or one number for each of several equal ranges of timesteps, as in "20,20,5"."""
    num_answers: int = 4
    """Held-out questions to answer greedily; 0 answers none."""
    answer_max_new_tokens: int = 16
    """Longest answer; every token costs a forward pass of these questions."""
    log_timestep_buckets: int = 0
    """Log the reconstruction loss in this many equal ranges of timesteps; 0 does not."""
    log_source_losses: bool = False
    """Log both losses of every source of a blend."""


SECTIONS: dict[str, type] = {
    "parallel": ParallelConfig,
    "compute": ComputeConfig,
    "trainability": TrainabilityConfig,
    "loss": LossConfig,
    "optimizer": OptimizerSettings,
    "data": DataConfig,
    "training": TrainingConfig,
    "observation": ObservationConfig,
}


@dataclass(frozen=True)
class RunConfig:
    """All sections of a run."""

    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    trainability: TrainabilityConfig = field(default_factory=TrainabilityConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    data: DataConfig = field(default_factory=DataConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    observation: ObservationConfig = field(default_factory=ObservationConfig)

    @classmethod
    def from_flat(cls, flat: dict[str, Any]) -> RunConfig:
        """Sections from flat keys.

        Raises:
            ValueError: an unknown key.
        """
        left = dict(flat)
        sections = {
            name: section(**{f.name: left.pop(f.name) for f in fields(section) if f.name in left})
            for name, section in SECTIONS.items()
        }
        if left:
            raise ValueError(f"unknown setting(s) {', '.join(sorted(left))}; see --help for the list")
        return cls(**sections)

    def to_flat(self) -> dict[str, Any]:
        """The inverse of `from_flat`, in section order."""
        return {
            f.name: getattr(section, f.name)
            for section in (getattr(self, name) for name in SECTIONS)
            for f in fields(section)
        }
