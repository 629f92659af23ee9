"""Means, deviations and paired intervals against values worked out by hand."""

from __future__ import annotations

import math

import pytest

from megatron_ross.evaluation.ablation.statistics import paired_difference, summarise


def test_summary_of_three_values() -> None:
    summary = summarise([1.0, 2.0, 6.0])
    assert summary.mean == pytest.approx(3.0)
    assert summary.std == pytest.approx(math.sqrt((4 + 1 + 9) / 2))
    assert summary.count == 3


def test_one_value_has_no_deviation() -> None:
    assert summarise([4.0]).mean == 4.0
    assert math.isnan(summarise([4.0]).std)


def test_paired_interval_uses_the_differences_and_students_quantile() -> None:
    """Differences 1, 2, 3: mean 2, deviation 1, t(0.975; 2) = 4.302653, so 2 +- 4.302653 / sqrt(3)."""
    result = paired_difference([11.0, 22.0, 33.0], [10.0, 20.0, 30.0])
    assert result.differences == pytest.approx((1, 2, 3))
    assert result.mean == pytest.approx(2)
    assert (result.low, result.high) == pytest.approx((2 - 2.484138, 2 + 2.484138), abs=1e-5)
    assert not result.is_shown


def test_a_steady_difference_is_shown_in_either_direction() -> None:
    """Differences 2.0, 2.1, 1.9: deviation 0.1, reach 0.2484."""
    seeds = [50.0, 60.0, 70.0]
    higher = paired_difference([52.0, 62.1, 71.9], seeds)
    assert higher.is_shown
    assert higher.low == pytest.approx(2 - 0.2484138, abs=1e-5)
    assert paired_difference(seeds, [52.0, 62.1, 71.9]).is_shown


def test_one_seed_shows_nothing() -> None:
    result = paired_difference([60.0], [50.0])
    assert result.mean == 10
    assert math.isnan(result.low)
    assert not result.is_shown


@pytest.mark.parametrize("values", [([], []), ([1.0], [1.0, 2.0])])
def test_unpaired_values_are_refused(values: tuple[list[float], list[float]]) -> None:
    with pytest.raises(ValueError, match="both need the same"):
        paired_difference(*values)
