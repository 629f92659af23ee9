"""Predicted bytes against what ranks really allocate, on the stages that training builds."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_ross.config.model import RossModelConfig
from megatron_ross.config.schema import ComputeConfig, DataConfig, ParallelConfig, RunConfig, TrainabilityConfig
from megatron_ross.config.validate import resolve_layout
from megatron_ross.planner.activations import ActivationModel, Shapes
from megatron_ross.planner.buffers import bucket_size, build_buffer
from megatron_ross.planner.memory import chunks_in_flight, rank_memory, state_memory
from megatron_ross.planner.parameters import Parameter
from tests.helpers.distributed import run_ranks
from tests.helpers.golden import model_config

STAGE_1 = TrainabilityConfig(freeze_language_model=True)
FULL = ComputeConfig(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
NUM_ROWS, LENGTH, NUM_LABELS = 2, 160, 40


def run_of(
    tp: int = 1, pp: int = 1, layout: str = "auto", train: TrainabilityConfig | None = None, **compute: Any
) -> RunConfig:
    parallel = ParallelConfig(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp, layout=layout)
    return RunConfig(parallel=parallel, compute=ComputeConfig(**compute), trainability=train or TrainabilityConfig())


def tied(model: RossModelConfig) -> RossModelConfig:
    return dataclasses.replace(
        model, language=dataclasses.replace(model.language, share_embeddings_and_output_weights=True)
    )


def build(model: RossModelConfig, run: RunConfig, world_size: int):
    """This rank's stages and groups, as training makes them."""
    from megatron_ross.parallel.groups import initialize_groups
    from megatron_ross.platform import ensure_platform
    from megatron_ross.training.build import build_stages

    ensure_platform()
    layout = resolve_layout(run, model, world_size)
    tie = model.language.share_embeddings_and_output_weights
    groups = initialize_groups(run.parallel, layout, tie_embeddings=tie, seed=1)
    return layout, groups, build_stages(model, run, layout, groups)


def allocated(rank: int, world_size: int, model: RossModelConfig, run: RunConfig) -> tuple[int, int, int, int]:
    """(frozen, parameters, gradients, optimizer state) in bytes after an update, which the prediction must equal."""
    from megatron_ross.parallel.groups import destroy_groups
    from megatron_ross.training.build import build_optimizer, wrap_ddp

    layout, groups, stages = build(model, run, world_size)
    chunks = wrap_ddp(stages, run)
    optimizer = build_optimizer(chunks, run)
    optimizer.prepare_grads()
    optimizer.step_with_ready_grads()
    parameters = [p for stage in stages for p in stage.parameters()]
    buffers = [buffer for chunk in chunks for buffer in chunk.buffers]
    state = optimizer_tensors(optimizer)
    measured = (
        storage_bytes([p for p in parameters if not p.requires_grad]),
        storage_bytes(parameters),
        storage_bytes([buffer.grad_data for buffer in buffers]),
        sum(t.nbytes for t in state),
    )
    predicted = state_memory(
        model, run, layout, pp_rank=groups.pp.rank(), dp_rank=groups.dp.rank(), dp_size=groups.dp.size()
    )
    destroy_groups()
    assert (predicted.frozen, predicted.parameters, predicted.gradients, predicted.optimizer) == measured
    return measured


def optimizer_tensors(optimizer: Any) -> list[Tensor]:
    """Moments, and main weights where they are not the model's own; counters per tensor left out."""
    tensors = []
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        for state in part.optimizer.state.values():
            tensors += [state["exp_avg"], state["exp_avg_sq"]]
        tensors += [t for group in part.shard_fp32_from_float16_groups for t in group if t is not None]
    return tensors


def storage_bytes(tensors: list[Tensor]) -> int:
    """Bytes of the storages behind the tensors, each once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("name", "run"),
    [
        ("qwen2_siglip", run_of()),
        ("llama_clip", run_of(bf16=True)),
        ("qwen2_siglip", run_of(train=STAGE_1, bf16=True)),
        ("qwen2_siglip", run_of(tp=2, bf16=True)),
        ("llama_clip", run_of(pp=2, layout="VEt*3|tNDH", bf16=True)),
        ("llama_clip", run_of(pp=2, layout="V|Et*4NDH")),
        ("qwen2_siglip", run_of(pp=2, layout="VEt|t|t*2N|DH", bf16=True)),
        ("qwen2_siglip", run_of(pp=2, train=STAGE_1)),
        ("qwen2_siglip", dataclasses.replace(run_of(bf16=True), data=DataConfig(latent_cache="cache"))),
        ("llama_clip", run_of(train=TrainabilityConfig(unfreeze_mm_vision_tower=True), bf16=True)),
    ],
    ids=lambda value: str(value.parallel.layout) if isinstance(value, RunConfig) else value,
)
def test_parameters_gradients_and_optimizer_state_are_exact(name: str, run: RunConfig) -> None:
    measured = run_ranks(allocated, 2, model_config(name), run)
    assert any(gradients > 0 for _, _, gradients, _ in measured)


@pytest.mark.distributed
@pytest.mark.parametrize("pp", [1, 2])
def test_tied_embeddings_and_llava_are_exact(pp: int) -> None:
    model = tied(model_config("qwen2_siglip"))
    run_ranks(allocated, 2, model, run_of(pp=pp, bf16=True))
    run_ranks(allocated, 2, dataclasses.replace(model, denoiser=None, vae=None), run_of(pp=pp))


@pytest.mark.distributed
def test_tied_embeddings_in_two_chunks_of_one_rank_are_exact() -> None:
    """Both copies count: each has its gradient and its optimizer state."""
    model = tied(model_config("qwen2_siglip"))
    layouts = {"VEt|t*2|tNH|D": 0, "V|Et*2|t*2|NDH": 1}
    for layout, rank in layouts.items():
        twice = run_ranks(allocated, 2, model, run_of(pp=2, layout=layout, bf16=True))[rank]
        plain = run_ranks(allocated, 2, model, run_of(pp=2, layout="VEt*2|t*2NDH", bf16=True))
        assert sum(twice) > 0
        assert twice != plain[rank]


def test_frozen_weights_have_neither_gradients_nor_optimizer_state() -> None:
    model = model_config("qwen2_siglip")
    stage_1, stage_2 = run_of(train=STAGE_1), run_of()
    first, second = (
        state_memory(model, run, resolve_layout(run, model, 1), pp_rank=0, dp_rank=0, dp_size=1)
        for run in (stage_1, stage_2)
    )
    assert first.gradients < second.gradients
    assert first.optimizer < second.optimizer
    assert first.parameters == pytest.approx(second.parameters, rel=1e-3)  # up to padding


def test_shards_cover_a_bucketed_buffer_once() -> None:
    parameters = [Parameter("decoder", n, True, 2) for n in (25_000_000, 30_000_001, 7, 41_000_000, 5_000_003)]
    buffer = build_buffer(parameters, 4, bucket_size(4, overlap_grad_reduce=True, pp_rank=0, chunk=0))
    assert len(buffer.buckets) == 2  # 5 + 41 million, then the rest
    assert sum(buffer.shard_numel(rank, 4) for rank in range(4)) == sum(p.numel for p in parameters)
    assert bucket_size(4, overlap_grad_reduce=True, pp_rank=1, chunk=0) is None


def test_microbatches_in_flight() -> None:
    assert chunks_in_flight(0, 4, 1, 8) == [4]
    assert chunks_in_flight(3, 4, 1, 8) == [1]
    assert chunks_in_flight(0, 4, 1, 2) == [2]
    assert sum(chunks_in_flight(0, 2, 2, 8)) == 5  # 2 * (2 - 0 - 1) warm-up, one chunk of 2, and the current one
    assert sum(chunks_in_flight(0, 4, 2, 1)) == 2


def wide_model() -> RossModelConfig:
    """Wide enough that masks and positions weigh little beside the tensors that grow with the model."""
    model = model_config("qwen2_siglip")
    language = dataclasses.replace(
        model.language,
        num_layers=2,
        hidden_size=256,
        ffn_hidden_size=640,
        num_attention_heads=8,
        num_query_groups=2,
        kv_channels=32,
        vocab_size=4096,
    )
    vision = dataclasses.replace(model.vision, hf_config=model.vision.hf_config | {"image_size": 112})
    assert model.denoiser is not None
    denoiser = dataclasses.replace(model.denoiser, width=128)
    return dataclasses.replace(model, language=language, vision=vision, denoiser=denoiser)


def saved_bytes(rank: int, world_size: int, model: RossModelConfig, run: RunConfig) -> float:
    """Bytes that autograd saves in one forward pass over two samples, parameters left out; each storage once.

    Tensor-parallel ranks have the pixels of their own images.
    """
    from megatron_ross.losses import LossScales
    from megatron_ross.parallel.groups import destroy_groups

    _, groups, stages = build(model, run, world_size)
    batch = microbatch(model)
    batch.pixels = batch.pixels.chunk(groups.tp.size())[groups.tp.rank()]
    for parameter in stages[0].parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    own = {p.untyped_storage().data_ptr() for p in stages[0].parameters()}
    saved: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if (storage := tensor.untyped_storage().data_ptr()) not in own:
            saved.setdefault(storage, tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = stages[0](batch, LossScales(1.0, 1.0))
    assert loss.requires_grad
    destroy_groups()
    return storage_bytes(list(saved.values()))


def microbatch(model: RossModelConfig):
    from megatron_ross.data.batch import RossMicrobatch

    num_image_tokens, side = model.vision.num_image_tokens, model.vision.image_size
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
        pixels=torch.randn(NUM_ROWS, 3, side, side),
    )


@pytest.mark.distributed
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("train", [TrainabilityConfig(), STAGE_1], ids=["stage2", "stage1"])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("has_denoiser", [True, False])
def test_activations_are_within_15_percent(
    bf16: bool, train: TrainabilityConfig, recompute: bool, has_denoiser: bool
) -> None:
    model = wide_model() if has_denoiser else dataclasses.replace(wide_model(), denoiser=None, vae=None)
    compute = dataclasses.replace(FULL if recompute else ComputeConfig(), bf16=bf16)
    run = RunConfig(compute=compute, trainability=train)
    shapes = Shapes(NUM_ROWS * LENGTH, NUM_ROWS * NUM_LABELS, NUM_ROWS, NUM_ROWS)
    layout = resolve_layout(run, model, 1)
    predicted = ActivationModel(model, run, shapes, fused_activation=False).stage(layout.stages[0])
    assert predicted == pytest.approx(run_ranks(saved_bytes, 2, model, run)[0], rel=0.15)


@pytest.mark.distributed
@pytest.mark.parametrize("train", [TrainabilityConfig(), STAGE_1], ids=["stage2", "stage1"])
def test_activations_with_a_chunked_head_are_within_15_percent(train: TrainabilityConfig) -> None:
    """Of a head with a vocabulary so large that its logits would be most of what is kept."""
    model = dataclasses.replace(wide_model(), denoiser=None, vae=None)
    model = dataclasses.replace(model, language=dataclasses.replace(model.language, vocab_size=40_000, num_layers=1))
    shapes = Shapes(NUM_ROWS * LENGTH, NUM_ROWS * NUM_LABELS, NUM_ROWS, NUM_ROWS)
    kept = {}
    for chunk_tokens in (16, 4096):
        run = run_of(train=train, lm_head_chunk_tokens=chunk_tokens)
        layout = resolve_layout(run, model, 1)
        activations = ActivationModel(model, run, shapes, fused_activation=False)
        kept[chunk_tokens] = activations.stage(layout.stages[0])
        assert kept[chunk_tokens] == pytest.approx(run_ranks(saved_bytes, 1, model, run)[0], rel=0.15)
        assert activations.logits_tokens == min(chunk_tokens, NUM_ROWS * NUM_LABELS)
    assert kept[16] < 0.6 * kept[4096]


@pytest.mark.distributed
def test_tensor_parallel_activations_are_within_15_percent() -> None:
    model, run = wide_model(), run_of(tp=2)
    for sequence_parallel in (False, True):
        parallel = dataclasses.replace(run.parallel, sequence_parallel=sequence_parallel)
        this = dataclasses.replace(run, parallel=parallel)
        shapes = Shapes(NUM_ROWS * LENGTH, NUM_ROWS * NUM_LABELS, NUM_ROWS, NUM_ROWS)
        spec = resolve_layout(this, model, 2).stages[0]
        predicted = ActivationModel(model, this, shapes, fused_activation=False).stage(spec)
        assert predicted == pytest.approx(run_ranks(saved_bytes, 2, model, this)[0], rel=0.15)


def test_memory_of_a_rank_has_every_category() -> None:
    model = model_config("qwen2_siglip")
    run = run_of(pp=2)
    layout = resolve_layout(run, model, 2)
    activations = ActivationModel(model, run, Shapes(64, 20, 1, 1))
    first, last = (rank_memory(activations, layout, pp_rank=rank, dp_size=1, num_microbatches=8) for rank in (0, 1))
    for memory in (first, last):
        assert min(memory.parameters, memory.gradients, memory.optimizer, memory.activations, memory.reserve) > 0
    assert first.activations > activations.stage(layout.stages[0])  # two microbatches in flight
    assert last.activations == activations.stage(layout.stages[1])
