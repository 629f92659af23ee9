"""The default losses and their gradients equal a float64 oracle that shares no code with the stages.

Default mode: one mean over the supervised tokens of the global batch, one over its reconstructed images. The batches
hold text-only microbatches, microbatches without supervised tokens, several images per sample and truncated samples.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_ross.parity.fixture import case_samples, load_fixture
from megatron_ross.parity.runner import case_draws
from tests.helpers import golden
from tests.helpers.batches import KINDS, make_batch
from tests.helpers.distributed import run_ranks
from tests.helpers.oracle import DENOISER, TOWER, VAE, Oracle, OracleResult
from tests.helpers.runs import SETTINGS, Outcome, one_step, worst_gradient
from tests.helpers.variants import Stored, make_variant

LOSS, GRADIENT = 1e-5, 1e-4


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Stored]:
    return {name: make_variant(tmp_path_factory.mktemp(name), name) for name in golden.MODELS}


def trained(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    """What stage 2 trains."""
    frozen = (TOWER, VAE, DENOISER + "pos_embed")
    return {name: g for name, g in gradients.items() if not name.startswith(frozen)}


def assert_equal(ours: Outcome, oracle: OracleResult) -> None:
    assert ours.lm_loss == pytest.approx(oracle.lm_loss, rel=LOSS)
    assert ours.recon_loss == pytest.approx(oracle.recon_loss, rel=LOSS)
    expected = trained(oracle.gradients)
    got = {name: g for name, g in ours.gradients.items() if name in expected or bool(g.any())}
    error, name = worst_gradient(got, expected)
    assert error < GRADIENT, name


@pytest.mark.parametrize("model", golden.MODELS)
def test_the_oracle_agrees_with_recorded_numbers(model: str, stored: dict[str, Stored]) -> None:
    """In a batch where every sample has one image, the published means are the default ones."""
    (fixture,) = load_fixture(golden.GOLDEN, model)
    case = fixture.case("a")
    samples = case_samples(case, stored[model].model)
    result = Oracle(stored[model].composite, stored[model].model).run(samples, seed=0, draws=case_draws(case))
    recorded = fixture.metadata["losses"]["a"]
    assert result.lm_loss == pytest.approx(recorded["lm_loss"], rel=LOSS)
    assert result.recon_loss == pytest.approx(recorded["vm_loss"], rel=LOSS)
    wanted = case.gradients["stage2"]  # of one model not all are recorded
    error, name = worst_gradient({n: g for n, g in result.gradients.items() if n in wanted}, wanted)
    assert error < GRADIENT, name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model", golden.MODELS)
def test_one_process_equals_the_oracle(model: str, kind: str, stored: dict[str, Stored]) -> None:
    target = stored[model]
    flat = {"micro_batch_size": 2, "recon_loss_weight": 0.7}
    (ours,) = run_ranks(one_step, 1, target.path, kind, flat)
    oracle = Oracle(target.composite, target.model)
    expected = oracle.run(make_batch(kind, target.model), seed=SETTINGS["seed"], recon_loss_weight=0.7)
    assert_equal(ours, expected)


def test_four_ranks_equal_the_oracle(stored: dict[str, Stored]) -> None:
    """Directly, not by way of the one-process run."""
    target = stored["qwen2_siglip"]
    flat = {
        "tensor_model_parallel_size": 2,
        "pipeline_model_parallel_size": 2,
        "sequence_parallel": True,
        "layout": "VEt*3|tNDH",
    }
    ours = run_ranks(one_step, 4, target.path, "mixed", flat)[0]
    expected = Oracle(target.composite, target.model).run(make_batch("mixed", target.model), seed=SETTINGS["seed"])
    assert_equal(ours, expected)


def test_the_batches_are_what_they_are_for() -> None:
    """Every difficulty that the docstring names is really in a batch."""
    model = golden.model_config("qwen2_siglip")
    mixed = make_batch("mixed", model)
    assert max(len(s.images) for s in mixed) > 1
    assert any(s.images and len(s.input_ids) == s.images[-1].start + model.vision.num_image_tokens for s in mixed)
    text = make_batch("text_only_microbatches", model)
    assert not any(s.images for s in text[:2])
    assert any(s.images for s in text)
    silent = make_batch("unsupervised_microbatches", model)
    assert not any(bool((s.labels >= 0).any()) for s in silent[:2])
    assert all(torch.equal(a.input_ids, b.input_ids) for a, b in zip(mixed, make_batch("mixed", model), strict=True))
