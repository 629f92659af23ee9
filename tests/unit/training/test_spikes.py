"""Warnings of a loss that jumps."""

from __future__ import annotations

import math

from megatron_ross.training.spikes import SpikeDetector


def _calm(factor: float, num_values: int) -> SpikeDetector:
    """A detector that has seen the losses 1, 2, 3, 1, 2, 3, ...; their median is 2."""
    detector = SpikeDetector(factor)
    assert [detector.look(1.0 + i % 3) for i in range(num_values)] == [None] * num_values
    return detector


def test_a_loss_above_factor_medians_is_a_spike() -> None:
    detector = _calm(3.0, 20)
    assert detector.look(6.0) is None
    assert detector.look(6.1) == 2.0


def test_nothing_is_said_before_twenty_losses() -> None:
    assert _calm(3.0, 19).look(1000.0) is None


def test_spikes_do_not_count_for_what_follows() -> None:
    """A hundred of them would otherwise be the window."""
    detector = _calm(3.0, 21)
    assert [detector.look(100.0) for _ in range(100)] == [2.0] * 100


def test_nan_is_no_spike_and_does_not_count() -> None:
    detector = _calm(3.0, 21)
    assert [detector.look(math.nan) for _ in range(100)] == [None] * 100
    assert detector.look(100.0) == 2.0


def test_a_new_level_becomes_the_median() -> None:
    detector = _calm(3.0, 21)
    for _ in range(60):
        detector.look(5.0)
    assert detector.look(14.0) is None
    assert detector.look(16.0) == 5.0


def test_factor_0_never_warns() -> None:
    assert _calm(0.0, 30).look(1e9) is None
