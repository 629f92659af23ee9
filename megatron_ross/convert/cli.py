"""Entry points of the two converters; `megatron_ross/cli` only parses their arguments."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch

from megatron_ross.checkpoint.locate import megatron_checkpoint
from megatron_ross.checkpoint.reader import open_checkpoint
from megatron_ross.config.model import DenoiserConfig, ProjectorConfig
from megatron_ross.convert.exporter import export_adapters, export_ross
from megatron_ross.convert.importer import ImportPlan, plan_checkpoint, plan_components, write_checkpoint

DtypeName = Literal["stored", "float32", "bfloat16", "float16"]
ExportFormat = Literal["ross", "llava", "adapters"]


def import_checkpoint(
    output: Path,
    llm: str | None = None,
    vision_tower: str | None = None,
    vae: str | None = None,
    checkpoint: str | None = None,
    projector_type: str | None = None,
    denoiser_type: str | None = None,
    denoiser_width: int | None = None,
    mm_projector: Path | None = None,
    mm_inv_projector: Path | None = None,
    seed: int = 0,
) -> None:
    """Convert Hugging Face checkpoints into one Megatron checkpoint.

    Give either `--checkpoint`, or `--llm` and `--vision-tower` (and `--vae`, unless plain LLaVA is wanted). With
    `--checkpoint` and `--vae`, a model that has no denoiser yet gets one: LLaVA becomes Ross.

    Args:
        output: folder to create.
        llm: language model, folder or hub id (Qwen2, Qwen2.5, Vicuna, Llama-2, Llama-3).
        vision_tower: SigLIP, SigLIP2 or CLIP, folder or hub id. With `checkpoint`: read where that lacks the tower's
            config or weights.
        vae: FLUX-type AutoencoderKL, folder or hub id, or FLUX's ae.safetensors. With a `checkpoint` that has a
            denoiser: read where that lacks the auto-encoder's config.
        checkpoint: whole model, folder or hub id: published Ross composite, stock LLaVA, LLaVA in its original format.
        projector_type: identity, linear or mlpNx_gelu; default: mlp2x_gelu.
        denoiser_type: denoiser_vitNx; default: denoiser_vit3x.
        denoiser_width: default: of the adapter file, else 1024 (1280 at depth 8, 1536 at depth 12).
        mm_projector: published mm_projector.bin; default: fresh.
        mm_inv_projector: published mm_inv_projector.bin; default: fresh.
        seed: of the fresh projector and denoiser.
    """
    plan: ImportPlan
    if checkpoint is not None:
        if llm is not None or mm_projector is not None or projector_type is not None:
            raise ValueError("--checkpoint is a whole model: --llm, --mm-projector and --projector-type do not apply")
        plan = plan_checkpoint(checkpoint, vision_tower, vae, denoiser_type, denoiser_width, mm_inv_projector, seed)
    elif llm is not None and vision_tower is not None:
        plan = plan_components(
            llm,
            vision_tower,
            vae,
            projector_type or ProjectorConfig().type,
            denoiser_type or DenoiserConfig().type,
            denoiser_width,
            mm_projector,
            mm_inv_projector,
            seed,
        )
    else:
        raise ValueError("give --checkpoint, or both --llm and --vision-tower")
    for note in plan.notes:
        print(f"note: {note}")
    write_checkpoint(plan, output)
    print(f"wrote {output}: {len(plan.tensors)} tensors")


def export_checkpoint(
    checkpoint: Path,
    output: Path,
    format: ExportFormat = "ross",
    dtype: DtypeName = "stored",
    templates: Callable[[str], str] | None = None,
) -> None:
    """Convert a Megatron checkpoint into a Hugging Face folder.

    Args:
        checkpoint: run folder, root of the checkpoint (newest iteration) or one iteration folder.
        output: folder to create.
        format: ross: the published composite; llava: stock transformers class; adapters: projector and denoiser files.
        dtype: dtype of the written tensors; `stored` changes nothing.
        templates: gives the chat template, see `export_llava`, which needs it.
    """
    reader = open_checkpoint(megatron_checkpoint(checkpoint, "checkpoint"))
    target = None if dtype == "stored" else getattr(torch, dtype)
    if format == "ross":
        export_ross(reader, output, target, templates=templates)
    elif format == "adapters":
        export_adapters(reader, output, target)
    else:
        from megatron_ross.convert.llava_export import export_llava  # imports transformers, which takes seconds

        if templates is None:
            raise ValueError("the llava format needs chat templates: pass huggingface.chat_templates.chat_template")
        export_llava(reader, output, templates, target)
    print(f"wrote {output}")
