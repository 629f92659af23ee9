"""Step time, search and the command line: orderings that must hold, arithmetic by hand, and life without torch."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_ross.config.cli import ConfigError
from megatron_ross.config.layout import LayoutCosts, auto_layout
from megatron_ross.config.model import RossModelConfig
from megatron_ross.config.schema import (
    ComputeConfig,
    DataConfig,
    ParallelConfig,
    RunConfig,
    TrainabilityConfig,
)
from megatron_ross.convert.known_models import KNOWN_LANGUAGE_MODELS, known_model
from megatron_ross.planner.auto import layout_costs, resolve_layout
from megatron_ross.planner.hardware import GPUS, known_gpu
from megatron_ross.planner.report import as_dict, table
from megatron_ross.planner.search import longest_sample, plan_run, search
from megatron_ross.planner.timing import CostModel, Seconds
from megatron_ross.planner.workload import Workload

ROOT = Path(__file__).resolve().parents[3]
RUN = RunConfig(
    compute=ComputeConfig(bf16=True, denoiser_dtype="tf32"), data=DataConfig(global_batch_size=128, seq_length=4096)
)
H100 = GPUS["h100"]


@pytest.fixture(scope="module")
def model() -> RossModelConfig:
    return known_model("qwen2-7b+siglip-so400m")


def with_parallel(run: RunConfig, tp: int, pp: int, micro_batch_size: int = 1, **parallel) -> RunConfig:
    return dataclasses.replace(
        run,
        parallel=ParallelConfig(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp, **parallel),
        data=dataclasses.replace(run.data, micro_batch_size=micro_batch_size),
    )


def test_plans_fit_and_are_ranked(model: RossModelConfig) -> None:
    plans = search(RUN, model, 16, H100)
    times = [round(plan.time.total, 4) for plan in plans]
    assert times == sorted(times)
    assert all(plan.fits and plan.peak_memory.total <= H100.memory_gib * 2**30 for plan in plans)
    assert len({str(as_dict(plan)["settings"]) for plan in plans}) == len(plans)
    assert all(0 < plan.mfu < 0.6 and 0 <= plan.time.bubble < 1 for plan in plans)


def test_every_plan_can_be_put_into_a_configuration(model: RossModelConfig) -> None:
    """What the planner prints is what the builder gets: same layout, same memory."""
    plan = search(RUN, model, 8, H100)[0]
    settings = as_dict(plan)["settings"]
    again = plan_run(RunConfig.from_flat(RUN.to_flat() | settings), model, 8, H100)
    assert again.layout == plan.layout
    assert again.memory == plan.memory
    assert again.time.total == pytest.approx(plan.time.total)


def test_bubble_of_equal_stages_is_the_textbook_one(model: RossModelConfig) -> None:
    """With stages of equal cost: (p - 1) / (m + p - 1), and p - 1 divided by the virtual size when interleaved."""
    llava = dataclasses.replace(model, denoiser=None, vae=None)
    no_images = Workload(text_tokens=800, supervised_tokens=0, images=0)
    for virtual, layout in ((1, "VEt*7|t*7|t*7|t*7NH"), (7, "VEt" + "|t" * 27 + "NH")):
        plan = plan_run(with_parallel(RUN, 1, 4, layout=layout), llava, 8, H100, no_images)
        fill = 3 / virtual
        assert plan.num_microbatches == 64
        assert plan.time.bubble == pytest.approx(fill / (64 + fill))


def test_what_costs_more_is_predicted_to_cost_more(model: RossModelConfig) -> None:
    base = plan_run(with_parallel(RUN, 2, 1), model, 8, H100)
    full = ComputeConfig(
        bf16=True,
        denoiser_dtype="tf32",
        recompute_granularity="full",
        recompute_method="uniform",
        recompute_num_layers=1,
    )
    recomputed = plan_run(dataclasses.replace(base.run, compute=full), model, 8, H100)
    assert recomputed.time.total > base.time.total
    assert recomputed.mfu < base.mfu
    assert recomputed.peak_memory.activations < base.peak_memory.activations
    frozen = dataclasses.replace(base.run, trainability=TrainabilityConfig(freeze_language_model=True))
    assert plan_run(frozen, model, 8, H100).time.total < 0.8 * base.time.total
    assert plan_run(base.run, model, 8, GPUS["a100-80g"]).time.total > base.time.total
    padded = Workload(text_tokens=171, supervised_tokens=170, padding=2.0)
    packed = dataclasses.replace(padded, padding=1.0)
    assert plan_run(base.run, model, 8, H100, padded).time.total > plan_run(base.run, model, 8, H100, packed).time.total


def test_one_token_more_than_the_longest_sample_does_not_fit(model: RossModelConfig) -> None:
    run = dataclasses.replace(RUN, data=dataclasses.replace(RUN.data, seq_length=32768))
    plan = plan_run(with_parallel(run, 1, 4, virtual_pipeline_model_parallel_size=2), model, 64, H100)
    longest = longest_sample(plan, model)
    fixed = dataclasses.replace(plan.run, parallel=dataclasses.replace(plan.run.parallel, layout=str(plan.layout)))
    image = model.vision.num_image_tokens
    at, above = (
        plan_run(fixed, model, 64, H100, Workload(n - image, supervised_tokens=n - image))
        for n in (longest, longest + 1)
    )
    assert at.fits
    assert not above.fits
    assert image < longest < 32768
    short_data = dataclasses.replace(plan.run.data, seq_length=1024)
    short = dataclasses.replace(plan, run=dataclasses.replace(plan.run, data=short_data))
    assert longest_sample(short, model) == 1024


def test_a_single_image_is_not_shared_out(model: RossModelConfig) -> None:
    """Two tensor-parallel ranks encode one image no faster than one rank, but two images at twice the rate."""

    def vision(tp: int, micro_batch_size: int) -> float:
        run = with_parallel(RUN, tp, 1, micro_batch_size)
        return CostModel(model, run, H100, Workload(100, 50)).letters()["V"].total

    assert vision(2, 1) == pytest.approx(vision(1, 1))
    assert vision(2, 2) == pytest.approx(vision(1, 2) / 2)


def test_step_time_of_one_stage_is_the_sum_of_its_parts(model: RossModelConfig) -> None:
    run = with_parallel(RUN, 1, 1)
    letters = CostModel(model, run, H100, Workload(171, 170, padding=1.5)).letters()
    once = sum((letters[x] for x in "V" + "t" * 28 + "DH"), start=Seconds()).total
    plan = plan_run(run, model, 8, H100)
    assert plan.num_microbatches == 16
    assert plan.time.pipeline == pytest.approx(16 * once)
    assert plan.time.bubble == pytest.approx(0)


def test_auto_layout_balances_cost(model: RossModelConfig) -> None:
    run = with_parallel(RUN, 1, 4)
    costs = layout_costs(run, model)
    assert costs.denoiser > 1  # an image's denoising costs more than a layer of a sample
    stages = resolve_layout(run, model, 8).stages
    loads = [
        stage.num_layers + costs.vision * stage.has("V") + costs.denoiser * stage.has("D") + costs.head * stage.has("H")
        for stage in stages
    ]
    assert max(loads) - min(loads) < 1.5
    assert stages[-1].num_layers < stages[1].num_layers


def brute_force_bottleneck(costs: list[float], parts: int) -> float:
    if parts == 1:
        return sum(costs)
    return min(
        max(sum(costs[:i]), brute_force_bottleneck(costs[i:], parts - 1)) for i in range(1, len(costs) - parts + 2)
    )


@pytest.mark.parametrize("num_stages", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("costs", [LayoutCosts(), LayoutCosts(2.2, 1.7, 0.4), LayoutCosts(0.1, 5, 3)])
def test_auto_layout_is_the_best_partition(num_stages: int, costs: LayoutCosts) -> None:
    text = auto_layout(num_layers=6, pipeline_model_parallel_size=num_stages, has_denoiser=True, costs=costs)
    price = {"V": costs.vision, "E": 0, "t": 1, "N": 0, "D": costs.denoiser, "H": costs.head}
    parts = [part.replace("t*", "") for part in text.split("|")]
    loads = [
        sum(price[c] for c in part if c in "VDH") + sum(int(c) for c in part if c.isdigit()) + part.count("t")
        for part in parts
    ]
    assert all(parts)
    assert max(loads) == pytest.approx(brute_force_bottleneck([price[c] for c in "VEttttttNDH"], num_stages))


def test_mistakes_are_named(model: RossModelConfig) -> None:
    with pytest.raises(ConfigError, match=r"32 stages .* 28 decoder layers"):
        resolve_layout(with_parallel(RUN, 1, 32), model, 32)
    with pytest.raises(ValueError, match=r"gpu='tpu'.*a100-80g"):
        known_gpu("tpu")
    with pytest.raises(ValueError, match=r"model=.gpt\+x.*qwen2-7b"):
        known_model("gpt+x")
    with pytest.raises(ConfigError, match="nothing fits"):
        search(
            dataclasses.replace(RUN, data=DataConfig(global_batch_size=1)),
            known_model("vicuna-13b+clip-l-336"),
            1,
            H100,
        )
    with pytest.raises(ConfigError, match="global_batch_size=1"):
        search(
            dataclasses.replace(RUN, data=DataConfig(global_batch_size=1)),
            known_model("vicuna-13b+clip-l-336"),
            81,
            H100,
        )


@pytest.mark.parametrize(
    ("name", "billions"), [("qwen2-0.5b", 0.494), ("qwen2-7b", 7.616), ("vicuna-7b", 6.738), ("vicuna-13b", 13.016)]
)
def test_known_language_models_have_their_published_size(name: str, billions: float) -> None:
    from megatron_ross.planner.parameters import stage_parameters

    model = known_model(f"{name}+clip-l-336")
    assert KNOWN_LANGUAGE_MODELS[name] is model.language
    layout = resolve_layout(RunConfig(), model, 1)
    parameters = stage_parameters(model, RunConfig(), layout, layout.stages[0])
    numel = sum(p.numel for p in parameters if p.part in {"embedding", "decoder", "norm", "head"})
    assert numel / 1e9 == pytest.approx(billions, abs=0.001)


WITHOUT_TORCH = """
import runpy, sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"torch", "transformers", "megatron", "diffusers", "numpy"}:
            raise ImportError(name + " is not there")
sys.meta_path.insert(0, Blocked())
sys.argv = ["plan.py", *sys.argv[1:]]
runpy.run_path("tools/plan.py", run_name="__main__")
"""


def plan(*arguments: str) -> subprocess.CompletedProcess[str]:
    """tools/plan.py in a process where torch and its like cannot be imported."""
    command = [sys.executable, "-c", WITHOUT_TORCH, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_plan_runs_without_torch(tmp_path: Path, model: RossModelConfig) -> None:
    config, output = tmp_path / "run.yaml", tmp_path / "plans.json"
    config.write_text("bf16: true\nglobal_batch_size: 128\npipeline_model_parallel_size: 2\n")
    done = plan(
        *("--config", str(config), "--model", "qwen2-7b+siglip-so400m", "--world-size", "8", "--gpu", "h100"),
        *("--top", "3", "--denoiser-dtype", "tf32", "--json", str(output)),
    )
    assert done.returncode == 0, done.stderr
    plans = json.loads(output.read_text())
    assert len(plans) == 3
    expected = search(dataclasses.replace(RUN, data=DataConfig(global_batch_size=128)), model, 8, H100)[:3]
    assert [entry["settings"] for entry in plans] == [as_dict(p)["settings"] for p in expected]
    assert table(expected).splitlines()[1] in done.stdout


def test_plan_reads_the_checkpoint_and_reports_mistakes_on_one_line(tmp_path: Path, model: RossModelConfig) -> None:
    from megatron_ross.checkpoint.manifest import Manifest

    Manifest(iteration=0, model=known_model("qwen2-0.5b+clip-l-336")).write(tmp_path)
    here = ("--init-from", str(tmp_path), "--world-size", "2", "--gpu", "h200", "--bf16", "--top", "1")
    assert "fastest that fit" in plan(*here).stdout
    for wrong, message in ((("--gpu", "x"), "gpu='x'"), (("--padding", "0.5"), "padding=0.5"), (("--foo", "1"), "foo")):
        done = plan(*here, *wrong)
        assert done.returncode == 1
        assert message in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1
