"""Every recipe at full size, without weights: it parses, lays out, has the right parts trained, and fits its GPUs."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from pathlib import Path

import pytest
import torch
import yaml

from megatron_ross.config.cli import parse_run_config
from megatron_ross.config.model import RossModelConfig
from megatron_ross.config.schema import RunConfig
from megatron_ross.config.validate import validate_run
from megatron_ross.convert.known_models import known_model
from megatron_ross.models.denoiser import RossDenoiser
from megatron_ross.models.latents import LatentEncoder
from megatron_ross.models.projector import build_projector
from megatron_ross.models.vision import VisionTower
from megatron_ross.planner.auto import resolve_layout
from megatron_ross.planner.hardware import GPUS
from megatron_ross.planner.parameters import stage_parameters
from megatron_ross.planner.search import plan_run

EXAMPLES = Path(__file__).resolve().parents[3] / "examples"
RECIPES = sorted(path for family in ("ross", "llava") for path in (EXAMPLES / family).glob("*.yaml"))
CLUSTERS = {"8xa100-80g": (8, "a100-80g"), "8xh100": (8, "h100"), "64xh100": (64, "h100")}
NUM_SAMPLES = {"blip_laion_cc_sbu_558k.json": 558_128, "cambrian737k.json": 737_000}
"""The second is known to the thousand only."""
EXPECTED_STEPS = {"pretrain": 2181, "finetune": 5758}


def recipe_id(path: Path) -> str:
    return f"{path.parent.name}/{path.stem}"


def is_stage_1(recipe: Path) -> bool:
    return recipe.stem.startswith("pretrain")


def load(recipe: Path, cluster: str = "8xh100") -> RunConfig:
    """Shared part, recipe, layout, in the order of the documented command."""
    stage = "stage1" if is_stage_1(recipe) else "stage2"
    files = [EXAMPLES / "shared" / f"{stage}.yaml", recipe, EXAMPLES / "layouts" / f"{cluster}-{stage}.yaml"]
    return parse_run_config([word for file in files for word in ("--config", str(file))])


def model_of(recipe: Path) -> RossModelConfig:
    _, tower, language = recipe.stem.split("_")
    names = {"qwen2": "qwen2-7b", "vicuna": "vicuna-13b", "clip": "clip-l-336", "siglip": "siglip-so400m"}
    return known_model(f"{names[language]}+{names[tower]}", reconstructs=recipe.parent.name == "ross")


def test_there_is_one_recipe_per_published_script() -> None:
    stages, towers = ("pretrain", "finetune"), ("clip", "siglip")
    ross = {f"ross/{s}_{t}_{m}" for s in stages for t in towers for m in ("qwen2", "vicuna")}
    assert {recipe_id(path) for path in RECIPES} == ross | {f"llava/{s}_{t}_qwen2" for s in stages for t in towers}


@pytest.mark.parametrize("recipe", RECIPES, ids=recipe_id)
def test_hyper_parameters_are_the_published_ones(recipe: Path) -> None:
    run, stage_1 = load(recipe), is_stage_1(recipe)
    optimizer, data = run.optimizer, run.data
    assert (optimizer.lr, data.global_batch_size) == ((1e-3, 256) if stage_1 else (2e-5, 128))
    assert (optimizer.lr_warmup_fraction, optimizer.lr_decay_style, optimizer.min_lr) == (0.03, "cosine", 0)
    assert (optimizer.adam_beta1, optimizer.adam_beta2, optimizer.adam_eps) == (0.9, 0.999, 1e-8)
    assert optimizer.weight_decay == optimizer.clip_grad == 0
    assert (run.compute.bf16, run.compute.denoiser_dtype, run.training.num_epochs) == (True, "tf32", 1)
    # The published scripts that train on SigLIP give the denoiser its own rate in stage 1.
    own_rate = 1e-4 if stage_1 and recipe.parent.name == "ross" and "siglip" in recipe.stem else None
    assert optimizer.mm_inv_projector_lr == own_rate
    assert data.group_by_modality_length is not stage_1
    vicuna = "vicuna" in recipe.stem
    assert data.template == ("plain" if stage_1 else "v1" if vicuna else "qwen_2")
    assert data.seq_length == (8192 if stage_1 else 4096 if vicuna else 32768)
    assert data.seq_length <= model_of(recipe).language.max_position_embeddings or stage_1


@pytest.mark.parametrize("recipe", RECIPES, ids=recipe_id)
def test_shared_settings_stand_in_one_place(recipe: Path) -> None:
    own = yaml.safe_load(recipe.read_text())
    shared = yaml.safe_load((EXAMPLES / "shared" / f"stage{1 if is_stage_1(recipe) else 2}.yaml").read_text())
    assert not own.keys() & shared.keys()
    assert own["save"] == own["load"]  # a job that is started again goes on where it stopped


def test_stage_2_starts_from_its_stage_1() -> None:
    for recipe in RECIPES:
        if not is_stage_1(recipe):
            before = recipe.with_name(recipe.name.replace("finetune", "pretrain"))
            assert load(recipe).training.init_from == f"{load(before).training.save}/checkpoints"


@pytest.mark.parametrize("cluster", CLUSTERS)
@pytest.mark.parametrize("recipe", RECIPES, ids=recipe_id)
def test_recipe_fits_its_cluster(recipe: Path, cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, model = load(recipe, cluster), model_of(recipe)
    world_size, gpu_name = CLUSTERS[cluster]
    monkeypatch.chdir(tmp_path)
    Path(run.data.image_folder).mkdir(parents=True)
    Path(run.data.data_path).touch()
    validate_run(run, world_size)
    plan = plan_run(run, model, world_size, GPUS[gpu_name])
    assert plan.fits
    assert plan.peak_memory.total < 0.95 * GPUS[gpu_name].memory_gib * 2**30  # room for samples above the mean
    steps = math.ceil(NUM_SAMPLES[Path(run.data.data_path).name] / run.data.global_batch_size)
    assert steps == EXPECTED_STEPS[recipe.stem.split("_")[0]]


@pytest.mark.parametrize("recipe", RECIPES, ids=recipe_id)
def test_the_right_parts_are_trained(recipe: Path) -> None:
    run, model = load(recipe), model_of(recipe)
    layout = resolve_layout(run, model, 8)
    parameters = [p for spec in layout.stages for p in stage_parameters(model, run, layout, spec)]
    trained = {p.part for p in parameters if p.trainable}
    language = set() if is_stage_1(recipe) else {"embedding", "decoder", "norm", "head"}
    assert trained == {"projector"} | language | ({"denoiser"} if model.denoiser else set())


@pytest.mark.parametrize("tower", ["clip-l-336", "siglip-so400m"])
def test_parts_on_the_meta_device_have_the_predicted_size(tower: str) -> None:
    model = known_model(f"qwen2-7b+{tower}")
    assert model.denoiser is not None
    assert model.vae is not None
    hidden, grid = model.language.hidden_size, model.vision.grid_size
    with torch.device("meta"):
        built = {
            "tower": VisionTower(model.vision),
            "projector": build_projector(model.projector, model.vision.hidden_size, hidden),
            "denoiser": RossDenoiser(model.denoiser, 4 * model.vae.latent_channels, hidden, grid),
            "vae": LatentEncoder(model.vae, model.vision),
        }
    layout = resolve_layout(RunConfig(), model, 1)
    predicted: Counter[str] = Counter()
    for parameter in stage_parameters(model, RunConfig(), layout, layout.stages[0]):
        predicted[parameter.part] += parameter.numel
    for part, module in built.items():
        assert predicted[part] == sum(p.numel() for p in module.parameters()), part


def test_layout_overlays_change_only_how_the_model_is_laid_out() -> None:
    allowed = {f.name for section in ("parallel", "compute") for f in dataclasses.fields(getattr(RunConfig(), section))}
    for path in (EXAMPLES / "layouts").glob("*.yaml"):
        assert set(yaml.safe_load(path.read_text())) <= allowed | {"micro_batch_size"}, path.name
