"""The table of recipes in README.md: command, steps, and the planner's memory and hours on the known clusters.

python tools/recipe_table.py
"""

from __future__ import annotations

import math
from pathlib import Path

from megatron_ross.config.cli import parse_run_config
from megatron_ross.config.model import RossModelConfig
from megatron_ross.config.schema import RunConfig
from megatron_ross.convert.known_models import known_model
from megatron_ross.planner.hardware import GPUS
from megatron_ross.planner.search import Plan, plan_run

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
CLUSTERS = {"8xa100-80g": (8, "a100-80g"), "8xh100": (8, "h100"), "64xh100": (64, "h100")}
PACKED = EXAMPLES / "shared" / "stage2_packed.yaml"
NUM_SAMPLES = {"stage1": 558_128, "stage2": 737_000}
"""LLaVA-558k and Cambrian-737k; the second is known to the thousand only."""
PARTS = {"qwen2": "qwen2-7b", "vicuna": "vicuna-13b", "clip": "clip-l-336", "siglip": "siglip-so400m"}


def stage_of(recipe: Path) -> str:
    return "stage1" if recipe.stem.startswith("pretrain") else "stage2"


def model_of(recipe: Path) -> RossModelConfig:
    """The published model that a recipe is for, by its name."""
    _, tower, language = recipe.stem.split("_")
    return known_model(f"{PARTS[language]}+{PARTS[tower]}", reconstructs=recipe.parent.name == "ross")


def settings(recipe: Path, cluster: str, *more: Path) -> RunConfig:
    """Shared part, recipe, layout, in the order of examples/run.sh."""
    stage = stage_of(recipe)
    files = [EXAMPLES / "shared" / f"{stage}.yaml", recipe, EXAMPLES / "layouts" / f"{cluster}-{stage}.yaml", *more]
    return parse_run_config([word for file in files for word in ("--config", str(file))])


def predicted(recipe: Path, plan: Plan) -> str:
    """`40 GiB, 3.7 h, 27 %`: the fullest GPU, the whole stage, MFU."""
    hours = NUM_SAMPLES[stage_of(recipe)] / plan.samples_per_second / 3600
    return f"{plan.peak_memory.total / 2**30:.0f} GiB, {hours:.1f} h, {plan.mfu:.0%}"


def row(recipe: Path) -> str:
    """One recipe as a line of the table."""
    model = model_of(recipe)
    cells = []
    for cluster, (world_size, gpu) in CLUSTERS.items():
        cells.append(predicted(recipe, plan_run(settings(recipe, cluster), model, world_size, GPUS[gpu])))
    packed = ""
    if stage_of(recipe) == "stage2":
        packed = predicted(recipe, plan_run(settings(recipe, "8xh100", PACKED), model, 8, GPUS["h100"]))
    steps = math.ceil(NUM_SAMPLES[stage_of(recipe)] / settings(recipe, "8xh100").data.global_batch_size)
    name = f"{recipe.parent.name}/{recipe.stem}"
    return f"| `examples/run.sh {name} 8xh100` | {steps:,} | {' | '.join(cells)} | {packed} |"


def table() -> str:
    """All recipes, Ross first, stage 1 before stage 2."""
    recipes = [path for family in ("ross", "llava") for path in (EXAMPLES / family).glob("*.yaml")]
    recipes.sort(key=lambda path: (path.parent.name != "ross", stage_of(path), path.stem))
    header = "| command | steps | 8 x A100-80G | 8 x H100 | 64 x H100 | 8 x H100, packed |\n|---|---|---|---|---|---|"
    return "\n".join([header, *map(row, recipes)])


if __name__ == "__main__":
    print(table())
