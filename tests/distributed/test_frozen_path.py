"""Stage 1 costs less than stage 2: nothing is allocated or computed for frozen weights, and steps are faster."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from megatron_ross.config.model import RossModelConfig
from megatron_ross.config.schema import ParallelConfig, RunConfig, TrainabilityConfig
from megatron_ross.config.validate import resolve_layout
from megatron_ross.planner.flops import Trained, module_flops
from megatron_ross.planner.workload import Work
from tests.helpers.distributed import run_ranks
from tests.helpers.golden import model_config

LENGTH, NUM_ROWS, NUM_LABELS = 192, 2, 37
STEPS = 5
NOTICEABLY = 0.9
"""Stage 1 does two thirds of the decoder's work. A stage 1 that computes weight gradients takes as long as stage 2."""


def wide_model(width: int) -> RossModelConfig:
    """Most of the work is the language model's; no two of its matrices, and no activation, have the same shape."""
    model = model_config("qwen2_siglip")
    language = dataclasses.replace(
        model.language,
        num_layers=2,
        hidden_size=width,
        ffn_hidden_size=3 * width - 8,
        num_attention_heads=8,
        num_query_groups=2,
        kv_channels=width * 5 // 24,  # heads are wider than the hidden state
        vocab_size=1024,
    )
    assert model.denoiser is not None
    return dataclasses.replace(model, language=language, denoiser=dataclasses.replace(model.denoiser, depth=1))


@dataclass
class Stage:
    """A model in one stage of training, ready for steps."""

    run: RunConfig
    stages: list
    chunks: list
    optimizer: Any

    def step(self, batches: list, groups: Any) -> None:
        from megatron_ross.training.step import loss_scales, train_step

        train_step(self.chunks, self.optimizer, batches, loss_scales(batches, self.run.loss, groups), groups)


def both_stages(model: RossModelConfig, parallel: ParallelConfig) -> tuple[list[Stage], Any]:
    """Stage 1 and stage 2 of the same model in one process, and their groups."""
    from megatron_ross.parallel.groups import initialize_groups
    from megatron_ross.platform import ensure_platform
    from megatron_ross.training.build import build_optimizer, build_stages, wrap_ddp

    ensure_platform()
    made = []
    groups = None
    for freeze in (True, False):
        run = RunConfig(parallel=parallel, trainability=TrainabilityConfig(freeze_language_model=freeze))
        layout = resolve_layout(run, model, torch.distributed.get_world_size())
        groups = groups or initialize_groups(parallel, layout, tie_embeddings=False, seed=1)
        stages = build_stages(model, run, layout, groups)
        for parameter in stages[0].parameters():
            torch.nn.init.normal_(parameter, std=0.02)
        chunks = wrap_ddp(stages, run)
        stages[0].config.finalize_model_grads_func = _finalizer(chunks, groups)
        made.append(Stage(run, stages, chunks, build_optimizer(chunks, run)))
    return made, groups


def _finalizer(chunks: list, groups: Any):
    from megatron_ross.parallel.grad_sync import finalize_gradients

    return lambda *args, **kwargs: finalize_gradients(chunks, groups)


def microbatch(model: RossModelConfig, tp_rank: int = 0, tp_size: int = 1):
    from megatron_ross.data.batch import RossMicrobatch

    side, num_image_tokens = model.vision.image_size, model.vision.num_image_tokens
    image_mask, labels = torch.zeros(NUM_ROWS, LENGTH, dtype=torch.bool), torch.full((NUM_ROWS, LENGTH), -100)
    image_mask[:, 5 : 5 + num_image_tokens] = True
    labels[:, -NUM_LABELS:] = 7
    return RossMicrobatch(
        tokens=torch.randint(0, model.language.vocab_size, (NUM_ROWS, LENGTH)),
        labels=labels,
        position_ids=torch.arange(LENGTH).repeat(NUM_ROWS, 1),
        image_mask=image_mask,
        num_images=NUM_ROWS,
        recon_start=torch.arange(NUM_ROWS) * LENGTH + 5,
        recon_weight=torch.ones(NUM_ROWS),
        noise_keys=torch.zeros(NUM_ROWS, 3, dtype=torch.int64),
        sample_ids=list(range(NUM_ROWS)),
        lengths=[LENGTH] * NUM_ROWS,
        pixels=torch.randn(NUM_ROWS, 3, side, side).chunk(tp_size)[tp_rank],
    )


def step_seconds(rank: int, world_size: int) -> tuple[float, float]:
    """CPU time of the cheapest step of stage 1 and of stage 2, which take turns.

    Other work on the machine makes a step wait, but adds little to the processor's time for it: one thread does it all.
    """
    assert torch.get_num_threads() == 1
    model = wide_model(384)
    made, groups = both_stages(model, ParallelConfig())
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(STEPS):
        for stage, measured in zip(made, seconds, strict=True):
            batches = [microbatch(model)]
            begin = time.process_time()
            stage.step(batches, groups)
            measured.append(time.process_time() - begin)
    return min(seconds[0]), min(seconds[1])


@pytest.mark.distributed
def test_a_step_of_stage_1_is_faster_than_one_of_stage_2() -> None:
    ((first, second),) = run_ranks(step_seconds, 1)
    assert first < NOTICEABLY * second


def allocations(rank: int, world_size: int, parallel: ParallelConfig) -> None:
    """After a step: gradient buffers, optimizer state and `.grad` of stage 1 cover what is trained and nothing else."""
    model = wide_model(96)
    (stage, _), groups = both_stages(model, parallel)
    stage.step([microbatch(model, groups.tp.rank(), groups.tp.size())], groups)
    parameters = dict(stage.stages[0].named_parameters())
    frozen = {name: p for name, p in parameters.items() if not p.requires_grad}
    trained = {name: p for name, p in parameters.items() if p.requires_grad}
    assert all("projector" in name or "denoiser" in name for name in trained)
    assert any("decoder" in name for name in frozen)
    assert not [name for name, p in frozen.items() if p.grad is not None or getattr(p, "main_grad", None) is not None]
    numel = sum(p.numel() for p in trained.values())
    (buffer,) = stage.chunks[0].buffers
    padding = 64 * len(trained) + 1024
    assert numel <= buffer.grad_data.numel() <= numel + padding
    optimizers = getattr(stage.optimizer, "chained_optimizers", [stage.optimizer])
    states = [state for o in optimizers for state in o.optimizer.state.values()]
    assert sum(state["exp_avg"].numel() for state in states) == numel


@pytest.mark.distributed
@pytest.mark.parametrize("tp", [1, 2])
def test_nothing_is_allocated_for_frozen_weights(tp: int) -> None:
    run_ranks(allocations, tp, ParallelConfig(tensor_model_parallel_size=tp))


class Products(TorchDispatchMode):
    """Shapes of the results of matrix products inside, and names of the batched ones."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()
        self.batched: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.name()
        if isinstance(result, Tensor) and any(product in name for product in ("::mm", "::addmm", "::bmm", "::baddbmm")):
            self.shapes.add(tuple(result.shape))
            if "bmm" in name:
                self.batched.append(f"{name} {[tuple(a.shape) for a in args if isinstance(a, Tensor)]}")
        return result


def backward_products(rank: int, world_size: int, parallel: ParallelConfig) -> list[dict[str, Any]]:
    """Of stage 1 and stage 2: operations of the backward pass, shapes of its products, and shapes of weights."""
    from megatron_ross.losses import LossScales

    model = wide_model(96)
    made, groups = both_stages(model, parallel)
    results = []
    for made_stage in made:
        (stage,) = made_stage.stages
        loss = stage(microbatch(model, groups.tp.rank(), groups.tp.size()), LossScales(1.0, 1.0))
        with FlopCounterMode(display=False) as flops, Products() as products:
            loss.backward()
        language = [p for n, p in stage.named_parameters() if n.startswith(("decoder.", "output_layer."))]
        weights = {tuple(p.shape) for p in language if p.dim() == 2}
        transposed = {tuple(reversed(shape)) for shape in weights}
        results.append(
            {
                "flops": flops.get_total_flops(),
                "weight_gradients": products.shapes & (weights | transposed),
                "num_weights": len(weights),
                "batched": products.batched,
            }
        )
    return results


@pytest.mark.distributed
@pytest.mark.parametrize("tp", [1, 2])
def test_no_weight_gradient_of_the_frozen_model_is_computed(tp: int) -> None:
    """And the gradient of the input is a plain product of two matrices, whatever strides it comes with."""
    (first, second), *_ = run_ranks(backward_products, tp, ParallelConfig(tensor_model_parallel_size=tp))
    assert not first["weight_gradients"]
    assert len(second["weight_gradients"]) >= second["num_weights"]  # the check sees them where they are
    assert not first["batched"]


@pytest.mark.distributed
def test_backward_operations_of_stage_1_are_those_that_the_planner_counts() -> None:
    (results,) = run_ranks(backward_products, 1, ParallelConfig())
    model = wide_model(96)
    # The counter does not know the CPU's fused attention.
    work = Work(NUM_ROWS * LENGTH, 0, NUM_ROWS * NUM_LABELS, NUM_ROWS, NUM_ROWS)
    for freeze, result in zip((True, False), results, strict=True):
        trained = Trained.of(TrainabilityConfig(freeze_language_model=freeze))
        counted = sum(part.backward for part in module_flops(model, trained, work, 4).values())
        assert result["flops"] == pytest.approx(counted, rel=0.02)
