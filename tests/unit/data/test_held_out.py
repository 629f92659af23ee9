"""Held-out samples: which, that no order shows them, and the fixed batches of a validation."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_ross.data.held_out import (
    NO_SAMPLE,
    VALIDATION_EPOCH,
    FixedPackedOrder,
    held_out_ids,
    kept_ids,
    validation_order,
)
from megatron_ross.data.order import BlendedOrder, GroupedOrder, SampleOrder
from megatron_ross.data.packing import PackedOrder

N, SHARE = 50, 0.1
HELD = held_out_ids(N, SHARE)
KEPT = kept_ids(N, HELD)


def test_a_share_is_held_out_and_the_rest_is_kept() -> None:
    assert len(HELD) == 5
    assert np.array_equal(HELD, held_out_ids(N, SHARE))
    assert sorted([*HELD, *KEPT]) == list(range(N))
    assert len(held_out_ids(N, 0.0)) == 0
    assert len(held_out_ids(N, 1e-9)) == 1
    assert set(held_out_ids(N, 0.1)) < set(held_out_ids(N, 0.3))
    assert not np.array_equal(HELD, np.arange(5))


@pytest.mark.parametrize("num_samples", [1, 2])
def test_something_must_be_left(num_samples: int) -> None:
    with pytest.raises(ValueError, match=r"valid_split=0\.9: holds out .* nothing is left"):
        held_out_ids(num_samples, 0.9)


def test_no_order_shows_held_out_samples() -> None:
    lengths = [(-1) ** i * (5 + i % 9) for i in range(N)]
    plain = SampleOrder(N, 3, ids=KEPT)
    orders = [
        plain,
        GroupedOrder(lengths, 3, batch_size=2, world_size=2, base=SampleOrder(N, 3, shuffle=False, ids=KEPT)),
        PackedOrder(plain, np.abs(lengths), 40),
    ]
    for order in orders:
        for epoch in range(3):
            assert sorted(order.epoch_ids(epoch)) == KEPT.tolist()
    assert plain.epoch_ids(0).tolist() != plain.epoch_ids(1).tolist()


def test_a_blend_passes_what_is_kept_of_each_source() -> None:
    sizes = (N, 20)
    parts = [held_out_ids(n, SHARE) for n in sizes]
    kept = [kept_ids(n, held) for n, held in zip(sizes, parts, strict=True)]
    order = BlendedOrder(sizes, (1, 0.5), 3, ids=kept)
    first, second = order.epoch_ids(0), order.epoch_ids(1)
    assert sorted(i for i in first if i < N) == kept[0].tolist()
    assert sorted(i - N for i in [*first, *second] if i >= N) == kept[1].tolist()


def test_validation_takes_every_sample_once_in_whole_batches() -> None:
    order = validation_order(SampleOrder(N, ids=HELD), 4, None)
    sequences = order.sequences(0, order.num_sequences)
    assert (order.num_sequences, order.num_real_samples) == (8, 5)
    assert sorted(i for ((_, i),) in sequences if i != NO_SAMPLE) == HELD.tolist()
    assert [i for ((_, i),) in sequences[5:]] == [NO_SAMPLE] * 3
    assert {epoch for ((epoch, _),) in sequences} == {VALIDATION_EPOCH}
    assert order.keys(0, 8).tolist() == [list(key) for (key,) in sequences]
    assert VALIDATION_EPOCH * 256 < 2**31  # noise keys are 32-bit counters
    limited = validation_order(SampleOrder(N, ids=HELD), 4, 1)
    assert limited.sequences(0, 4) == sequences[:4]
    assert limited.num_sequences == limited.num_real_samples == 4


def test_packs_stay_packs() -> None:
    lengths = np.full(N, 10)
    order = validation_order(PackedOrder(SampleOrder(N, ids=HELD), lengths, 25), 2, None)
    assert isinstance(order, FixedPackedOrder)
    assert order.capacity == 25
    packs = order.sequences(0, order.num_sequences)
    assert [len(pack) for pack in packs] == [2, 2, 1, 1]
    assert packs[-1] == ((VALIDATION_EPOCH, NO_SAMPLE),)
