"""bf16 parameters with fp32 main weights and gradient sums, and the denoiser's own arithmetic, bounded against fp32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers import golden
from tests.helpers.batches import make_batch
from tests.helpers.distributed import run_ranks
from tests.helpers.runs import Outcome, one_step, open_session
from tests.helpers.variants import Stored, make_variant

# bf16 keeps 8 bits: one rounding is 2^-9 = 0.2 %, and errors of many roundings largely cancel in a mean.
LM_BF16, RECON_BF16, DENOISER_BF16 = 3e-3, 3e-3, 3e-3


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Stored]:
    return {name: make_variant(tmp_path_factory.mktemp(name), name) for name in golden.MODELS}


def cosine(a: Outcome, b: Outcome) -> float:
    """Between the two whole gradients."""
    x, y = (torch.cat([o.gradients[n].double().flatten() for n in sorted(a.gradients)]) for o in (a, b))
    return float(x @ y / (x.norm() * y.norm()))


@pytest.mark.parametrize("model", golden.MODELS)
def test_bf16_stays_close_to_fp32(model: str, stored: dict[str, Stored]) -> None:
    path = stored[model].path
    (wide,) = run_ranks(one_step, 1, path, "mixed", {"micro_batch_size": 4})
    (narrow,) = run_ranks(one_step, 1, path, "mixed", {"micro_batch_size": 4, "bf16": True})
    assert narrow.lm_loss == pytest.approx(wide.lm_loss, rel=LM_BF16)
    assert narrow.recon_loss == pytest.approx(wide.recon_loss, rel=RECON_BF16)
    assert narrow.lm_loss != wide.lm_loss
    assert cosine(narrow, wide) > 0.999


def test_bf16_on_four_ranks_stays_close_to_one(stored: dict[str, Stored]) -> None:
    path = stored["qwen2_siglip"].path
    flat = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "layout": "V|Et*4NDH"}
    (alone,) = run_ranks(one_step, 1, path, "mixed", {"bf16": True})
    ours = run_ranks(one_step, 4, path, "mixed", {"bf16": True, **flat})[0]
    assert ours.lm_loss == pytest.approx(alone.lm_loss, rel=LM_BF16)
    assert ours.recon_loss == pytest.approx(alone.recon_loss, rel=RECON_BF16)
    assert cosine(ours, alone) > 0.999


def test_arithmetic_of_the_denoiser(stored: dict[str, Stored]) -> None:
    """bf16 changes the reconstruction loss a little and nothing else; TF32 exists on GPUs only."""
    path = stored["llama_clip"].path
    base, narrow, tf32 = (
        run_ranks(one_step, 1, path, "mixed", {"denoiser_dtype": dtype})[0] for dtype in ("fp32", "bf16", "tf32")
    )
    assert narrow.lm_loss == base.lm_loss
    assert narrow.recon_loss != base.recon_loss
    assert narrow.recon_loss == pytest.approx(base.recon_loss, rel=DENOISER_BF16)
    assert cosine(narrow, base) > 0.999
    assert (tf32.lm_loss, tf32.recon_loss) == pytest.approx((base.lm_loss, base.recon_loss), rel=1e-6)


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_arithmetic_of_the_tower(trained: bool, stored: dict[str, Stored]) -> None:
    """A tower of another precision than the decoder's: in between the two, and on the side that was asked for."""
    path = stored["llama_clip"].path
    flat = {"unfreeze_mm_vision_tower": trained, "micro_batch_size": 4}
    results = {
        (bf16, dtype): run_ranks(one_step, 1, path, "mixed", flat | {"bf16": bf16, "vision_tower_dtype": dtype})[0]
        for bf16 in (False, True)
        for dtype in ("fp32", "bf16")
    }
    for bf16 in (False, True):
        wide, narrow = results[bf16, "fp32"], results[bf16, "bf16"]
        assert narrow.lm_loss != wide.lm_loss
        assert narrow.lm_loss == pytest.approx(wide.lm_loss, rel=LM_BF16)
        assert narrow.recon_loss == pytest.approx(wide.recon_loss, rel=RECON_BF16)
        assert cosine(narrow, wide) > 0.999


def main_weights_after(rank: int, world_size: int, path: Path, steps: int, lr: float) -> dict[str, Any]:
    """Steps too small for bf16: how far the stored and the main weights moved, and in what the sums are kept."""
    flat = {"bf16": True, "lr": lr, "adam_eps": 1e-8, "micro_batch_size": 8}
    session = open_session(path, flat)
    try:
        batches = session.microbatches(make_batch("mixed", session.model))
        (parameter,) = (p for n, p in session.stages[0].named_parameters() if n == "output_layer.weight")
        before = parameter.detach().clone()
        main = parameter.main_param
        first = main.detach().clone()
        for _ in range(steps):
            session.losses_and_gradients(batches)
            session.optimizer.step()
        return {
            "dtypes": (parameter.dtype, main.dtype, parameter.main_grad.dtype),
            "moved_per_step": float((main - first).abs().median()) / steps,
            "is_rounded_main": bool(torch.equal(parameter.flatten(), main.to(torch.bfloat16))),
            "changed": float((parameter != before).float().mean()),
        }
    finally:
        session.close()


def test_small_updates_add_up_in_fp32_main_weights(stored: dict[str, Stored]) -> None:
    lr = 1e-6  # far below the spacing of bf16 numbers near typical weights
    (result,) = run_ranks(main_weights_after, 1, stored["qwen2_siglip"].path, 3, lr)
    assert result["dtypes"] == (torch.bfloat16, torch.float32, torch.float32)
    assert 0.5 * lr < result["moved_per_step"] < 1.5 * lr
    assert result["is_rounded_main"]
    assert result["changed"] < 0.5
