"""What generate, reconstruct and answer-questions share: the options that name a model and how it is loaded.

They are checked before torch is imported, and so before anything large is read.
"""

from __future__ import annotations

from typing import Any

from jsonargparse import ArgumentParser, Namespace

from megatron_ross.cli.command import MODEL_HELP
from megatron_ross.evaluation.exports import check_model, exported_folder
from megatron_ross.evaluation.options import DTYPES, TEMPLATES, check_device


def add_model_options(parser: ArgumentParser, *, everything: bool = True) -> None:
    """`--checkpoint`, `--device` and `--dtype`; with `everything` also the template and where configs are read."""
    add = parser.add_argument
    add("--checkpoint", type=str, required=True, help=MODEL_HELP)
    add("--device", type=str | None, default=None, help="default: the GPU if there is one")
    add("--dtype", choices=DTYPES, default="auto", help="of LLM and tower; auto: as stored on a GPU, fp32 on a CPU")
    if everything:
        add("--template", choices=TEMPLATES, default=None, help="default: the checkpoint's")
        add("--vision-tower", type=str | None, default=None, help="folder with the tower's config")
        add("--vae", type=str | None, default=None, help="folder with the auto-encoder's config")


def check_model_options(options: Namespace, *, reconstructs: bool = False) -> None:
    """Raises ValueError: the checkpoint is no model for this command, or the device has no such name."""
    check_device(options.device)
    check_model(options.checkpoint, reconstructs=reconstructs)


def load(options: Namespace) -> tuple[Any, Any]:
    """Model and processor. Raises ValueError, OSError."""
    from megatron_ross.evaluation.generate import load_for_inference

    return load_for_inference(
        str(exported_folder(options.checkpoint)),
        device=options.device,
        dtype=options.dtype,
        template=options.get("template"),
        vision_tower=options.get("vision_tower"),
        vae=options.get("vae"),
    )
