"""Models of the step benchmark: the 7B model's proportions at the size of a CPU, of a test, and of one GPU.

`cpu` divides every width of Qwen2-7B + SigLIP so400m + denoiser + FLUX VAE by seven and every depth by three and a
half, rounded to what attention heads and group norms allow. The vocabulary of 32000 is Vicuna's, and so is the width of
the MLP by default: the LM head's share of the work depends on both. Images keep their size of 729 tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from megatron_ross.config.model import DenoiserConfig, RossModelConfig, VaeConfig, VisionConfig
from megatron_ross.convert.known_models import known_model

SizeName = Literal["cpu", "tiny", "gpu"]
QWEN2_MLP_RATIO, VICUNA_MLP_RATIO = 18944 / 3584, 11008 / 4096


@dataclass(frozen=True)
class Texts:
    """Lengths of a stage's texts, log-normal in tokens, and the share of samples without an image."""

    mean: float
    sigma: float
    supervised: float
    """Share of a text's tokens with a label."""
    text_only: float = 0.0


CAPTIONS = Texts(mean=24, sigma=0.4, supervised=0.98)
"""Stage 1: the template `plain` supervises the caption and drops the question."""
CONVERSATIONS = Texts(mean=180, sigma=0.8, supervised=0.65, text_only=0.1)
"""Stage 2: system text, questions and answers; only answers are supervised."""


@dataclass(frozen=True)
class StepSize:
    """A model and how much of its data a step takes."""

    model: RossModelConfig
    seq_length: dict[int, int]
    """Tokens of a packed sequence, by stage of training."""
    sequences: int
    """Packed sequences in a step."""
    max_text: int


def step_size(name: SizeName, num_layers: int | None = None, mlp_ratio: float = VICUNA_MLP_RATIO) -> StepSize:
    """A size by name; `num_layers` replaces the decoder's, `mlp_ratio` is for `cpu` alone."""
    if name == "gpu":
        model = known_model("qwen2-7b+siglip-so400m")
        size = StepSize(model, {1: 3072, 2: 4096}, sequences=4, max_text=2048)
    elif name == "cpu":
        size = StepSize(_cpu_model(mlp_ratio), {1: 6144, 2: 4096}, sequences=1, max_text=1024)
    else:
        size = StepSize(_tiny_model(), {1: 96, 2: 128}, sequences=2, max_text=48)
    if num_layers is not None:
        language = replace(size.model.language, num_layers=num_layers)
        size = replace(size, model=replace(size.model, language=language))
    return size


def _cpu_model(mlp_ratio: float) -> RossModelConfig:
    return _scaled(
        language={
            "num_layers": 8,
            "hidden_size": 512,
            "ffn_hidden_size": round(512 * mlp_ratio / 32) * 32,
            "num_attention_heads": 4,
            "num_query_groups": 1,
            "kv_channels": 128,
            "vocab_size": 32000,
        },
        tower={"hidden_size": 160, "intermediate_size": 608, "num_hidden_layers": 8, "num_attention_heads": 2},
        denoiser=DenoiserConfig(depth=1, width=144, num_heads=2),
        vae={"block_out_channels": [16, 32, 64, 64], "layers_per_block": 1, "norm_num_groups": 16},
    )


def _tiny_model() -> RossModelConfig:
    return _scaled(
        language={
            "num_layers": 2,
            "hidden_size": 64,
            "ffn_hidden_size": 96,
            "num_attention_heads": 4,
            "num_query_groups": 2,
            "kv_channels": 16,
            "vocab_size": 320,
        },
        tower={
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 56,
        },
        denoiser=DenoiserConfig(depth=1, width=32, num_heads=2),
        vae={"block_out_channels": [8, 8, 8, 8], "layers_per_block": 1, "norm_num_groups": 4},
    )


def _scaled(
    language: dict[str, Any], tower: dict[str, Any], denoiser: DenoiserConfig, vae: dict[str, Any]
) -> RossModelConfig:
    """The 7B model with other sizes."""
    full = known_model("qwen2-7b+siglip-so400m")
    assert full.vae is not None
    vision: VisionConfig = replace(full.vision, hf_config={**full.vision.hf_config, **tower})
    return replace(
        full,
        language=replace(full.language, **language),
        vision=vision,
        denoiser=denoiser,
        vae=VaeConfig({**full.vae.hf_config, **vae}),
    )
