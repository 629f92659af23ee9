"""Warns of a loss that jumps."""

from __future__ import annotations

import statistics
from collections import deque

_WINDOW, _AT_LEAST = 100, 20


class SpikeDetector:
    """Compares each step's loss with the median of the last hundred.

    Args:
        factor: a loss above `factor` medians is a spike; 0 never warns.
    """

    def __init__(self, factor: float) -> None:
        self._factor = factor
        self._last: deque[float] = deque(maxlen=_WINDOW)

    def look(self, loss: float) -> float | None:
        """The median if `loss` is a spike, else None. A spike does not count for what follows."""
        median = statistics.median(self._last) if len(self._last) >= _AT_LEAST else None
        if self._factor and median is not None and loss > self._factor * median:
            return median
        if loss == loss:  # NaN has no place in a median
            self._last.append(loss)
        return None
