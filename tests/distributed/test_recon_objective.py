"""`recon_objective: regress` and a reconstruction loss without weight: against the float64 oracle, and in layouts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ross.checkpoint.manifest import Manifest, resolve_checkpoint
from megatron_ross.models.latents import LatentEncoder
from tests.helpers import variants
from tests.helpers.batches import make_batch
from tests.helpers.distributed import run_ranks
from tests.helpers.oracle import DENOISER, VAE, Oracle
from tests.helpers.runs import SETTINGS, one_step, open_session, worst_gradient
from tests.helpers.toy_run import two_stage_settings, with_trainer
from tests.helpers.variants import Stored, make_variant

LOSS, GRADIENT = 1e-5, 1e-4
REGRESS = {"recon_objective": "regress"}
LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2": {"tensor_model_parallel_size": 2, "layout": "VEt*4NDH"},
    "tp2 pp2 sp": {
        "tensor_model_parallel_size": 2,
        "pipeline_model_parallel_size": 2,
        "sequence_parallel": True,
        "layout": "V|Et*4NDH",
    },
    "pp2, D apart": {"pipeline_model_parallel_size": 2, "layout": "VEt*4ND|H"},
    "dp2": {"layout": "VEt*4NDH", "micro_batch_size": 2},
}
RANKS = {"tp2": 2, "tp2 pp2 sp": 4, "pp2, D apart": 2, "dp2": 2}
TABLE = DENOISER + "pos_embed"


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Stored:
    return make_variant(tmp_path_factory.mktemp("model"), "qwen2_siglip")


@pytest.mark.distributed
@pytest.mark.parametrize("kind", ["mixed", "text_only_microbatches"])
def test_regression_equals_the_oracle(kind: str, stored: Stored) -> None:
    flat = {"micro_batch_size": 2, "recon_loss_weight": 0.7, "unfreeze_mm_vision_tower": True}
    (ours,) = run_ranks(one_step, 1, stored.path, kind, flat | REGRESS)
    batch = make_batch(kind, stored.model)
    expected = Oracle(stored.composite, stored.model).run(
        batch, seed=SETTINGS["seed"], recon_loss_weight=0.7, objective="regress"
    )
    assert ours.lm_loss == pytest.approx(expected.lm_loss, rel=LOSS)
    assert ours.recon_loss == pytest.approx(expected.recon_loss, rel=LOSS)
    trained = {n: g for n, g in expected.gradients.items() if n != TABLE and not n.startswith(VAE)}
    error, name = worst_gradient(ours.gradients, trained)
    assert error < GRADIENT, name


@pytest.mark.distributed
@pytest.mark.parametrize("layout", LAYOUTS)
def test_regression_is_the_same_in_every_layout(layout: str, stored: Stored) -> None:
    (alone,) = run_ranks(one_step, 1, stored.path, "mixed", REGRESS)
    ours = run_ranks(one_step, RANKS[layout], stored.path, "mixed", REGRESS | LAYOUTS[layout])[0]
    assert (ours.lm_loss, ours.recon_loss) == pytest.approx((alone.lm_loss, alone.recon_loss), rel=LOSS)
    error, name = worst_gradient(ours.gradients, alone.gradients)
    assert error < GRADIENT, name


def painted(rank: int, world_size: int, path: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents that training's pictures are decoded from, of one condition twice with different seeds."""
    session = open_session(path, REGRESS)
    try:
        head = session.stages[0].reconstruction
        condition = torch.ones(1, 16, session.model.language.hidden_size)
        return head.sample_latents(condition, "3", [1]), head.sample_latents(condition, "3", [2])
    finally:
        session.close()


@pytest.mark.distributed
def test_pictures_while_training_take_one_pass_without_noise(stored: Stored) -> None:
    ((first, second),) = run_ranks(painted, 1, stored.path)
    assert first.shape == (1, 64, 4, 4)
    assert torch.equal(first, second)
    assert bool(first.any())


def step_without_vae(rank: int, world_size: int, path: Path, flat: dict[str, Any]) -> Any:
    """`one_step` in which encoding an image is an error."""

    def refuse(*_: Any) -> None:
        raise AssertionError("the VAE ran")

    encode, LatentEncoder.posterior = LatentEncoder.posterior, refuse
    try:
        return one_step(rank, world_size, path, "mixed", flat)
    finally:
        LatentEncoder.posterior = encode


@pytest.mark.distributed
@pytest.mark.parametrize("layout", ["tp2", "pp2, D apart"])
@pytest.mark.parametrize("mode", ["token_mean", "reference"])
def test_without_weight_nothing_is_encoded_and_the_rest_trains_like_llava(
    layout: str, mode: str, stored: Stored, tmp_path: Path
) -> None:
    plain = make_variant(tmp_path, "qwen2_siglip", variants.without_denoiser)
    (llava,) = run_ranks(one_step, 1, plain.path, "mixed", {"loss_mode": mode})
    flat = {"recon_loss_weight": 0, "loss_mode": mode, **LAYOUTS[layout]}
    ours = run_ranks(step_without_vae, RANKS[layout], stored.path, flat)[0]
    assert (ours.lm_loss, ours.recon_loss) == pytest.approx((llava.lm_loss, 0), rel=LOSS)
    denoiser = {n: g for n, g in ours.gradients.items() if n.startswith(DENOISER)}
    assert denoiser
    assert not any(bool(g.any()) for g in denoiser.values())
    error, name = worst_gradient({n: g for n, g in ours.gradients.items() if n not in denoiser}, llava.gradients)
    assert error < GRADIENT, name


def train_and_save(rank: int, world_size: int, flat: dict[str, Any]) -> None:
    def act(trainer: Any) -> None:
        trainer._step()
        trainer.save()

    with_trainer(flat, act)


@pytest.mark.distributed
def test_checkpoints_remember_what_the_denoiser_learned(tmp_path: Path) -> None:
    flat = {**two_stage_settings(tmp_path), "train_iters": 2}
    objectives = {}
    for name, settings in {"denoise": {}, "regress": REGRESS, "off": {"recon_loss_weight": 0, **REGRESS}}.items():
        run_ranks(train_and_save, 2, {**flat, **settings, "save": str(tmp_path / name)})
        manifest = Manifest.read(resolve_checkpoint(tmp_path / name / "checkpoints"))
        objectives[name] = manifest.model.denoiser.objective
    assert objectives == {"denoise": "denoise", "regress": "regress", "off": "denoise"}
    start = {**flat, "init_from": str(tmp_path / "regress" / "checkpoints")}
    with pytest.raises(Exception, match="recon_objective=denoise: the checkpoint's denoiser was trained with regress"):
        run_ranks(train_and_save, 2, start)
