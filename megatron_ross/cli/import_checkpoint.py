"""Convert Hugging Face checkpoints into one Megatron checkpoint that every parallel layout loads (docs/checkpoints.md).

Give either --checkpoint, or --llm and --vision-tower (and --vae, unless plain LLaVA is wanted). With --checkpoint and
--vae, a model that has no denoiser yet gets one: LLaVA becomes Ross.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from jsonargparse import ArgumentParser

from megatron_ross.checkpoint.locate import Kind, identify, look_up
from megatron_ross.checkpoint.manifest import CHECKPOINTS_NAME, LATEST_NAME, MANIFEST_NAME
from megatron_ross.cli.command import EXIT_INTERRUPTED, parse_options, run_command
from megatron_ross.convert.unsupported import check_supported
from megatron_ross.text_files import check_vacant


def add_options(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("--output", type=Path, required=True, help="folder to create")
    llm = "language model, folder or hub id (Qwen2, Qwen2.5, Vicuna, Llama-2, Llama-3)"
    add("--llm", type=str | None, default=None, help=llm)
    tower = "SigLIP, SigLIP2 or CLIP, folder or hub id. With --checkpoint: read where that lacks config or weights"
    add("--vision-tower", type=str | None, default=None, help=tower)
    vae = (
        "FLUX-type AutoencoderKL, folder or hub id, or FLUX's ae.safetensors. With a --checkpoint that has a denoiser: "
        "read where that lacks the auto-encoder's config"
    )
    add("--vae", type=str | None, default=None, help=vae)
    whole = "whole model, folder or hub id: published Ross composite, stock LLaVA, LLaVA in its original format"
    add("--checkpoint", type=str | None, default=None, help=whole)
    projector = "identity, linear or mlpNx_gelu; default: mlp2x_gelu"
    add("--projector-type", type=str | None, default=None, help=projector)
    denoiser = "denoiser_vitNx; default: denoiser_vit3x"
    add("--denoiser-type", type=str | None, default=None, help=denoiser)
    width = "default: of the adapter file, else 1024 (1280 at depth 8, 1536 at depth 12)"
    add("--denoiser-width", type=int | None, default=None, help=width)
    add("--mm-projector", type=Path | None, default=None, help="published mm_projector.bin; default: fresh")
    inverse = "published mm_inv_projector.bin; default: fresh"
    add("--mm-inv-projector", type=Path | None, default=None, help=inverse)
    add("--seed", type=int, default=0, help="of the fresh projector and denoiser")


_COMPONENTS = {"llm": Kind.LANGUAGE_MODEL, "vision_tower": Kind.TOWER, "vae": Kind.VAE}


def check_sources(**sources: str | None) -> None:
    """Every named source exists, and is not what another option, or another command, takes.

    Args:
        sources: option (llm, vision_tower, vae, checkpoint) -> folder or hub id.

    Raises:
        ValueError: one line, before anything is read.
    """
    for option, name in sources.items():
        if name is None:
            continue
        check_supported(Path(name))
        if option in _COMPONENTS and Path(name).exists() and not _is_described(Path(name)):
            continue  # weights in a format of their own, which the import judges
        found = identify(name, option)
        if option == "checkpoint":
            found = look_up(found, option)
        where = f"{option}={name!r}: is {found.kind.value}{found.detail}"
        if found.kind in (Kind.RUN, Kind.CHECKPOINT):
            raise ValueError(
                f"{where}: nothing to import; train from it with --init-from {name}, or export it: "
                f"megatron-ross export --checkpoint {name} --output exports/NAME"
            )
        if option == "checkpoint" and found.kind in (*_COMPONENTS.values(), Kind.PIPELINE):
            belongs = next((o for o, kind in _COMPONENTS.items() if kind is found.kind), "vae")
            raise ValueError(f"{where}, no whole model; give it as --{belongs.replace('_', '-')}")
        if option == "checkpoint" and found.kind in (Kind.OTHER, Kind.ADAPTERS):
            raise ValueError(f"{where}; a whole model is Ross, or LLaVA in the stock or in its original format")
        mistaken = next((o for o, kind in _COMPONENTS.items() if kind is found.kind and o != option), None)
        if option in _COMPONENTS and mistaken is not None:
            raise ValueError(f"{where}; give it as --{mistaken.replace('_', '-')}")
        if option == "llm" and found.kind in (Kind.ROSS, Kind.LLAVA, Kind.ORIGINAL_LLAVA):
            raise ValueError(f"{where}, a whole model; give it as --checkpoint")


def _is_described(path: Path) -> bool:
    return any((path / name).exists() for name in ("config.json", MANIFEST_NAME, LATEST_NAME, CHECKPOINTS_NAME))


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0, 75 if interrupted (nothing is written then), or 1 after a one-line error."""

    def body() -> int:
        options = parse_options(" ".join(__doc__.split()), add_options, arguments)
        check_vacant(options.output)
        check_sources(**{name: getattr(options, name) for name in ("llm", "vision_tower", "vae", "checkpoint")})
        if options.checkpoint is None and None in (options.llm, options.vision_tower):
            raise ValueError("give --checkpoint, or both --llm and --vision-tower")
        from megatron_ross.convert.cli import import_checkpoint

        import_checkpoint(**vars(options))
        return 0

    status = run_command(body, "interrupted: nothing was written")
    return os.EX_TEMPFAIL if status == EXIT_INTERRUPTED else status
