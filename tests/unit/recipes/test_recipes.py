"""Every recipe at full size, without weights: it parses, lays out, has the right parts trained, and fits its GPUs."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from megatron_ross.config.cli import parse_run_config
from megatron_ross.config.model import RossModelConfig
from megatron_ross.config.schema import RunConfig
from megatron_ross.config.validate import validate_run
from megatron_ross.convert.known_models import known_model
from megatron_ross.planner.auto import resolve_layout
from megatron_ross.planner.hardware import GPUS
from megatron_ross.planner.parameters import stage_parameters
from megatron_ross.planner.search import longest_sample, plan_run
from megatron_ross.training import data as training_data
from megatron_ross.training.schedule import num_iterations
from tests.helpers.distributed import run_ranks
from tests.helpers.meta_stages import Sizes, built_sizes

EXAMPLES = Path(__file__).resolve().parents[3] / "examples"
RECIPES = sorted(path for family in ("ross", "llava") for path in (EXAMPLES / family).glob("*.yaml"))
CLUSTERS = {"8xa100-80g": (8, "a100-80g"), "8xh100": (8, "h100"), "64xh100": (64, "h100")}
NUM_SAMPLES = {"blip_laion_cc_sbu_558k.json": 558_128, "cambrian737k.json": 737_000}
"""The second is known to the thousand only."""
CAPTION_TOKENS = 754
"""A sample of stage 1 with SigLIP's 729 image tokens."""
STATED_ROOM = {"ross qwen2": 6400, "ross vicuna": 4050, "llava qwen2": 8700}
"""Tokens of the longest sample that the layouts of stage 2 say they have room for."""
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
    assert (optimizer.mm_projector_lr, optimizer.mm_vision_tower_lr) == (None, None)
    loss, trainability = run.loss, run.trainability
    assert (loss.recon_loss_weight, loss.num_noise_draws, loss.recon_objective) == (1, 4, "denoise")
    assert trainability.freeze_language_model is stage_1
    assert not trainability.unfreeze_mm_vision_tower
    assert not trainability.freeze_mm_mlp_adapter
    assert (data.group_by_modality_length, data.packing) == (not stage_1, False)
    # The pretrain scripts pass no --image_aspect_ratio, whose default is square; the finetune scripts pass pad.
    assert data.image_aspect_ratio == ("square" if stage_1 else "pad")
    assert data.image_conversion == "published"
    vicuna = "vicuna" in recipe.stem
    assert data.template == ("plain" if stage_1 else "v1" if vicuna else "qwen_2")
    assert data.seq_length == (8192 if stage_1 else 4096 if vicuna else 32768)
    assert data.seq_length <= model_of(recipe).language.max_position_embeddings or stage_1


@pytest.mark.parametrize("recipe", RECIPES, ids=recipe_id)
def test_data_lies_where_the_published_readme_puts_it(recipe: Path) -> None:
    stage_1 = "playground/data/LLaVA-Pretrain/blip_laion_cc_sbu_558k.json", "playground/data/LLaVA-Pretrain/images"
    stage_2 = "playground/data/cambrian737k.json", "playground/data"
    data = load(recipe).data
    assert (data.data_path, data.image_folder) == (stage_1 if is_stage_1(recipe) else stage_2)


@pytest.mark.parametrize("cluster", ["8xh100", "64xh100"])
@pytest.mark.parametrize("stage", EXPECTED_STEPS)
def test_training_computes_the_expected_steps(stage: str, cluster: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a data set of the real size, in the order of the recipes, which differ in nothing that matters for it."""
    run = load(EXAMPLES / "ross" / f"{stage}_clip_qwen2.yaml", cluster)
    for recipe in (path for path in RECIPES if path.stem.startswith(stage)):
        data = load(recipe, cluster).data
        assert dataclasses.replace(data, template=run.data.template, seq_length=run.data.seq_length) == run.data
    num_samples = NUM_SAMPLES[Path(run.data.data_path).name]
    monkeypatch.setattr(
        training_data, "modality_lengths", lambda dataset, **_: np.arange(1, len(dataset) + 1) % 500 + 1
    )
    order = training_data.build_order(run, range(num_samples))  # type: ignore[arg-type]
    assert num_iterations(run, order) == EXPECTED_STEPS[stage]


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
    room = longest_sample(plan, model)  # the plan is for means
    if is_stage_1(recipe):
        assert room > 4 * CAPTION_TOKENS
    else:
        stated = STATED_ROOM[f"{recipe.parent.name} {recipe.stem.split('_')[-1]}"] if cluster == "64xh100" else 32768
        assert room >= min(run.data.seq_length, stated)
        assert cluster != "64xh100" or room < 1.05 * stated


@pytest.mark.parametrize("recipe", RECIPES, ids=recipe_id)
def test_the_right_parts_are_trained(recipe: Path) -> None:
    run, model = load(recipe), model_of(recipe)
    layout = resolve_layout(run, model, 8)
    parameters = [p for spec in layout.stages for p in stage_parameters(model, run, layout, spec)]
    trained = {p.part for p in parameters if p.trainable}
    language = set() if is_stage_1(recipe) else {"embedding", "decoder", "norm", "head"}
    assert trained == {"projector"} | language | ({"denoiser"} if model.denoiser else set())


Case = tuple[RunConfig, RossModelConfig, int, int]
"""A run and its model, the number of ranks, and the rank to build."""


def built_by_ranks(rank: int, world_size: int, cases: list[Case]) -> list[list[Sizes]]:
    """What every case's rank builds, all in one process."""
    return [built_sizes(*case) for case in cases]


def predicted_sizes(run: RunConfig, model: RossModelConfig, world_size: int, rank: int) -> list[Sizes]:
    layout = resolve_layout(run, model, world_size)
    chunks = layout.chunks_of_rank(rank * run.parallel.pipeline_model_parallel_size // world_size)
    stages = [stage_parameters(model, run, layout, spec) for spec in chunks]
    return [[(p.numel, p.trainable, p.bytes_per_element) for p in stage] for stage in stages]


def trained_then_frozen(sizes: Sizes) -> Sizes:
    """Buffers follow the order of the trained parameters; that of the others means nothing."""
    return [s for s in sizes if s[1]] + sorted(s for s in sizes if not s[1])


@pytest.mark.distributed
@pytest.mark.parametrize("recipe", RECIPES, ids=recipe_id)
def test_stages_at_full_size_hold_what_the_planner_says(recipe: Path) -> None:
    """On the meta device: size, dtype and training of every parameter of the first and the last pipeline rank."""
    model, cases = model_of(recipe), dict[Any, Case]()
    for cluster in ("8xh100", "64xh100"):  # a test below: the A100 layouts are the H100 ones
        run, (world_size, _) = load(recipe, cluster), CLUSTERS[cluster]
        pp_size = run.parallel.pipeline_model_parallel_size
        for pp_rank in {0, pp_size - 1}:
            cases[run.parallel, pp_rank] = (run, model, world_size, pp_rank * world_size // pp_size)
    built = run_ranks(built_by_ranks, 1, list(cases.values()))[0]
    for case, stages in zip(cases.values(), built, strict=True):
        predicted = predicted_sizes(*case)
        assert [trained_then_frozen(s) for s in stages] == [trained_then_frozen(s) for s in predicted]


def test_a100_layouts_are_those_of_h100() -> None:
    """So one test of what a rank builds covers both."""
    for stage in ("stage1", "stage2"):
        a100, h100 = (EXAMPLES / "layouts" / f"{cluster}-{stage}.yaml" for cluster in ("8xa100-80g", "8xh100"))
        assert yaml.safe_load(a100.read_text()) == yaml.safe_load(h100.read_text())


def test_layout_overlays_change_only_how_the_model_is_laid_out() -> None:
    allowed = {f.name for section in ("parallel", "compute") for f in dataclasses.fields(getattr(RunConfig(), section))}
    for path in (EXAMPLES / "layouts").glob("*.yaml"):
        assert set(yaml.safe_load(path.read_text())) <= allowed | {"micro_batch_size"}, path.name


IMAGES = EXAMPLES / "images" / "tune_siglip_qwen2.yaml"


def load_images(cluster: str) -> RunConfig:
    files = [EXAMPLES / "shared" / "images.yaml", IMAGES, EXAMPLES / "layouts" / f"{cluster}-stage1.yaml"]
    return parse_run_config([word for file in files for word in ("--config", str(file))])


@pytest.mark.parametrize("cluster", CLUSTERS)
def test_the_recipe_for_images_alone_trains_the_denoiser_and_fits(
    cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, model = load_images(cluster), model_of(EXAMPLES / "ross" / "finetune_siglip_qwen2.yaml")
    assert (run.loss.lm_loss_weight, run.loss.recon_loss_weight) == (0, 1)
    after = load(EXAMPLES / "ross" / "finetune_siglip_qwen2.yaml")  # images and prompts as the start has seen them
    assert run.training.init_from == f"{after.training.save}/checkpoints"
    assert (run.data.template, run.data.image_aspect_ratio) == (after.data.template, after.data.image_aspect_ratio)
    assert run.training.save == run.training.load
    world_size, gpu_name = CLUSTERS[cluster]
    monkeypatch.chdir(tmp_path)
    Path(run.data.image_folder).mkdir(parents=True)
    Path(run.data.data_path).touch()
    validate_run(run, world_size)
    layout = resolve_layout(run, model, world_size)
    parameters = [p for spec in layout.stages for p in stage_parameters(model, run, layout, spec)]
    assert {p.part for p in parameters if p.trainable} == {"denoiser"}
    plan = plan_run(run, model, world_size, GPUS[gpu_name])
    assert plan.fits
    stage_1 = plan_run(
        load(EXAMPLES / "ross" / "pretrain_siglip_qwen2.yaml", cluster), model, world_size, GPUS[gpu_name]
    )
    assert plan.samples_per_second > stage_1.samples_per_second  # although a sample has more text


@pytest.mark.distributed
def test_without_a_language_loss_stages_hold_what_the_planner_says() -> None:
    """The recipe, and the same with a language model that is trained, whose LM head is not."""
    model = model_of(EXAMPLES / "ross" / "finetune_siglip_qwen2.yaml")
    flat = load_images("8xh100").to_flat() | {"global_batch_size": 8, "micro_batch_size": 1}
    trained = flat | {"freeze_language_model": False, "pipeline_model_parallel_size": 4, "layout": "auto"}
    cases: list[Case] = [(RunConfig.from_flat(f), model, 8, rank) for f in (flat, trained) for rank in (0, 7)]
    for case, stages in zip(cases, run_ranks(built_by_ranks, 1, cases)[0], strict=True):
        predicted = predicted_sizes(*case)
        assert [trained_then_frozen(s) for s in stages] == [trained_then_frozen(s) for s in predicted]
