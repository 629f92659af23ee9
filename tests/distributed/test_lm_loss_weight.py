"""`lm_loss_weight`: equal to the oracle's; 0 tunes on images alone, and neither runs nor trains the LM head."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_ross.models.lm_head import VocabularyShard
from megatron_ross.planner.flops import Trained, module_flops
from tests.helpers import variants
from tests.helpers.batches import make_batch
from tests.helpers.distributed import run_ranks
from tests.helpers.oracle import DENOISER, PROJECTOR, TOWER, VAE, Oracle
from tests.helpers.runs import SETTINGS, Outcome, one_step, worst_gradient
from tests.helpers.toy_run import train, two_stage_settings, with_trainer
from tests.helpers.variants import Stored, make_variant

LOSS, GRADIENT = 1e-5, 1e-4
OFF = {"lm_loss_weight": 0}
HEAD, TABLE = "lm_head.weight", DENOISER + "pos_embed"
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one rank": (1, {}),
    "tp2 with sequence parallelism": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "pp2": (2, {"pipeline_model_parallel_size": 2, "layout": "VEt*2|t*2NDH"}),
    "pp2, H alone": (2, {"pipeline_model_parallel_size": 2, "layout": "VEt*4ND|H"}),
    "pp2, D behind H": (2, {"pipeline_model_parallel_size": 2, "layout": "VEt*4NH|D"}),
    "dp2 with overlap": (2, {"overlap_grad_reduce": True}),
}


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Stored:
    return make_variant(tmp_path_factory.mktemp("stored"), "qwen2_siglip")


def counting_step(rank: int, world_size: int, path: Path, flat: dict[str, Any]) -> tuple[Outcome | None, int]:
    """A step, and how many rows of logits it made."""
    logits, rows = VocabularyShard.logits, []

    def counted(self: VocabularyShard, hidden: Any, weight: Any) -> Any:
        rows.append(hidden.shape[0])
        return logits(self, hidden, weight)

    VocabularyShard.logits = counted  # type: ignore[method-assign]
    try:
        return one_step(rank, world_size, path, "mixed", flat), sum(rows)
    finally:
        VocabularyShard.logits = logits  # type: ignore[method-assign]


def assert_equals_oracle(ours: Outcome, stored: Stored, **weights: float) -> None:
    oracle = Oracle(stored.composite, stored.model).run(
        make_batch("mixed", stored.model), seed=SETTINGS["seed"], **weights
    )
    assert ours.lm_loss == pytest.approx(oracle.lm_loss, rel=LOSS)
    assert ours.recon_loss == pytest.approx(oracle.recon_loss, rel=LOSS)
    frozen = (TOWER, VAE, TABLE, *((HEAD,) if not weights["lm_loss_weight"] else ()))
    expected = {n: g for n, g in oracle.gradients.items() if not n.startswith(frozen)}
    error, name = worst_gradient(ours.gradients, expected)
    assert error < GRADIENT, name


@pytest.mark.distributed
def test_a_weight_scales_the_loss(stored: Stored) -> None:
    flat = {"micro_batch_size": 2, "lm_loss_weight": 0.3, "recon_loss_weight": 1.7}
    (ours,) = run_ranks(one_step, 1, stored.path, "mixed", flat)
    assert_equals_oracle(ours, stored, lm_loss_weight=0.3, recon_loss_weight=1.7)


@pytest.mark.distributed
@pytest.mark.parametrize("layout", LAYOUTS)
def test_without_weight_the_head_does_not_run_and_everything_before_it_is_trained(layout: str, stored: Stored) -> None:
    ranks, flat = LAYOUTS[layout]
    results = run_ranks(counting_step, ranks, stored.path, flat | OFF)
    assert sum(rows for _, rows in results) == 0
    ours = results[0][0]
    assert ours.lm_loss == 0
    assert HEAD not in ours.gradients
    assert_equals_oracle(ours, stored, lm_loss_weight=0.0)


@pytest.mark.distributed
def test_a_tied_head_is_trained_as_the_embedding(tmp_path: Path) -> None:
    tied = make_variant(tmp_path, "qwen2_siglip", variants.tied)
    flat = {"pipeline_model_parallel_size": 2, "layout": "VEt*2|t*2NDH"} | OFF
    assert_equals_oracle(run_ranks(one_step, 2, tied.path, "mixed", flat)[0], tied, lm_loss_weight=0.0)


@pytest.mark.distributed
def test_only_the_denoiser_is_tuned_on_images_alone(stored: Stored) -> None:
    """As the recipe does it: nothing before the denoiser has a gradient."""
    frozen = {"freeze_language_model": True, "freeze_mm_mlp_adapter": True, "train_denoiser_position_table": False}
    for ranks, flat in (LAYOUTS["one rank"], LAYOUTS["pp2"], LAYOUTS["pp2, H alone"]):
        ours = run_ranks(one_step, ranks, stored.path, "mixed", flat | OFF | frozen)[0]
        assert all(name.startswith(DENOISER) for name in ours.gradients)
        oracle = Oracle(stored.composite, stored.model).run(make_batch("mixed", stored.model), seed=SETTINGS["seed"])
        expected = {n: g for n, g in oracle.gradients.items() if n.startswith(DENOISER) and n != TABLE}
        error, name = worst_gradient(ours.gradients, expected)
        assert error < GRADIENT, name
    assert PROJECTOR


def flops_of_a_step(rank: int, world_size: int, flat: dict[str, Any]) -> tuple[float, float]:
    """What training counts for a step, and the planner's formula for it without head."""

    def act(trainer: Any) -> tuple[float, float]:
        _, work = trainer._step()
        assert work.supervised_tokens == 0
        parts = module_flops(
            trainer.manifest.model, Trained.of(trainer.run.trainability), work, trainer.run.loss.denoiser_passes
        )
        return trainer._flops(work), sum(part.total for name, part in parts.items() if name != "head")

    return with_trainer(flat, act)


@pytest.mark.distributed
def test_a_run_on_records_without_answers(tmp_path: Path) -> None:
    """Images alone, beside text that has nothing to train on: trained, validated, saved, resumed."""
    flat = two_stage_settings(tmp_path)
    records = json.loads(Path(flat["data_path"]).read_text())
    (tmp_path / "run").mkdir()  # as the entry point makes it
    path = tmp_path / "images.json"
    path.write_text(json.dumps([{"image": r["image"]} if "image" in r else r for r in records]))
    flat |= {"data_path": str(path), "save": str(tmp_path / "run"), "load": str(tmp_path / "run"), **OFF}
    flat |= {"freeze_language_model": True, "freeze_mm_mlp_adapter": True, "log_interval": 1}
    flat |= {"valid_data_path": str(path), "valid_image_folder": flat["image_folder"], "eval_interval": 2}
    for train_iters in (2, 4):
        assert run_ranks(train, 2, flat | {"train_iters": train_iters, "lr_decay_style": "constant"}) == ["", ""]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["lm_loss"] for line in lines] == [0] * 4
    assert all(line["recon_loss"] > 0 and line["grad_norm"] > 0 for line in lines)
    assert lines[-1]["bad_samples"] == {}
    valid = [json.loads(line) for line in (tmp_path / "run" / "validation.jsonl").read_text().splitlines()]
    assert [line["num_images"] for line in valid] == [29] * 2
    assert [line["num_tokens"] for line in valid] == [0] * 2
    counted, formula = run_ranks(flops_of_a_step, 2, flat | {"train_iters": 6, "lr_decay_style": "constant"})[0]
    assert counted == pytest.approx(formula)
