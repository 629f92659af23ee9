"""What only a GPU can run: TransformerEngine's layers, attention, FP8 and optimizers, and Megatron's straggler report.

The former are compared with local layers and PyTorch's attention. All variants start from the same weights and see the
same microbatches. On an H200 the first loss of FP8 runs was within 0.3 % of the local layers' in bf16, and the cosine
of the gradients at least 0.983.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_ross.compat import probe
from megatron_ross.config.model import RossModelConfig
from megatron_ross.config.schema import RunConfig
from tests.helpers.batches import make_batch
from tests.helpers.distributed import run_ranks
from tests.helpers.golden import model_config
from tests.helpers.runs import SETTINGS, Session
from tests.helpers.toy_run import train, two_stage_settings

STEPS = 4
LOCAL = {"bf16": True, "micro_batch_size": 4, "transformer_impl": "local", "optimizer_impl": "torch"}
ENGINE = LOCAL | {"transformer_impl": "transformer_engine"}
FP8 = ENGINE | {"fp8": "hybrid"}
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}

BF16_VARIANTS: dict[str, dict[str, Any]] = {
    "PyTorch's attention": ENGINE | {"attention_backend": "local"},
    "attention as TransformerEngine likes": ENGINE,
    "cuDNN attention": ENGINE | {"attention_backend": "fused"},
    "plain attention": ENGINE | {"attention_backend": "unfused"},
    "fused accumulation": ENGINE | {"gradient_accumulation_fusion": True},
    "recomputed": ENGINE | FULL,
    "recomputed mlp": ENGINE | {"recompute_granularity": "selective", "recompute_modules": ["mlp"]},
    "overlap": ENGINE | {"overlap_grad_reduce": True, "overlap_param_gather": True, "ddp_bucket_size": 1},
    "TransformerEngine's Adam": ENGINE | {"optimizer_impl": "transformer_engine"},
    "frozen": ENGINE | {"freeze_language_model": True},
}
FP8_VARIANTS: dict[str, dict[str, Any]] = {
    "delayed": FP8 | {"fp8_amax_history_len": 4, "fp8_amax_compute_algo": "max"},
    "delayed, bf16 weight gradients": FP8 | {"fp8_wgrad": False},
    "tensorwise": FP8 | {"fp8_recipe": "tensorwise"},
    "tensorwise, e4m3": FP8 | {"fp8": "e4m3", "fp8_recipe": "tensorwise"},
    "tensorwise, ends in bf16": FP8 | {"fp8_recipe": "tensorwise", "first_last_layers_bf16": True},
    "blockwise": FP8 | {"fp8_recipe": "blockwise"},
    "recomputed": FP8 | {"fp8_recipe": "tensorwise"} | FULL,
    "fused accumulation": FP8 | {"fp8_recipe": "tensorwise", "gradient_accumulation_fusion": True},
    "frozen": FP8 | {"fp8_recipe": "tensorwise", "freeze_language_model": True},
}


@pytest.fixture
def transformer_engine() -> None:
    if not probe().transformer_engine:
        pytest.skip(f"TransformerEngine: {probe().transformer_engine_error or 'not installed'}")


def wide_model() -> RossModelConfig:
    """All sizes of the decoder are multiples of 128, as every FP8 recipe likes them."""
    model = model_config("qwen2_siglip")
    language = dataclasses.replace(
        model.language,
        num_layers=4,
        hidden_size=256,
        ffn_hidden_size=512,
        num_attention_heads=4,
        num_query_groups=2,
        kv_channels=64,
    )
    return dataclasses.replace(model, language=language)


def open_random(model: RossModelConfig, flat: dict[str, Any], weights: dict[str, torch.Tensor]) -> Session:
    """A session without a checkpoint: weights by checkpoint name, drawn where `weights` lacks them."""
    from megatron_ross.checkpoint.model_state import model_sharded_state
    from megatron_ross.config.validate import resolve_layout
    from megatron_ross.parallel.grad_sync import finalize_gradients
    from megatron_ross.parallel.groups import initialize_groups
    from megatron_ross.platform import ensure_platform
    from megatron_ross.training.build import build_optimizer, build_stages, wrap_ddp

    ensure_platform()
    run = RunConfig.from_flat(SETTINGS | flat)
    layout = resolve_layout(run, model, dist.get_world_size())
    groups = initialize_groups(run.parallel, layout, tie_embeddings=False, seed=run.loss.seed)
    stages = build_stages(model, run, layout, groups)
    for value in model_sharded_state(stages[0]).values():
        data = value.data.detach()
        if value.key not in weights:
            drawn = torch.randn(data.shape, generator=torch.Generator().manual_seed(len(weights))) * 0.05
            weights[value.key] = drawn + (data.dim() == 1 and value.key.endswith("weight"))
        data.copy_(weights[value.key])
    chunks = wrap_ddp(stages, run)
    stages[0].config.finalize_model_grads_func = lambda *args, **kwargs: finalize_gradients(chunks, groups)
    return Session(run, model, layout, groups, stages, chunks, build_optimizer(chunks, run))


def padded(session: Session) -> list:
    return session.microbatches(make_batch("mixed", session.model))


def packed(session: Session) -> list:
    """Two packs of four samples as one microbatch."""
    from megatron_ross.data.collate import collate_packed

    samples = [(0, sample) for sample in make_batch("mixed", session.model)]
    packs = [samples[:4], samples[4:]]
    length = -(-max(sum(len(s.input_ids) for _, s in pack) for pack in packs) // 128) * 128
    batch = collate_packed(packs, length, image_size=session.model.vision.image_size)
    return [batch.to(torch.cuda.current_device())]


def outcomes(
    rank: int, world_size: int, variants: dict[str, dict[str, Any]], batches_of: Callable[[Session], list]
) -> dict[str, tuple[list[float], torch.Tensor]]:
    """{variant: (summed losses of each step, the gradient of the denoiser and projector in the first)}."""
    model, weights = wide_model(), {}
    results = {}
    for name, flat in variants.items():
        session = open_random(model, flat, weights)
        try:
            batches = batches_of(session)
            losses = []
            for step in range(STEPS):
                losses.append(sum(session.losses_and_gradients(batches)))
                if step == 0:
                    gradient = shared_gradient(session)
                session.optimizer.prepare_grads()
                session.optimizer.step_with_ready_grads()
        finally:
            session.close()
        results[name] = (losses, gradient)
    return results


def shared_gradient(session: Session) -> torch.Tensor:
    """Of the modules that are trained in both stages; what flows through the whole decoder reaches the projector."""
    modules = (session.stages[0].vision.projector, session.stages[0].reconstruction.denoiser.blocks)
    return torch.cat([p.main_grad.double().flatten() for module in modules for p in module.parameters()]).cpu()


def assert_close(results: dict[str, tuple[list[float], torch.Tensor]], *, loss: float, cosine: float) -> None:
    expected_losses, expected = results["reference"]
    for name, (losses, gradient) in results.items():
        assert losses[0] == pytest.approx(expected_losses[0], rel=loss), name
        assert losses[-1] < losses[0], f"{name} does not train"
        assert float(gradient @ expected / (gradient.norm() * expected.norm())) > cosine, name


@pytest.mark.gpu
@pytest.mark.usefixtures("transformer_engine")
def test_bf16_variants() -> None:
    variants = {"reference": LOCAL, **BF16_VARIANTS}
    if probe().flash_attention:
        variants["flash-attn"] = ENGINE | {"attention_backend": "flash"}
    assert_close(run_ranks(outcomes, 1, variants, padded, backend="nccl")[0], loss=1e-2, cosine=0.99)


@pytest.mark.gpu
@pytest.mark.usefixtures("transformer_engine")
def test_packed_samples_are_kept_apart() -> None:
    names = ("PyTorch's attention", "attention as TransformerEngine likes", "cuDNN attention", "recomputed")
    variants = {"reference": LOCAL, **{name: BF16_VARIANTS[name] for name in names}}
    if probe().flash_attention:
        variants["flash-attn"] = ENGINE | {"attention_backend": "flash"}
    together = run_ranks(outcomes, 1, variants, packed, backend="nccl")[0]
    assert_close(together, loss=1e-2, cosine=0.99)
    apart = run_ranks(outcomes, 1, {"reference": LOCAL}, padded, backend="nccl")[0]
    assert together["reference"][0][0] == pytest.approx(apart["reference"][0][0], rel=1e-2)


@pytest.mark.gpu
@pytest.mark.usefixtures("transformer_engine")
@pytest.mark.parametrize("name", FP8_VARIANTS)
def test_fp8_variants(name: str) -> None:
    least = (9, 0) if name == "blockwise" else (8, 9)
    if (probe().gpu or (0, 0)) < least:
        pytest.skip(f"FP8 of this kind needs compute capability {least[0]}.{least[1]}")
    results = run_ranks(outcomes, 1, {"reference": LOCAL, name: FP8_VARIANTS[name]}, padded, backend="nccl")[0]
    assert_close(results, loss=1e-2, cosine=0.97)


def straggler_report(rank: int, world_size: int, flat: dict[str, Any]) -> str:
    """What is printed while the run trains."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert train(rank, world_size, flat) == ""
    return printed.getvalue()


@pytest.mark.gpu
def test_the_straggler_report_is_printed(tmp_path: Path) -> None:
    """With every log line, Megatron's: time, power, temperature and throughput of the slowest and the fastest rank."""
    pytest.importorskip("pynvml", reason="the straggler report needs nvidia-ml-py")
    flat = two_stage_settings(tmp_path) | {"pipeline_model_parallel_size": 1, "layout": "VEt*4NDH"}
    flat |= {"bf16": True, "log_straggler": True, "log_interval": 1, "train_iters": 2}
    (printed,) = run_ranks(straggler_report, 1, flat, backend="nccl")
    assert len(re.findall(r"MnRtt/Rnk: .*MxPwr/Rnk: .*MxEtpt/Rnk: \d+\.\d+TF/0", printed)) == 2
