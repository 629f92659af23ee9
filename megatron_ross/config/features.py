"""What a run's settings ask of the machine: chosen where they leave a choice, refused where it cannot be had.

Everything is decided from a run's settings and an `Available`, before any process group is made. Each refusal is one
line: setting, value, why not, and what to install or change.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from megatron_ross.compat import Available
from megatron_ross.config.cli import ConfigError
from megatron_ross.config.layout import StageLayout
from megatron_ross.config.model import LanguageModelConfig
from megatron_ross.config.schema import ComputeConfig, OptimizerSettings, RunConfig

ENGINE_MINIMUM = (2, 9)
FUSED_ATTENTION_MINIMUM = (8, 0)
PACKED_CUDNN_MINIMUM = (9, 0)
"""cuDNN keeps packed samples apart from Hopper on; before, only flash-attn 2 does."""
RECOMPUTABLE = ("core_attn", "mlp")
"""Not layernorm: TransformerEngine's layers have theirs inside linear layers, and without it Megatron cannot."""
_INSTALL_ENGINE = "pip install --no-build-isolation -e '.[te]' (see docs/performance.md)"
_BUILD_APEX = (
    "build NVIDIA's Apex from source with APEX_CPP_EXT=1 APEX_CUDA_EXT=1 (`pip install apex` gets another package)"
)


@dataclass(frozen=True)
class Choice:
    """What is used, and why."""

    name: str
    why: str


@dataclass(frozen=True)
class Features:
    """Implementations that a run uses on a machine.

    layers: transformer_engine, local. attention: auto (TransformerEngine chooses), flash, fused, unfused, local
    (PyTorch's). adam: transformer_engine, apex, torch.
    """

    layers: Choice
    attention: Choice
    adam: Choice

    @property
    def transformer_engine(self) -> bool:
        """Decoder layers are TransformerEngine's."""
        return self.layers.name == "transformer_engine"


@dataclass(frozen=True)
class _Obstacle:
    reason: str
    fix: str


def resolve_features(run: RunConfig, available: Available) -> Features:
    """Implementations for a run on a machine.

    Raises:
        ConfigError: the first setting that this machine or another setting does not allow.
    """
    layers = _choose_layers(run.compute, available)
    attention = _choose_attention(run, available, layers)
    adam = _choose_adam(run.optimizer, available)
    features = Features(layers, attention, adam)
    _check_fp8(run, available, features)
    _check_tower(run)
    _check_recompute(run.compute)
    _check_data_parallel_overlap(run)
    _check_tensor_parallel_overlap(run, available, features)
    _check_accumulation_fusion(run.compute, available, features)
    if run.training.log_straggler:
        _check_straggler(available)
    if run.training.wandb_project and not available.wandb:
        reason = "the package wandb is not installed"
        raise refuse("wandb_project", run.training.wandb_project, reason, "pip install -e '.[wandb]'")
    return features


def _check_straggler(available: Available) -> None:
    if available.gpu is None:
        raise refuse(
            "log_straggler", True, "Megatron's detector times CUDA events, and torch sees no GPU", "leave it out"
        )
    if not available.nvml:
        reason = "Megatron's detector reads the GPU's temperature, power and clock through pynvml, which is missing"
        raise refuse("log_straggler", True, reason, "pip install nvidia-ml-py")


def refuse(name: str, value: object, reason: str, fix: str) -> ConfigError:
    """An error in the form that all of them have."""
    return ConfigError(f"{name}={value!r}: {reason}; {fix}")


def _engine_obstacle(available: Available) -> _Obstacle | None:
    """Why TransformerEngine cannot be used here."""
    if available.gpu is None:
        return _Obstacle("TransformerEngine needs a GPU, and torch sees none", "leave it out, or run on a GPU")
    if available.transformer_engine_error:
        reason = f"TransformerEngine cannot be imported ({available.transformer_engine_error})"
        return _Obstacle(reason, f"reinstall it for this torch and CUDA: {_INSTALL_ENGINE}")
    if not available.transformer_engine:
        return _Obstacle("TransformerEngine is not installed", _INSTALL_ENGINE)
    if _version(available.transformer_engine) < ENGINE_MINIMUM:
        return _Obstacle(
            f"TransformerEngine {available.transformer_engine} is older than {_dotted(ENGINE_MINIMUM)}", _INSTALL_ENGINE
        )
    return None


def _choose_layers(compute: ComputeConfig, available: Available) -> Choice:
    if compute.transformer_impl == "local":
        return Choice("local", "transformer_impl=local")
    obstacle = _engine_obstacle(available)
    if obstacle is None:
        return Choice("transformer_engine", f"TransformerEngine {available.transformer_engine}")
    if compute.transformer_impl == "transformer_engine":
        raise refuse("transformer_impl", compute.transformer_impl, obstacle.reason, obstacle.fix)
    return Choice("local", obstacle.reason)


def _choose_attention(run: RunConfig, available: Available, layers: Choice) -> Choice:
    asked = run.compute.attention_backend
    if asked == "local":
        return Choice("local", "attention_backend=local: PyTorch's scaled_dot_product_attention")
    obstacle = _attention_obstacle(run, available, layers, asked)
    if obstacle is None:
        by_engine = {"auto": "TransformerEngine chooses between cuDNN and flash-attn"}
        return Choice(asked, by_engine.get(asked, f"attention_backend={asked}, through TransformerEngine"))
    if asked == "auto":
        return Choice("local", f"PyTorch's scaled_dot_product_attention: {obstacle.reason}")
    raise refuse("attention_backend", asked, obstacle.reason, obstacle.fix)


def _attention_obstacle(run: RunConfig, available: Available, layers: Choice, asked: str) -> _Obstacle | None:
    """Why TransformerEngine's attention cannot be what was asked for."""
    if layers.name == "local":
        fix = _INSTALL_ENGINE if available.gpu else "use auto or local"
        return _Obstacle(f"decoder layers are not TransformerEngine's ({layers.why})", fix)
    if asked != "unfused":
        if not run.compute.bf16:
            return _Obstacle("fused attention has no fp32", "set bf16: true, or use local")
        if available.gpu is not None and available.gpu < FUSED_ATTENTION_MINIMUM:
            return _Obstacle(
                f"fused attention needs compute capability 8.0, this GPU has {_dotted(available.gpu)}", "use local"
            )
    if asked == "unfused" and run.data.packing:
        return _Obstacle(
            "it cannot keep packed samples apart", "use auto, flash, fused or local, or set packing: false"
        )
    if asked == "flash" and (reason := _no_flash(available)):
        return _Obstacle(reason, "pip install -e '.[flash-attn]', or use auto")
    if run.data.packing and available.gpu is not None and available.gpu < PACKED_CUDNN_MINIMUM:
        too_old = f"cuDNN needs compute capability 9.0 for packed samples, this GPU has {_dotted(available.gpu)}"
        if asked == "fused":
            return _Obstacle(too_old, "use auto, flash or local, or set packing: false")
        if asked == "auto" and (reason := _no_flash(available)):
            return _Obstacle(f"{too_old}, and {reason}", "pip install -e '.[flash-attn]'")
    for name, expected in attention_environment(asked).items():
        if available.environment.get(name, expected) != expected:
            return _Obstacle(
                f"the environment has {name}={available.environment[name]}", f"unset {name}: the setting decides"
            )
    return None


def _no_flash(available: Available) -> str:
    """Why TransformerEngine has no flash-attn on this GPU; empty if it has."""
    if not available.flash_attention:
        return "no flash-attn is installed"
    generation = available.flash_attention.replace("_", "-").split()[0]
    if generation in ("flash-attn-3", "flash-attn-4") and (available.gpu or (0, 0)) < PACKED_CUDNN_MINIMUM:
        return f"{available.flash_attention} needs compute capability 9.0"
    return ""


def attention_environment(backend: str) -> dict[str, str]:
    """The variables by which TransformerEngine is told its attention; none for `auto` and `local`."""
    if backend in ("auto", "local"):
        return {}
    return {f"NVTE_{kind.upper()}_ATTN": str(int(kind == backend)) for kind in ("flash", "fused", "unfused")}


def _choose_adam(settings: OptimizerSettings, available: Available) -> Choice:
    asked = settings.optimizer_impl
    obstacles = {"transformer_engine": _engine_obstacle(available), "apex": _apex_obstacle(available), "torch": None}
    if asked != "auto":
        if (obstacle := obstacles[asked]) is not None:
            raise refuse("optimizer_impl", asked, obstacle.reason, obstacle.fix)
        return Choice(asked, f"optimizer_impl={asked}")
    name = next(name for name, obstacle in obstacles.items() if obstacle is None)
    passed_over = [obstacle.reason for obstacle in obstacles.values() if obstacle is not None]
    return Choice(name, " and ".join(passed_over) if name == "torch" else "the first of TransformerEngine, Apex, torch")


def _apex_obstacle(available: Available) -> _Obstacle | None:
    if available.gpu is None:
        return _Obstacle("Apex needs a GPU", "leave it out, or run on a GPU")
    if not available.apex_adam:
        return _Obstacle("NVIDIA's Apex is not installed with its CUDA extensions", _BUILD_APEX)
    return None


def fp8_multiple(compute: ComputeConfig) -> int:
    """What the sizes of FP8 products must be multiples of."""
    return 32 if compute.fp8_recipe == "mxfp8" else 16


def sequence_multiple(run: RunConfig) -> int:
    """What the padded length of a microbatch must be a multiple of: its shards go into FP8 products, or to ranks."""
    parallel, compute = run.parallel, run.compute
    shards = parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1
    if compute.fp8 is None:
        return shards
    # Blocks of 128 tokens let gathers under sequence parallelism stay in FP8; user buffers take MXFP8 in no other size.
    in_blocks = compute.fp8_recipe == "blockwise" or (compute.fp8_recipe == "mxfp8" and parallel.tp_comm_overlap)
    return shards * (128 if in_blocks else fp8_multiple(compute))


def _check_fp8(run: RunConfig, available: Available, features: Features) -> None:
    compute = run.compute
    if compute.fp8 is None:
        if compute.first_last_layers_bf16:
            raise refuse(
                "first_last_layers_bf16", True, "there is no fp8 to keep layers out of", "set fp8, or leave it out"
            )
        return
    if not features.transformer_engine:
        obstacle = _engine_obstacle(available) or _Obstacle(features.layers.why, "leave transformer_impl at auto")
        raise refuse("fp8", compute.fp8, f"needs TransformerEngine's layers, and {obstacle.reason}", obstacle.fix)
    if not compute.bf16:
        raise refuse("fp8", compute.fp8, "parameters are fp32", "set bf16: true")
    _check_fp8_hardware(compute, available)
    _check_fp8_recipe(compute)
    multiple = sequence_multiple(run)
    if run.data.packing and run.data.seq_length % multiple:
        reason = f"with fp8_recipe={compute.fp8_recipe} packs must be a multiple of {multiple} tokens"
        raise refuse("seq_length", run.data.seq_length, reason, f"use {run.data.seq_length // multiple * multiple}")


def _check_fp8_hardware(compute: ComputeConfig, available: Available) -> None:
    """As TransformerEngine asks for each recipe."""
    recipe, gpu = compute.fp8_recipe, available.gpu or (0, 0)
    minimum = {"blockwise": (9, 0), "mxfp8": (10, 0)}.get(recipe, (8, 9))
    if gpu < minimum:
        reason = f"fp8_recipe={recipe} needs compute capability {_dotted(minimum)}, this GPU has {_dotted(gpu)}"
        fix = "use fp8_recipe tensorwise or delayed" if gpu >= (8, 9) else "leave fp8 out on this GPU"
        raise refuse("fp8", compute.fp8, reason, fix)
    if recipe == "mxfp8" and gpu >= (12, 0):
        raise refuse(
            "fp8_recipe", recipe, "TransformerEngine has no mxfp8 for compute capability 12.0", "use tensorwise"
        )
    if recipe == "blockwise" and _version(available.cuda) < (12, 9):
        reason = f"needs CUDA 12.9, torch was built for {available.cuda or 'none'}"
        raise refuse("fp8_recipe", recipe, reason, "use tensorwise, or a torch for CUDA 12.9 or newer")


def _check_fp8_recipe(compute: ComputeConfig) -> None:
    delayed = compute.fp8_recipe == "delayed"
    if delayed and compute.first_last_layers_bf16:
        reason = "one scaling context spans all layers with fp8_recipe=delayed"
        raise refuse("first_last_layers_bf16", True, reason, "use fp8_recipe tensorwise or blockwise, or leave it out")
    if delayed:
        return
    defaults = ComputeConfig()
    for name in ("fp8_margin", "fp8_amax_history_len", "fp8_amax_compute_algo", "fp8_wgrad"):
        if (value := getattr(compute, name)) != getattr(defaults, name):
            reason = f"acts with fp8_recipe=delayed only, and it is {compute.fp8_recipe}"
            raise refuse(name, value, reason, "leave it out, or use delayed")


def check_fp8_sizes(run: RunConfig, language: LanguageModelConfig, layout: StageLayout) -> None:
    """The decoder's matrices can be multiplied in FP8, and layers kept in bf16 fit the layout.

    Raises:
        ConfigError: a size or a number of layers does not fit.
    """
    compute, tp = run.compute, run.parallel.tensor_model_parallel_size
    if compute.fp8 is None:
        return
    multiple = fp8_multiple(compute)
    sizes = {
        "hidden_size": language.hidden_size,
        "ffn_hidden_size": language.ffn_hidden_size // tp,
        "width of all heads": language.num_attention_heads * language.kv_channels // tp,
        "width of all query groups": language.num_query_groups * language.kv_channels // tp,
    }
    for name, size in sizes.items():
        if size % multiple:
            reason = f"each rank's {name} is {size}, and FP8 products need multiples of {multiple}"
            raise refuse("fp8", compute.fp8, reason, "leave fp8 out, or change tensor_model_parallel_size")
    most = language.num_layers // layout.pipeline_model_parallel_size
    for name in ("num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16"):
        count = getattr(compute, name)
        if compute.first_last_layers_bf16 and not 0 <= count <= most:
            raise refuse(name, count, f"a pipeline rank has {most} layers", f"use 0 to {most}")


def _check_tower(run: RunConfig) -> None:
    if run.compute.vision_tower_dtype == "tf32" and run.trainability.unfreeze_mm_vision_tower:
        raise refuse(
            "vision_tower_dtype", "tf32", "a tower that is trained would use TF32 forwards only", "use fp32 or bf16"
        )


def _check_recompute(compute: ComputeConfig) -> None:
    granularity, method, layers = compute.recompute_granularity, compute.recompute_method, compute.recompute_num_layers
    if granularity == "full":
        if method is None:
            raise refuse("recompute_granularity", "full", "recompute_method is not set", "set it to uniform or block")
        if layers is None or layers < 1:
            reason = "full recomputation needs how many layers go together (uniform) or at all (block)"
            raise refuse("recompute_num_layers", layers, reason, "set it to 1 or more")
    else:
        for name, value in {"recompute_method": method, "recompute_num_layers": layers}.items():
            if value is not None:
                raise refuse(name, value, "is for recompute_granularity=full", "set that, or leave this out")
    if compute.recompute_modules is not None:
        _check_recompute_modules(compute)


def check_recompute_groups(run: RunConfig, layout: StageLayout) -> None:
    """Layers that are recomputed together divide every stage: Megatron asks for layers beyond the last otherwise.

    Raises:
        ConfigError: names the groups that work with the layout.
    """
    compute = run.compute
    size = compute.recompute_num_layers
    if compute.recompute_granularity != "full" or compute.recompute_method != "uniform" or not size:
        return
    stages = [stage for stage in layout.stages if stage.num_layers]
    wrong = next((stage for stage in stages if stage.num_layers % size), None)
    if wrong is not None:
        common = math.gcd(*(stage.num_layers for stage in stages))
        works = ", ".join(str(n) for n in range(1, common + 1) if common % n == 0)
        raise refuse(
            "recompute_num_layers",
            size,
            f"recompute_method=uniform makes groups of so many layers, and stage {wrong.index} of layout {layout} has "
            f"{wrong.num_layers}",
            f"use {works}, or recompute_method: block",
        )


def _check_recompute_modules(compute: ComputeConfig) -> None:
    modules = compute.recompute_modules or []
    if compute.recompute_granularity != "selective":
        reason = f"recompute_granularity is {compute.recompute_granularity}"
        raise refuse("recompute_modules", modules, reason, "set it to selective, or leave recompute_modules out")
    if not modules or set(modules) - set(RECOMPUTABLE):
        raise refuse(
            "recompute_modules", modules, "not what can be recomputed here", f"list some of {', '.join(RECOMPUTABLE)}"
        )


def _check_data_parallel_overlap(run: RunConfig) -> None:
    parallel = run.parallel
    if parallel.overlap_param_gather and not parallel.overlap_grad_reduce:
        raise refuse("overlap_param_gather", True, "overlap_grad_reduce is false", "set overlap_grad_reduce: true, too")
    size = parallel.ddp_bucket_size
    if size is not None and (size < 1 or not parallel.overlap_grad_reduce):
        reason = "must be at least 1" if size < 1 else "without overlap_grad_reduce there is one message"
        raise refuse("ddp_bucket_size", size, reason, "leave it out" if size < 1 else "set overlap_grad_reduce: true")


def _check_tensor_parallel_overlap(run: RunConfig, available: Available, features: Features) -> None:
    """What TransformerEngine's user buffers need: they have one size, and are filled while products run."""
    parallel = run.parallel
    if not parallel.tp_comm_overlap:
        return
    if not features.transformer_engine:
        obstacle = _engine_obstacle(available) or _Obstacle(features.layers.why, "leave transformer_impl at auto")
        reason = f"needs TransformerEngine's layers, and {obstacle.reason}"
        raise refuse("tp_comm_overlap", True, reason, obstacle.fix)
    needs = {
        "tensor_model_parallel_size is 1": (parallel.tensor_model_parallel_size > 1, "leave it out"),
        "sequence_parallel is false": (parallel.sequence_parallel, "set sequence_parallel: true"),
        "bf16 is false": (run.compute.bf16, "set bf16: true"),
        "the buffers have one size, and padded microbatches have many": (run.data.packing, "set packing: true"),
    }
    for reason, (holds, fix) in needs.items():
        if not holds:
            raise refuse("tp_comm_overlap", True, reason, fix)
    if run.compute.fp8 and run.compute.fp8_recipe == "blockwise":
        reason = "TransformerEngine's user buffers do not send what fp8_recipe=blockwise makes"
        raise refuse("tp_comm_overlap", True, reason, "use fp8_recipe tensorwise or delayed, or leave it out")
    connections = available.environment.get("CUDA_DEVICE_MAX_CONNECTIONS")
    if available.gpu is not None and available.gpu < (10, 0) and connections != "1":
        reason = f"the environment has CUDA_DEVICE_MAX_CONNECTIONS={connections}, so messages may wait behind products"
        raise refuse("tp_comm_overlap", True, reason, "export CUDA_DEVICE_MAX_CONNECTIONS=1 before starting")


def _check_accumulation_fusion(compute: ComputeConfig, available: Available, features: Features) -> None:
    if not compute.gradient_accumulation_fusion or features.transformer_engine or available.apex_wgrad:
        return
    reason = f"decoder layers are local ({features.layers.why}) and Apex's fused_weight_gradient_mlp_cuda is missing"
    fix = "leave it out" if available.gpu is None else f"{_INSTALL_ENGINE}, or {_BUILD_APEX}"
    raise refuse("gradient_accumulation_fusion", True, reason, fix)


def _version(text: str) -> tuple[int, ...]:
    """Leading numbers of a version: "2.20.2+abc" -> (2, 20, 2); () for an empty one."""
    return tuple(int(n) for n in re.findall(r"\d+", re.split(r"[^0-9.]", text)[0]))


def _dotted(numbers: tuple[int, ...]) -> str:
    return ".".join(str(n) for n in numbers)
