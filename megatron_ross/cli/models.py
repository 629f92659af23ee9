"""`--model` of the commands that need an architecture and no weights."""

from __future__ import annotations

from pathlib import Path

from megatron_ross.checkpoint.locate import Kind, identify, megatron_checkpoint
from megatron_ross.checkpoint.manifest import Manifest
from megatron_ross.config.cli import ConfigError
from megatron_ross.config.model import RossModelConfig
from megatron_ross.config.schema import RunConfig
from megatron_ross.training.start import start_of

MODEL_OPTION_HELP = (
    "LLM+TOWER, e.g. qwen2-7b+siglip-so400m, or what names a checkpoint: run folder, Megatron checkpoint, exported "
    "folder or hub id; default: the configured checkpoint's"
)


def model_of(run: RunConfig, model: str | None, *, llava: bool = False) -> RossModelConfig:
    """The named model, or that of the checkpoint the run would start from.

    Raises:
        ConfigError, ValueError: no model is named, or it cannot be read; one line.
    """
    if model and "+" in model and not Path(model).is_dir():
        from megatron_ross.convert.known_models import known_model

        return known_model(model, reconstructs=not llava)
    if model:
        return _described(model)
    if not run.training.load and not run.training.init_from:
        raise ConfigError("init_from='': name a checkpoint whose model to plan for, or give --model")
    return start_of(run).manifest.model


def _described(name: str) -> RossModelConfig:
    """The architecture of a checkpoint, from its manifest or from its config.json."""
    found = identify(name, "model")
    if found.kind in (Kind.RUN, Kind.CHECKPOINT):
        return Manifest.read(megatron_checkpoint(name, "model")).model
    found.require("model", Kind.ROSS, Kind.LLAVA)
    from megatron_ross.config.json_files import read_json
    from megatron_ross.convert.composite_config import ross_model_config
    from megatron_ross.convert.sources import resolve_source

    folder = found.path or resolve_source(name, weights=False)
    return ross_model_config(read_json(folder / "config.json"), folder)
