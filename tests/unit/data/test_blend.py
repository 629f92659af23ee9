"""Loaders of blends: every source as often as asked for, and exact resume with another data-parallel size."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from megatron_ross.data.dataset import ConcatDataset, RossDataset
from megatron_ross.data.lengths import measure, modality_lengths
from megatron_ross.data.loader import RossLoader
from megatron_ross.data.order import BlendedOrder, GroupedOrder
from megatron_ross.data.packing import PackedOrder

EPOCHS = [2.0, 0.5]
CAPACITY = 200


@pytest.fixture
def blend(toy, qwen, processor):
    """The toy data set's first 9 records, and its other 14."""
    records = json.loads((toy / "data.json").read_text())
    for name, part in (("a", records[:9]), ("b", records[9:])):
        (toy / f"{name}.json").write_text(json.dumps(part))
    return ConcatDataset(
        [RossDataset(toy / f"{n}.json", toy / "images", qwen, "qwen_2", processor, 16, CAPACITY) for n in "ab"]
    )


@pytest.fixture(params=["shuffled", "grouped", "packed"])
def make(request, blend, tmp_path):
    loaders = []

    def build(epochs=EPOCHS, **changes):
        order = BlendedOrder([len(d) for d in blend.datasets], epochs, seed=3)
        settings = {"global_batch_size": 4, "micro_batch_size": 1, "source_ends": blend.ends} | changes
        if request.param == "grouped":
            order = GroupedOrder(
                modality_lengths(blend, cache_folder=tmp_path / "cache"), 3, batch_size=1, world_size=4, base=order
            )
        if request.param == "packed":
            order = PackedOrder(order, measure(blend, 1, False), CAPACITY)
            settings["pack_length"] = CAPACITY
        loaders.append(RossLoader(blend, order, **settings))
        return loaders[-1]

    yield build
    for loader in loaders:
        loader.close()


def _keys(step):
    """(epoch, sample id, image) of all images, and sample ids."""
    return [(batch.sample_ids, batch.noise_keys.tolist()) for batch in step]


def test_resume_with_another_data_parallel_size_continues_exactly(make):
    straight = make()
    expected = [_keys(straight.next_step()) for _ in range(9)]  # past the end of the blend's first epoch
    first = make()
    for _ in range(3):
        first.next_step()
    state = json.loads(json.dumps(first.state_dict()))
    ranks = [make(dp_rank=r, dp_size=2, num_workers=1, prefetch=5) for r in range(2)]
    for loader in ranks:
        loader.load_state_dict(state)
    for step in expected[3:]:
        parts = [_keys(loader.next_step()) for loader in ranks]
        assert [batch for pair in zip(*parts, strict=True) for batch in pair] == step
    for loader in ranks:
        assert loader.state_dict()["digest"] == straight.state_dict()["digest"]
        assert loader.consumed_by_source == straight.consumed_by_source


def test_two_epochs_hold_every_source_as_often_as_asked(make):
    loader = make()
    counts: Counter[int] = Counter()
    while loader.consumed_samples < 2 * (18 + 7):
        counts.update(i for batch in loader.next_step() for i in batch.sample_ids)
    consumed = loader.consumed_by_source
    assert sum(consumed) == loader.consumed_samples
    assert consumed == [sum(n for i, n in counts.items() if i < 9), sum(n for i, n in counts.items() if i >= 9)]
    extra = loader.consumed_samples - 50  # the last batch may reach into the third epoch
    assert sum(abs(counts[i] - (4 if i < 9 else 1)) for i in range(23)) == extra


def test_another_blend_is_refused_on_resume(make):
    loader = make()
    loader.next_step()
    other = make(epochs=[1.0, 1.0])
    with pytest.raises(ValueError, match="consumed other samples"):
        other.load_state_dict(loader.state_dict())


def test_a_blend_may_hold_one_sample(blend):
    order = BlendedOrder([9, 14], [0.0, 1 / 14], seed=0)
    loader = RossLoader(blend, order, global_batch_size=2, micro_batch_size=1, source_ends=blend.ends)
    loader.next_step()
    assert loader.consumed_by_source == [0, 2]
    loader.close()
