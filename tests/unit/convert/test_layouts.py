"""Hugging Face -> Megatron, loaded and saved by the training code in several layouts -> Hugging Face: bit-exact."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from megatron.core import dist_checkpointing, parallel_state
from safetensors.torch import load_file

from megatron_ross.checkpoint.loading import load_weights
from megatron_ross.checkpoint.manifest import ASSETS_NAME, Manifest, iteration_dir, resolve_checkpoint, write_latest
from megatron_ross.checkpoint.model_state import model_sharded_state
from megatron_ross.config.layout import parse_layout
from megatron_ross.config.schema import RunConfig
from megatron_ross.convert.cli import export_checkpoint
from megatron_ross.parallel.groups import initialize_groups
from megatron_ross.platform import ensure_platform
from megatron_ross.training.build import build_stages
from tests.helpers.distributed import run_ranks

LAYOUTS = {
    "tp2_pp2": (2, 2, "VEt*2|t*2NDH"),
    "pp2_vpp2": (1, 2, "VEt|t|t|tNDH"),
    "pp4": (1, 4, "V|Et*2|t*2N|DH"),
}


def _load_and_save(rank: int, world_size: int, source: Path, target: Path, tp: int, pp: int, text: str) -> None:
    """What the trainer does to weights: build the stages of a layout, load, save (here without optimizer)."""
    ensure_platform()
    model = Manifest.read(resolve_checkpoint(source)).model
    run = RunConfig()
    parallel = replace(run.parallel, tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp)
    run = replace(run, parallel=parallel, compute=replace(run.compute, bf16=False))
    layout = parse_layout(
        text, num_layers=model.language.num_layers, pipeline_model_parallel_size=pp, has_denoiser=True
    )
    groups = initialize_groups(parallel, layout, tie_embeddings=False, seed=0)
    stages = build_stages(model, run, layout, groups)
    load_weights(source, stages)
    state = {f"model{chunk}": model_sharded_state(stage) for chunk, stage in enumerate(stages)}
    dist_checkpointing.save(state, str(target))
    parallel_state.destroy_model_parallel()


@pytest.mark.distributed
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["qwen2_siglip", "llama_clip"])
def test_round_trip_through_every_layout_is_exact(
    layout: str,
    name: str,
    imported: Callable[[str], Path],
    golden_dir: Path,
    tmp_path: Path,
) -> None:
    source = resolve_checkpoint(imported(name))
    target = iteration_dir(tmp_path / "trained", 3)
    target.mkdir(parents=True)
    run_ranks(_load_and_save, 4, source, target, *LAYOUTS[layout])
    shutil.copytree(source / ASSETS_NAME, target / ASSETS_NAME)
    replace(Manifest.read(source), iteration=3).write(target)
    write_latest(tmp_path / "trained", 3)

    export_checkpoint(tmp_path / "trained", tmp_path / "out", "ross")
    exported = load_file(tmp_path / "out" / "model.safetensors")
    golden = load_file(golden_dir / f"ross_{name}" / "model.safetensors")
    assert exported.keys() == golden.keys()
    assert [key for key in golden if not torch.equal(exported[key], golden[key])] == []
