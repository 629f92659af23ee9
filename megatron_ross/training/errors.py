"""The error that ends training on every rank alike."""

from __future__ import annotations


class TrainingError(RuntimeError):
    """Training cannot go on; raised on every rank alike."""
