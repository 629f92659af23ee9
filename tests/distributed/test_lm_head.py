"""The chunked LM head gives the losses, gradients and updates of the whole one, in every kind of layout."""

from __future__ import annotations

from typing import Any

import pytest

from tests.distributed.test_layout_matrix import assert_same
from tests.helpers.distributed import run_ranks
from tests.helpers.runs import one_step
from tests.helpers.variants import Stored, make_variant, odd_vocabulary, tied

CHUNK = 5
"""Smaller than the supervised tokens of a sample, and no divisor of most."""

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one process": (1, {}),
    "tp2": (2, {"tensor_model_parallel_size": 2}),
    "tp2 sp dp2": (4, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "pp2": (2, {"pipeline_model_parallel_size": 2, "layout": "VEt*2|t*2NDH"}),
    "tp2 sp pp2, H before D": (
        4,
        {
            "tensor_model_parallel_size": 2,
            "sequence_parallel": True,
            "pipeline_model_parallel_size": 2,
            "layout": "VEt*4NH|D",
        },
    ),
}


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Stored]:
    return {
        "plain": make_variant(tmp_path_factory.mktemp("plain"), "qwen2_siglip"),
        "tied": make_variant(tmp_path_factory.mktemp("tied"), "qwen2_siglip", tied, odd_vocabulary),
    }


@pytest.mark.distributed
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("model", "kind", "stage"),
    [("plain", "unsupervised_microbatches", 2), ("tied", "mixed", 2), ("plain", "mixed", 1)],
)
def test_chunked_head_equals_the_whole_one(
    model: str, kind: str, stage: int, layout: str, stored: dict[str, Stored]
) -> None:
    world_size, flat = LAYOUTS[layout]
    settings = {"micro_batch_size": 2, "freeze_language_model": stage == 1}
    (whole,) = run_ranks(one_step, 1, stored[model].path, kind, settings)
    chunked = run_ranks(
        one_step, world_size, stored[model].path, kind, settings | flat | {"lm_head_chunk_tokens": CHUNK}
    )[0]
    assert_same(chunked, whole)
