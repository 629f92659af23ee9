"""Rows of a comparison: what was expected, what came out, how far apart, and whether that is close enough."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Row:
    """One compared quantity. `expected` and `got` are a value, or a tensor's norm."""

    name: str
    expected: str
    got: str
    max_abs_error: float
    relative_error: float
    tolerance: float

    @property
    def ok(self) -> bool:
        return self.relative_error <= self.tolerance  # False for NaN

    def __str__(self) -> str:
        return (
            f"{self.name:<72} {self.expected:>14} {self.got:>14} {self.max_abs_error:>10.2e} "
            f"{self.relative_error:>10.2e} {self.tolerance:>9.1e} {'ok' if self.ok else 'FAIL'}"
        )


HEADER = f"{'quantity':<72} {'expected':>14} {'got':>14} {'max abs':>10} {'relative':>10} {'tolerance':>9}"


def compare_values(name: str, got: float, expected: float, tolerance: float, scale: float | None = None) -> Row:
    """Numbers; the relative error is |got - expected| / `scale`, by default |expected| (absolute when that is 0)."""
    error = abs(got - expected)
    scale = abs(expected) if scale is None else scale
    return Row(name, f"{expected:.7g}", f"{got:.7g}", error, error / scale if scale else error, tolerance)


def compare_tensors(name: str, got: Tensor, expected: Tensor, tolerance: float, *, by_max: bool = False) -> Row:
    """Tensors; relative error ||got - expected|| / ||expected||, or with `by_max` in the maximum norm."""
    if got.shape != expected.shape:
        return Row(name, str(list(expected.shape)), str(list(got.shape)), float("nan"), float("nan"), tolerance)
    wanted, found = expected.double(), got.double()
    difference = found - wanted
    largest = float(difference.abs().max()) if difference.numel() else 0.0
    error, size = (largest, float(wanted.abs().max())) if by_max else (float(difference.norm()), float(wanted.norm()))
    return Row(
        name, f"{float(wanted.norm()):.7g}", f"{float(found.norm()):.7g}", largest, error / (size or 1.0), tolerance
    )


def compare_exact(name: str, got: list, expected: list) -> Row:
    """Lists that must be equal element for element."""
    differing = sum(a != b for a, b in zip(got, expected, strict=False)) + abs(len(got) - len(expected))
    return Row(name, f"{len(expected)} items", f"{differing} differ", float(differing), float(differing), 0.0)
