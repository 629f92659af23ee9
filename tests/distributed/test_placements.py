"""Gradients in every placement of V, E, N, D and H on two pipeline ranks, and checkpoints of each read in another.

Tied embeddings are the hard case: their gradient is a sum over E and H, which stand in one stage, in two chunks of one
rank, or on two ranks. Each family below is walked through by one set of ranks (tests/helpers/placements.py says how);
the third with the fewest stages is part of `make test`, the rest of `make test-layouts`.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megatron_ross.checkpoint.manifest import iteration_dir
from megatron_ross.config.layout import LayoutCosts, auto_layout, parse_layout
from megatron_ross.config.schema import ParallelConfig, RunConfig, TrainabilityConfig
from megatron_ross.convert.known_models import KNOWN_LANGUAGE_MODELS, known_model
from megatron_ross.planner.auto import resolve_layout
from tests.helpers.distributed import run_ranks
from tests.helpers.placements import (
    MAX_CHUNKS,
    NUM_LAYERS,
    Walk,
    alone,
    deeper,
    placement_of,
    placements,
    share_a_rank,
    walk,
)
from tests.helpers.variants import Edit, Stored, make_variant, odd_vocabulary, tied, without_denoiser

PP = 2
STAGES = [PP * chunks for chunks in range(1, MAX_CHUNKS + 1)]
ALL = [layout for num_stages in STAGES for layout in placements(num_stages)]
LLAVA = [layout for num_stages in STAGES for layout in placements(num_stages, has_denoiser=False)]
TESTED = {placement_of(layout) for layout in ALL + LLAVA}


def one_each(layouts: list[str]) -> list[str]:
    """One for every choice of stages of V, E, N, D and H: E and N with decoder layers where that is possible."""
    return list({placement_of(layout)[:6]: layout for layout in reversed(layouts)}.values())[::-1]


@dataclass(frozen=True)
class Family:
    """Layouts that one set of ranks walks through, and what else its runs have in common."""

    layouts: list[str]
    edits: tuple[Edit, ...] = (tied,)
    world_size: int = PP
    settings: dict[str, Any] = field(default_factory=dict)
    common: dict[str, Any] = field(default_factory=dict)
    """Settings of the one-process run, too."""

    @property
    def by_cost(self) -> list[str]:
        """Few stages first; of equally many, those with E and H on one rank."""
        return sorted(self.layouts, key=lambda layout: (layout.count("|"), not share_a_rank(layout, PP)))


OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True, "ddp_bucket_size": 1}
SEQUENCE_PARALLEL = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
FAMILIES = {
    "tied": Family(ALL),
    "untied": Family(one_each(ALL), edits=()),
    "tied dp2, overlapped": Family(one_each(ALL), world_size=4, settings=OVERLAP),
    "tied tp2, sequence parallel": Family(one_each(ALL), world_size=4, settings=SEQUENCE_PARALLEL),
    "tied, frozen": Family(one_each(ALL)[:17], common={"freeze_language_model": True}),
    "tied, without denoiser": Family(one_each(LLAVA), edits=(tied, without_denoiser)),
}


@pytest.fixture(scope="module")
def check(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, slice], None]:
    """Walks through layouts of a family and compares with one process."""
    stored: dict[tuple[Edit, ...], Stored] = {}
    plans: dict[str, Walk] = {}

    def run(name: str, some: slice) -> None:
        family = FAMILIES[name]
        if family.edits not in stored:
            folder = tmp_path_factory.mktemp("model")
            stored[family.edits] = make_variant(folder, "qwen2_siglip", odd_vocabulary, deeper, *family.edits)
        model = stored[family.edits]
        common = {"micro_batch_size": 2, "lr": 1e-3} | family.common
        if name not in plans:
            layout = f"VEt*{NUM_LAYERS}N{'D' * (model.model.denoiser is not None)}H"
            root = tmp_path_factory.mktemp("alone")
            (steps,) = run_ranks(alone, 1, model.path, common | {"layout": layout}, root)
            of_all = common | {"pipeline_model_parallel_size": PP} | family.settings
            plans[name] = Walk(model.path, of_all, iteration_dir(root, 1), steps)
        folder = tmp_path_factory.mktemp("walk")
        found = run_ranks(walk, family.world_size, family.by_cost[some], plans[name], folder, timeout_s=1800)
        wrong = sorted({text for rank in found for text in rank})
        assert not wrong, "\n".join(wrong[:20])

    return run


@pytest.mark.distributed
@pytest.mark.parametrize("name", FAMILIES)
def test_the_cheapest_third(name: str, check: Callable[[str, slice], None]) -> None:
    check(name, slice(0, len(FAMILIES[name].layouts) // 3))


@pytest.mark.distributed
@pytest.mark.layouts
@pytest.mark.parametrize("name", FAMILIES)
def test_the_rest(name: str, check: Callable[[str, slice], None]) -> None:
    check(name, slice(len(FAMILIES[name].layouts) // 3, None))


@pytest.mark.parametrize("heads", ["NDH", "NHD", "NH"])
def test_placements_are_all_there_are(heads: str) -> None:
    """Against brute force: every way to cut the letters into stages."""
    letters = "VE" + "t" * NUM_LAYERS + heads
    has_denoiser = "D" in heads
    found = {placement_of(text) for num_stages in STAGES for text in cuts(letters, num_stages)}
    ours = ALL if has_denoiser else LLAVA
    assert found <= {placement_of(layout) for layout in ours}
    assert len(ours) == len({placement_of(layout) for layout in ours})
    for layout in ours:
        parse_layout(layout, num_layers=NUM_LAYERS, pipeline_model_parallel_size=PP, has_denoiser=has_denoiser)


def cuts(letters: str, num_parts: int) -> Iterator[str]:
    """All ways to write `|` between letters, num_parts - 1 times."""
    for bounds in itertools.combinations(range(1, len(letters)), num_parts - 1):
        yield "|".join(letters[a:b] for a, b in itertools.pairwise((0, *bounds, len(letters))))


def test_families_have_copies_on_one_rank_and_on_two() -> None:
    for family in FAMILIES.values():
        kinds = {(share_a_rank(layout, PP), "|" in layout) for layout in family.layouts}
        assert kinds == {(True, True), (False, True)}


COST = st.floats(0, 60)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.integers(1, MAX_CHUNKS), st.integers(0, 40), COST, COST, COST, st.booleans())
@example(2, 20, 8.0, 1.0, 12.0, True)
def test_auto_returns_a_tested_placement(
    chunks: int, extra: int, vision: float, denoiser: float, head: float, has_denoiser: bool
) -> None:
    """Whatever parts cost and however many layers there are. On more ranks, stages hold what tested ones hold."""
    contents = {frozenset(stages_of(layout)) for layout in ALL + LLAVA}
    for pp in (PP, 4, 8):
        layout = auto_layout(
            num_layers=pp * chunks + extra,
            pipeline_model_parallel_size=pp,
            virtual_pipeline_model_parallel_size=chunks,
            has_denoiser=has_denoiser,
            costs=LayoutCosts(vision, denoiser, head),
        )
        assert (placement_of(layout) in TESTED) if pp == PP else (frozenset(stages_of(layout)) in contents), layout


def stages_of(layout: str) -> list[str]:
    """Letters of the stages that hold more than decoder layers, `t` for any number of these."""
    stages = [re.sub(r"t(\*\d+)?", "t", re.sub("t+", "t", stage)) for stage in layout.split("|")]
    return [stage for stage in stages if stage != "t"]


@pytest.mark.parametrize("model", KNOWN_LANGUAGE_MODELS)
@pytest.mark.parametrize("chunks", range(1, MAX_CHUNKS + 1))
@pytest.mark.parametrize("stage", [1, 2])
def test_auto_of_known_models_is_tested(model: str, chunks: int, stage: int) -> None:
    parallel = ParallelConfig(pipeline_model_parallel_size=PP, virtual_pipeline_model_parallel_size=chunks)
    run = RunConfig(parallel=parallel, trainability=TrainabilityConfig(freeze_language_model=stage == 1))
    for reconstructs in (True, False):
        layout = resolve_layout(run, known_model(f"{model}+siglip-so400m", reconstructs=reconstructs), PP)
        assert placement_of(str(layout)) in TESTED, layout
