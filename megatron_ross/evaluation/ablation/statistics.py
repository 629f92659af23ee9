"""Means over seeds, and paired differences: arm minus baseline with the same seed, so what seeds do to both cancels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from scipy.stats import t as student_t

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Summary:
    """Mean and sample standard deviation (NaN for one value)."""

    mean: float
    std: float
    count: int


@dataclass(frozen=True)
class PairedDifference:
    """Differences by seed, their mean, and Student's `CONFIDENCE` interval of it (NaN for one seed)."""

    differences: tuple[float, ...]
    mean: float
    low: float
    high: float

    @property
    def is_shown(self) -> bool:
        """The interval leaves out zero. Never for one seed."""
        return self.low > 0 or self.high < 0


def summarise(values: Sequence[float]) -> Summary:
    """Mean and sample standard deviation of at least one value."""
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return Summary(mean, math.nan, 1)
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return Summary(mean, math.sqrt(variance), len(values))


def paired_difference(arm: Sequence[float], baseline: Sequence[float]) -> PairedDifference:
    """`arm` minus `baseline`, seed by seed.

    Raises:
        ValueError: they have different numbers of seeds, or none.
    """
    if len(arm) != len(baseline) or not arm:
        raise ValueError(f"paired values of {len(arm)} and {len(baseline)} seeds; both need the same, at least one")
    differences = tuple(a - b for a, b in zip(arm, baseline, strict=True))
    summary = summarise(differences)
    if len(differences) == 1:
        return PairedDifference(differences, summary.mean, math.nan, math.nan)
    quantile = float(student_t.ppf((1 + CONFIDENCE) / 2, len(differences) - 1))
    reach = quantile * summary.std / math.sqrt(len(differences))
    return PairedDifference(differences, summary.mean, summary.mean - reach, summary.mean + reach)
