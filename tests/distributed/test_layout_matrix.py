"""Every layout computes what one process computes: losses, every gradient, and the parameters after an optimizer step.

The rows below cover every feasible pair of choices of tensor, pipeline, virtual pipeline, sequence and data
parallelism, places of tower and heads, microbatch size, stage of training, kind of batch and model (one of them with
tied embeddings and a vocabulary that two ranks do not divide). `make test-layouts` runs the full product.
What one process computes is checked in test_default_mode.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.helpers.batches import KINDS
from tests.helpers.distributed import run_ranks
from tests.helpers.layout_space import FACTORS, MODELS, Row, all_rows, pairs, pairwise_rows
from tests.helpers.runs import SETTINGS, Outcome, one_step, worst_gradient
from tests.helpers.variants import Stored, make_variant, odd_vocabulary, tied

LOSS, GRADIENT, UPDATE = 1e-5, 1e-4, 2e-4
Compare = Callable[[Row], None]

PAIRWISE = pairwise_rows()
PARTS = ("mm_projector", "mm_inv_projector", "embed_tokens", "lm_head")
TIED = "tied_odd_vocabulary"


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Stored]:
    made = {name: make_variant(tmp_path_factory.mktemp(name), name) for name in MODELS if name != TIED}
    return made | {TIED: make_variant(tmp_path_factory.mktemp("tied"), "qwen2_siglip", tied, odd_vocabulary)}


@pytest.fixture(scope="module")
def compare(stored: dict[str, Stored]) -> Compare:
    """Runs a row and compares it with the one-process run of the same model, stage and batch."""
    alone: dict[tuple[str, int, str], Outcome] = {}

    def check(row: Row) -> None:
        key = (row.model, row.stage, row.kind)
        path = stored[row.model].path
        if key not in alone:
            flat = {"layout": "VEt*4NDH", "micro_batch_size": 1, "freeze_language_model": row.stage == 1}
            (alone[key],) = run_ranks(one_step, 1, path, row.kind, flat)
        got = run_ranks(one_step, row.world_size, path, row.kind, row.settings())[0]
        assert_same(got, alone[key])

    return check


def module_norms(tensors: dict[str, Tensor]) -> dict[str, float]:
    """Norm of each part of the model."""
    parts: dict[str, list[Tensor]] = {}
    for name, tensor in tensors.items():
        part = next((p for p in PARTS if p in name), "decoder")
        parts.setdefault(part, []).append(tensor.double().flatten())
    return {part: float(torch.cat(found).norm()) for part, found in parts.items()}


def assert_same(got: Outcome, expected: Outcome) -> None:
    assert got.lm_loss == pytest.approx(expected.lm_loss, rel=LOSS)
    assert got.recon_loss == pytest.approx(expected.recon_loss, rel=LOSS)
    assert got.grad_norm == pytest.approx(expected.grad_norm, rel=GRADIENT)
    assert module_norms(got.gradients) == pytest.approx(module_norms(expected.gradients), rel=GRADIENT)
    error, name = worst_gradient(got.gradients, expected.gradients)
    assert error < GRADIENT, name
    assert sorted(got.parameters) == sorted(expected.parameters)
    # The update, not the parameter: lr * g / (|g| + eps) with both moments in their first step.
    largest = max(float(g.norm()) for g in expected.gradients.values())
    for name, parameter in expected.parameters.items():
        if float(expected.gradients[name].norm()) > 1e-6 * largest:
            gradient = expected.gradients[name]
            update = SETTINGS["lr"] * gradient / (gradient.abs() + SETTINGS["adam_eps"])
            assert float((got.parameters[name] - parameter).norm()) < UPDATE * float(update.norm()), name


@pytest.mark.parametrize("row", PAIRWISE, ids=str)
def test_layout_equals_one_process(row: Row, compare: Compare) -> None:
    compare(row)


def test_rows_cover_every_feasible_pair() -> None:
    wanted = {pair for row in all_rows() for pair in pairs(row)}
    covered = {pair for row in PAIRWISE for pair in pairs(row)}
    assert covered == wanted
    chosen = {(name, getattr(row, name)) for row in PAIRWISE for name in FACTORS}
    assert chosen == {(name, value) for name, values in FACTORS.items() for value in values}


@pytest.mark.layouts
@pytest.mark.parametrize(
    "row", sorted(all_rows(model="qwen2_siglip", kind="mixed"), key=lambda r: r.world_size), ids=str
)
def test_full_product(row: Row, compare: Compare) -> None:
    """All layouts with the batch that has everything."""
    compare(row)


@pytest.mark.layouts
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "mixed"])
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(
    "row",
    [r for r in all_rows(model="qwen2_siglip", kind="mixed", micro_batch_size=1) if r.heads != "NH|D"],
    ids=lambda r: str(r).partition("-mbs")[0] + f"-stage{r.stage}",
)
def test_full_product_of_kinds_and_models(row: Row, kind: str, model: str, compare: Compare) -> None:
    compare(replace(row, kind=kind, model=model))
