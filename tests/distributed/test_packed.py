"""Packing changes nothing but speed: both losses, every gradient and the update equal those of the samples alone.

The packs hold samples without image, with several images, without supervised tokens, and some that end with an image;
one kind of batch has packs without any image. Samples of a pack never see each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_ross.config.model import IGNORE_LABEL, IMAGE_TOKEN_ID
from megatron_ross.data.batch import RossMicrobatch, RossSample
from megatron_ross.data.collate import collate_packed
from tests.helpers import golden
from tests.helpers.batches import make_batch
from tests.helpers.distributed import run_ranks
from tests.helpers.runs import Outcome, Session, one_step, open_session, worst_gradient
from tests.helpers.variants import Stored, make_variant

LOSS, GRADIENT = 1e-5, 1e-4

PACKS: dict[str, list[list[int]]] = {
    # kind of batch: places of its eight samples in four packs
    "mixed": [[0, 1], [2, 3, 4], [5], [6, 7]],  # several images in packs 1 and 3, none in pack 2
    "text_only_microbatches": [[0, 1, 2], [3], [5, 4], [6, 7]],
    "unsupervised_microbatches": [[0, 1, 2], [3, 7], [6], [4, 5]],
    "no_image": [[0, 1, 2, 3, 4], [5], [6], [7]],
}

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp1pp1": (1, {"layout": "VEt*4NDH"}),
    "tp2pp2 sp": (
        4,
        {
            "tensor_model_parallel_size": 2,
            "pipeline_model_parallel_size": 2,
            "sequence_parallel": True,
            "layout": "V|Et*4NDH",
        },
    ),
    "pp4 d|h": (4, {"pipeline_model_parallel_size": 4, "layout": "VE|t*2|t*2ND|H"}),
    "vpp2": (2, {"pipeline_model_parallel_size": 2, "layout": "VEt|t|t|tNDH"}),
    "dp2": (2, {"layout": "VEt*4NDH"}),
}


def packed_batch(session: Session, packs: Sequence[Sequence[RossSample]], length: int) -> RossMicrobatch:
    return collate_packed(
        [[(0, sample) for sample in pack] for pack in packs],
        length,
        image_size=session.model.vision.image_size,
        tp_rank=session.groups.tp.rank(),
        tp_size=session.groups.tp.size(),
        want_pixels=any(s.spec.has("V") or s.spec.has("D") for s in session.stages),
    ).to(torch.cuda.current_device())


def packed_step(rank: int, world_size: int, path: Path, kind: str, flat: dict[str, Any]) -> Outcome | None:
    """Like `one_step`, with the samples packed as in PACKS and placed as the loader places packs."""
    session = open_session(path, flat | {"global_batch_size": 4})
    try:
        samples = make_batch(kind, session.model)
        packs = [[samples[i] for i in places] for places in PACKS[kind]]
        longest = max(sum(len(s.input_ids) for s in pack) for pack in packs)
        length = -(-longest // 8) * 8 + 8  # every pack ends with padding
        mbs, dp = session.run.data.micro_batch_size, session.groups.dp
        outcome = session.step(
            [
                packed_batch(session, packs[start : start + mbs], length)
                for start in range(dp.rank() * mbs, len(packs), mbs * dp.size())
            ]
        )
    finally:
        session.close()
    return outcome if rank == 0 else None


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Stored]:
    return {name: make_variant(tmp_path_factory.mktemp(name), name) for name in golden.MODELS}


@pytest.fixture(scope="module")
def alone(stored: dict[str, Stored]) -> dict[tuple[str, str], Outcome]:
    """One process, one sample per microbatch: by model and kind, filled as needed."""
    return {}


def check(
    model: str, kind: str, layout: str, mbs: int, stored: dict[str, Stored], alone: dict[tuple[str, str], Outcome]
) -> None:
    path = stored[model].path
    if (model, kind) not in alone:
        (alone[model, kind],) = run_ranks(one_step, 1, path, kind, {"layout": "VEt*4NDH", "micro_batch_size": 1})
    expected = alone[model, kind]
    world_size, flat = LAYOUTS[layout]
    got = run_ranks(packed_step, world_size, path, kind, flat | {"micro_batch_size": mbs})[0]
    assert got.lm_loss == pytest.approx(expected.lm_loss, rel=LOSS)
    assert got.recon_loss == pytest.approx(expected.recon_loss, rel=LOSS)
    assert got.grad_norm == pytest.approx(expected.grad_norm, rel=GRADIENT)
    error, name = worst_gradient(got.gradients, expected.gradients)
    assert error < GRADIENT, name


@pytest.mark.distributed
@pytest.mark.parametrize("mbs", [1, 2])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_packed_equals_unpacked(layout: str, mbs: int, stored: Any, alone: Any) -> None:
    check("qwen2_siglip", "mixed", layout, mbs, stored, alone)


@pytest.mark.distributed
@pytest.mark.parametrize("layout", ["tp2pp2 sp", "pp4 d|h"])
@pytest.mark.parametrize("kind", [kind for kind in PACKS if kind != "mixed"])
def test_packs_without_images_or_supervised_tokens(kind: str, layout: str, stored: Any, alone: Any) -> None:
    check("qwen2_siglip", kind, layout, 2 if kind == "unsupervised_microbatches" else 1, stored, alone)


@pytest.mark.distributed
def test_packed_equals_unpacked_for_the_other_model(stored: Any, alone: Any) -> None:
    check("llama_clip", "mixed", "tp2pp2 sp", 2, stored, alone)


@dataclass(frozen=True)
class Look:
    """What a pack gives: rows of normed hidden states and logits (one process only), losses and gradients."""

    rows: Tensor
    logits: Tensor
    losses: tuple[float, float]
    gradients: dict[str, Tensor]


QUIET_PADDING = 3
"""In `looks`, the place behind the three samples: the pack's padding."""


def looks(rank: int, world_size: int, path: Path, flat: dict[str, Any], place: int) -> list[Look] | None:
    """A pack of three samples, of which `place` teaches nothing, before and after that one is replaced by noise."""
    session = open_session(path, flat | {"micro_batch_size": 1, "global_batch_size": 1})
    try:
        samples = [make_batch("mixed", session.model, truncated=False)[i] for i in (0, 2, 7)]
        if place < QUIET_PADDING:
            samples[place] = _silent(samples[place])
        length = -(-sum(len(s.input_ids) for s in samples) // 8) * 8 + 8
        found = []
        for disturbed in (False, True):
            batch = packed_batch(session, [samples], length)
            if disturbed:
                _disturb(batch, place, [len(s.input_ids) for s in samples], session.model.language.vocab_size)
            found.append(_look(session, batch))
    finally:
        session.close()
    return found if rank == 0 else None


def _silent(sample: RossSample) -> RossSample:
    spans = tuple(replace(span, reconstruct=False) for span in sample.images)
    return replace(sample, labels=torch.full_like(sample.labels, IGNORE_LABEL), images=spans)


def _disturb(batch: RossMicrobatch, place: int, lengths: list[int], vocab_size: int) -> None:
    """Other text and other pixels at one place of the pack."""
    generator = torch.Generator().manual_seed(3)
    start = sum(lengths[:place])
    stop = start + lengths[place] if place < QUIET_PADDING else batch.tokens.shape[1]
    noise = torch.randint(0, vocab_size, (stop - start,), generator=generator)
    batch.tokens[0, start:stop] = noise.masked_fill(batch.image_mask[0, start:stop], 0)
    inside = (batch.recon_start >= start) & (batch.recon_start < stop)
    if batch.pixels is not None and len(batch.pixels) == len(inside):  # one process: every image is this rank's
        batch.pixels[inside] = torch.randn(batch.pixels[inside].shape, generator=generator)


def _look(session: Session, batch: RossMicrobatch) -> Look:
    rows = logits = torch.empty(0)
    if len(session.stages) == 1 and session.layout.pipeline_model_parallel_size == 1:
        with torch.no_grad():
            rows = session.stages[0].backbone(batch)[:, 0]
            logits = session.stages[0].logits(rows)
    outcome = session.step([batch])
    return Look(rows, logits, (outcome.lm_loss, outcome.recon_loss), outcome.gradients)


@pytest.mark.distributed
@pytest.mark.parametrize("place", range(QUIET_PADDING + 1))
def test_samples_of_a_pack_do_not_see_each_other(place: int, stored: dict[str, Stored]) -> None:
    """Exactly: not one bit of the others' hidden states, logits, losses and gradients changes."""
    model = stored["qwen2_siglip"].model
    (found,) = run_ranks(looks, 1, stored["qwen2_siglip"].path, {"lr": 0.0} | LAYOUTS["tp1pp1"][1], place)
    before, after = found
    lengths = [len(make_batch("mixed", model, truncated=False)[i].input_ids) for i in (0, 2, 7)]
    start = sum(lengths[:place])
    stop = start + lengths[place] if place < QUIET_PADDING else len(before.rows)
    others = torch.ones(len(before.rows), dtype=torch.bool)
    others[start:stop] = False
    assert torch.equal(before.rows[others], after.rows[others])
    assert torch.equal(before.logits[others], after.logits[others])
    changed = (before.logits != after.logits).any(1)
    assert changed[start:stop].float().mean() > 0.9, "the disturbance does reach its own sample"
    _assert_bitwise(before, after)


@pytest.mark.distributed
@pytest.mark.parametrize("layout", ["tp2pp2 sp", "pp4 d|h"])
def test_samples_of_a_pack_do_not_see_each_other_in_a_pipeline(layout: str, stored: dict[str, Stored]) -> None:
    world_size, flat = LAYOUTS[layout]
    before, after = run_ranks(looks, world_size, stored["qwen2_siglip"].path, {"lr": 0.0} | flat, 1)[0]
    _assert_bitwise(before, after)


def _assert_bitwise(before: Look, after: Look) -> None:
    assert before.losses == after.losses
    assert before.losses[0] > 0
    assert before.losses[1] > 0
    for name, gradient in before.gradients.items():
        assert torch.equal(gradient, after.gradients[name]), name


def test_the_packs_are_what_they_are_for() -> None:
    """Every difficulty that the docstring names is really in a pack."""
    model = golden.model_config("qwen2_siglip")
    assert all(sorted(i for pack in packs for i in pack) == list(range(8)) for packs in PACKS.values())
    mixed = make_batch("mixed", model)
    images = [sum(len(mixed[i].images) for i in pack) for pack in PACKS["mixed"]]
    assert 0 in images
    assert max(images) > 2
    assert any(int(mixed[i].input_ids[-1]) == IMAGE_TOKEN_ID for pack in PACKS["mixed"] for i in pack[:-1])
    silent = make_batch("unsupervised_microbatches", model)
    assert any(
        not any(bool((silent[i].labels >= 0).any()) for i in pack) for pack in PACKS["unsupervised_microbatches"]
    )
