"""The table of features that is printed before the first step: what is on, what is off, and why."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_ross.compat import Available
from megatron_ross.config.features import Features
from megatron_ross.config.layout import StageLayout
from megatron_ross.config.schema import ComputeConfig, RunConfig
from megatron_ross.ops import kernel_choice


@dataclass(frozen=True)
class FeatureRow:
    """`state` is on, off, or which of several was taken."""

    feature: str
    state: str
    why: str


def feature_table(rows: list[FeatureRow]) -> str:
    """Aligned columns, one feature per line."""
    cells = [("feature", "on/off", "why"), *((row.feature, row.state, row.why) for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(2)]
    return "\n".join(f"{name:<{widths[0]}}  {state:<{widths[1]}}  {why}" for name, state, why in cells)


def feature_rows(
    run: RunConfig, features: Features, available: Available, layout: StageLayout, data_parallel_size: int
) -> list[FeatureRow]:
    """All features that make a run faster or smaller, in the order of the model, then of its parallelism."""
    return [
        *_kernels(run, features, available),
        *_precision(run.compute),
        *_memory(run.compute, features),
        *_data_parallel(run, data_parallel_size),
        *_model_parallel(run, layout),
        *_data(run),
    ]


def _row(feature: str, setting: str, value: object, *, on: str = "", off: str = "") -> FeatureRow:
    """A feature that one setting turns on."""
    reason = on if value else off
    return FeatureRow(feature, "on" if value else "off", f"{setting}={value}" + (f": {reason}" if reason else ""))


def _kernels(run: RunConfig, features: Features, available: Available) -> list[FeatureRow]:
    uses_triton, why = kernel_choice("cpu" if available.gpu is None else "cuda")
    return [
        FeatureRow("TransformerEngine layers", "on" if features.transformer_engine else "off", features.layers.why),
        FeatureRow("attention", _ATTENTION[features.attention.name], features.attention.why),
        FeatureRow("fused rotary embedding", "on" if features.transformer_engine else "off", "part of those layers"),
        FeatureRow("fused AdamW", _ADAM[features.adam.name], features.adam.why),
        FeatureRow("Triton kernels", "on" if uses_triton else "off", why),
        _row(
            "gradient accumulation fusion",
            "gradient_accumulation_fusion",
            run.compute.gradient_accumulation_fusion,
            on="TransformerEngine's" if features.transformer_engine else "Apex's",
        ),
    ]


_ATTENTION = {"auto": "fused", "flash": "flash-attn", "fused": "cuDNN", "unfused": "plain", "local": "PyTorch"}
_ADAM = {"transformer_engine": "TransformerEngine", "apex": "Apex", "torch": "PyTorch"}


def _precision(compute: ComputeConfig) -> list[FeatureRow]:
    decoder = "bf16" if compute.bf16 else "fp32"
    fp8 = f"recipe {compute.fp8_recipe}"
    if compute.first_last_layers_bf16:
        fp8 += (
            f", {compute.num_layers_at_start_in_bf16} first and {compute.num_layers_at_end_in_bf16} last layers in bf16"
        )
    tower = compute.vision_tower_dtype or decoder
    return [
        FeatureRow("decoder precision", decoder, f"bf16={compute.bf16}"),
        _row("FP8 products in the decoder", "fp8", compute.fp8, on=fp8),
        FeatureRow("vision tower precision", tower, f"vision_tower_dtype={compute.vision_tower_dtype}"),
        FeatureRow("denoiser precision", compute.denoiser_dtype, f"denoiser_dtype={compute.denoiser_dtype}"),
    ]


def _memory(compute: ComputeConfig, features: Features) -> list[FeatureRow]:
    granularity = compute.recompute_granularity
    modules = compute.recompute_modules or ["core_attn"]
    what = f"{compute.recompute_method}, {compute.recompute_num_layers} layers" if granularity == "full" else ""
    if granularity == "selective":
        what = ", ".join(modules)
        if modules == ["core_attn"] and features.attention.name != "unfused":
            what += " (this attention keeps no scores: little to gain)"
    return [_row("recomputation", "recompute_granularity", granularity, on=what)]


def _data_parallel(run: RunConfig, size: int) -> list[FeatureRow]:
    parallel = run.parallel
    alone = "data-parallel size 1, nothing is sent" if size == 1 else ""
    return [
        _row("gradient reduction overlap", "overlap_grad_reduce", parallel.overlap_grad_reduce, on=alone, off=alone),
        _row("parameter gather overlap", "overlap_param_gather", parallel.overlap_param_gather, on=alone, off=alone),
    ]


def _model_parallel(run: RunConfig, layout: StageLayout) -> list[FeatureRow]:
    parallel = run.parallel
    one_rank = "tensor-parallel size 1, nothing is sent" if parallel.tensor_model_parallel_size == 1 else ""
    sequence = parallel.sequence_parallel and not one_rank
    interleaved = layout.virtual_pipeline_model_parallel_size is not None
    stages = f"{len(layout.stages)} stages on {layout.pipeline_model_parallel_size} ranks"
    p2p = "the schedule is interleaved" if interleaved else f"the schedule is not interleaved: {stages}"
    return [
        FeatureRow(
            "sequence parallelism",
            "on" if sequence else "off",
            f"sequence_parallel={parallel.sequence_parallel}" + (f": {one_rank}" if one_rank else ""),
        ),
        _row("tensor-parallel overlap", "tp_comm_overlap", parallel.tp_comm_overlap, on="user buffers", off=one_rank),
        FeatureRow("pipeline send overlap", "on" if interleaved else "off", p2p),
    ]


def _data(run: RunConfig) -> list[FeatureRow]:
    cached = bool(run.data.latent_cache)
    return [
        _row("packing", "packing", run.data.packing),
        FeatureRow("cached latents", "on" if cached else "off", f"latent_cache={run.data.latent_cache!r}"),
    ]
