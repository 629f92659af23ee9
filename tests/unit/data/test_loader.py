"""The loader: same samples in every layout, one length per step, exact resume, errors that arrive."""

from __future__ import annotations

import json

import pytest
import torch

from megatron_ross.data.dataset import RossDataset
from megatron_ross.data.errors import SampleError
from megatron_ross.data.loader import RossLoader
from megatron_ross.data.order import SampleOrder


@pytest.fixture
def dataset(toy, qwen, processor):
    return RossDataset(toy / "data.json", toy / "images", qwen, "qwen_2", processor, 16, 512)


@pytest.fixture
def make(dataset):
    loaders = []

    def build(**changes):
        settings = {"global_batch_size": 8, "micro_batch_size": 2} | changes
        loaders.append(RossLoader(dataset, SampleOrder(len(dataset), seed=1), **settings))
        return loaders[-1]

    yield build
    for loader in loaders:
        loader.close()


def _ids(step):
    return [batch.sample_ids for batch in step]


def test_layouts_share_one_order(make):
    (whole,) = _ids(make(micro_batch_size=8).next_step())
    assert [i for ids in _ids(make().next_step()) for i in ids] == whole
    by_rank = [_ids(make(dp_rank=r, dp_size=2).next_step()) for r in range(2)]
    assert [by_rank[0][0], by_rank[1][0], by_rank[0][1], by_rank[1][1]] == [whole[i : i + 2] for i in range(0, 8, 2)]


def test_a_rank_has_one_length_per_step_rounded_up(make):
    loader = make(seq_multiple=32)
    for _ in range(4):
        step = loader.next_step()
        lengths = {batch.tokens.shape[1] for batch in step}
        assert len(lengths) == 1
        assert lengths.pop() % 32 == 0
    tight = make().next_step()
    used = [int(((batch.tokens != 0) | batch.image_mask).sum(1).max()) for batch in tight]
    assert tight[0].tokens.shape[1] == max(used)


def test_tensor_parallel_ranks_differ_in_pixels_only(make):
    whole = make().next_step()
    parts = [make(tp_rank=r, tp_size=2).next_step() for r in range(2)]
    none = make(want_pixels=False).next_step()
    for batch, left, right, blind in zip(whole, *parts, none, strict=True):
        assert torch.equal(torch.cat([left.pixels, right.pixels]), batch.pixels)
        assert blind.pixels is None
        for other in (left, right, blind):
            assert torch.equal(other.tokens, batch.tokens)
            assert torch.equal(other.noise_keys, batch.noise_keys)


@pytest.mark.parametrize("prefetch", [0, 3])
def test_prefetch_changes_nothing(make, prefetch):
    loader, plain = make(prefetch=prefetch), make(prefetch=1)
    steps = [(_ids(loader.next_step()), _ids(plain.next_step())) for _ in range(7)]
    assert all(a == b for a, b in steps)


def test_resume_with_another_layout_continues_exactly(make):
    straight = make()
    expected = [[i for ids in _ids(straight.next_step()) for i in ids] for _ in range(6)]
    first = make()
    for _ in range(3):
        first.next_step()
    state = json.loads(json.dumps(first.state_dict()))
    assert state["consumed_samples"] == 24
    rest = []
    ranks = [make(micro_batch_size=1, dp_rank=r, dp_size=2, num_workers=1, prefetch=5) for r in range(2)]
    for loader in ranks:
        loader.load_state_dict(state)
    for _ in range(3):
        a, b = (_ids(loader.next_step()) for loader in ranks)
        rest.append([i for pair in zip(a, b, strict=True) for ids in pair for i in ids])
    assert rest == expected[3:]
    assert ranks[0].state_dict()["digest"] == straight.state_dict()["digest"]


def test_resume_after_prefetching_rewinds(make):
    loader = make(prefetch=3)
    first = _ids(loader.next_step())
    start = make().state_dict()
    loader.load_state_dict(start)
    assert _ids(loader.next_step()) == first


def test_resume_with_other_data_is_refused(make, dataset):
    loader = make()
    loader.next_step()
    other = RossLoader(dataset, SampleOrder(len(dataset), seed=2), global_batch_size=8, micro_batch_size=2)
    with pytest.raises(ValueError, match="consumed other samples"):
        other.load_state_dict(loader.state_dict())
    other.close()


def test_every_epoch_consumes_every_sample_once(make):
    loader = make(global_batch_size=23, micro_batch_size=1)
    for epoch in range(2):
        step = loader.next_step()
        assert sorted(i for ids in _ids(step) for i in ids) == list(range(23))
        assert {int(e) for batch in step for e in batch.noise_keys[:, 0]} == {epoch}


class _OneBroken:
    """A data set whose sample `broken` raises."""

    def __init__(self, dataset, broken: int):
        self._dataset, self._broken = dataset, broken
        self.image_processor = dataset.image_processor

    def __len__(self):
        return len(self._dataset)

    def __getitem__(self, index):
        if index == self._broken:
            raise SampleError("sample is broken")
        return self._dataset[index]


@pytest.mark.parametrize("prefetch", [0, 3])
def test_background_errors_arrive_in_the_right_step(dataset, prefetch):
    order = SampleOrder(len(dataset), seed=1)
    source = _OneBroken(dataset, order.sample_at(12)[1])
    loader = RossLoader(source, order, global_batch_size=8, micro_batch_size=2, prefetch=prefetch)
    loader.next_step()
    with pytest.raises(SampleError, match="sample is broken"):
        loader.next_step()
    assert loader.consumed_samples == 8
    loader.close()


@pytest.mark.parametrize(
    ("change", "message"), [({"dp_size": 3}, "multiple of"), ({"micro_batch_size": 3}, "multiple of")]
)
def test_sizes_must_divide(make, change, message):
    with pytest.raises(ValueError, match=message):
        make(**change)


def test_order_must_fit_the_data_set(dataset):
    with pytest.raises(ValueError, match="over 3 samples"):
        RossLoader(dataset, SampleOrder(3), global_batch_size=1, micro_batch_size=1)
