"""A small LLaVA data set on disk and training runs on it with the real Trainer, for `run_ranks`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
from PIL import Image

from megatron_ross.checkpoint.agreement import CheckpointError
from megatron_ross.config.schema import RunConfig
from megatron_ross.config.validate import resolve_layout, validate_run
from megatron_ross.parallel.groups import destroy_groups, initialize_groups
from megatron_ross.parity.gather import gather_parameters
from megatron_ross.platform import ensure_platform, quieten
from megatron_ross.training.checkpoints import prepare_run_folder
from megatron_ross.training.start import start_of
from megatron_ross.training.trainer import Trainer, TrainingError
from tests.helpers.variants import make_variant

WORDS = [
    "a",
    "small",
    "red",
    "house",
    "stands",
    "near",
    "the",
    "old",
    "river",
    "and",
    "two",
    "white",
    "dogs",
    "run",
    "over",
    "green",
    "grass",
]


def write_data(folder: Path, num_samples: int = 29) -> dict[str, Any]:
    """Samples with one image, two images and none; returns the settings that name them."""
    rng = np.random.default_rng(3)
    (folder / "images").mkdir(parents=True)
    records = []
    for i in range(num_samples):
        names = [f"{i}_{j}.png" for j in range((1, 0, 2, 1, 1)[i % 5])]
        for name in names:
            height, width = rng.integers(20, 90, 2)
            Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(folder / "images" / name)
        tags = "<image>\n" * len(names)
        answer = " ".join(rng.choice(WORDS, rng.integers(2, 14)))
        turns = [{"from": "human", "value": f"{tags}What is it?"}, {"from": "gpt", "value": answer}]
        image = {} if not names else {"image": names[0] if len(names) == 1 else names}
        records.append({"id": str(i), "conversations": turns, **image})
    (folder / "data.json").write_text(json.dumps(records))
    return {"data_path": str(folder / "data.json"), "image_folder": str(folder / "images")}


def two_stage_settings(folder: Path) -> dict[str, Any]:
    """Settings of short runs on two pipeline ranks, with a model and data below `folder`."""
    return {
        **write_data(folder / "data"),
        "init_from": str(make_variant(folder / "model", "qwen2_siglip").path),
        "pipeline_model_parallel_size": 2,
        "layout": "VEt*2|t*2NDH",
        "seq_length": 256,
        "micro_batch_size": 1,
        "global_batch_size": 4,
        "lr": 1e-3,
        "tensorboard": False,
    }


def with_trainer(flat: dict[str, Any], action: Callable[[Trainer], Any]) -> Any:
    """Build the real Trainer from flat settings as the entry point does, act, and undo the process groups."""
    quieten()
    ensure_platform()
    run = RunConfig.from_flat(flat)
    validate_run(run, dist.get_world_size())
    start = start_of(run)
    layout = resolve_layout(run, start.manifest.model, dist.get_world_size())
    tied = start.manifest.model.language.share_embeddings_and_output_weights
    if run.training.save:
        prepare_run_folder(run)
    groups = initialize_groups(run.parallel, layout, tie_embeddings=tied, seed=run.loss.seed)
    try:
        trainer = Trainer(run, start, layout, groups)
        try:
            return action(trainer)
        finally:
            trainer.loader.close()
    finally:
        destroy_groups()


def train(rank: int, world_size: int, flat: dict[str, Any]) -> str:
    """The whole training loop; the error that it ended with, or nothing."""

    def act(trainer: Trainer) -> str:
        try:
            trainer.train()
        except (CheckpointError, TrainingError) as error:
            return str(error)
        return ""

    return with_trainer(flat, act)


def curve(rank: int, world_size: int, flat: dict[str, Any], steps: int, save: bool = False) -> dict[str, Any]:
    """Take `steps` steps; the losses of each, and on rank 0 the trainable parameters after them."""

    def act(trainer: Trainer) -> dict[str, Any]:
        losses = []
        for _ in range(steps):
            result, _ = trainer._step()
            losses.append((result.lm_loss, result.recon_loss, result.grad_norm))
        if save:
            trainer.save(is_last=True)
        parameters = gather_parameters(trainer.stages, trainer.manifest.model, trainable_only=True)
        digest = trainer.loader.state_dict()["digest"]
        return {"losses": losses, "parameters": parameters, "digest": digest, "iteration": trainer.iteration}

    return with_trainer(flat, act)
