"""Typed, bounded access to the fields of a foreign JSON config.

A config decides how much memory gets allocated and which code runs, so every field is checked before use: type, range,
and for choices the known values.
"""

from __future__ import annotations

from typing import Any

from megatron_ross.config.shown import shown

_REQUIRED: Any = object()


class Fields:
    """The fields of one config; `where` names it in messages. Every getter raises ValueError on a bad value."""

    def __init__(self, values: dict[str, Any], where: str) -> None:
        self.values = values
        self.where = where

    def integer(self, name: str, low: int, high: int, default: Any = _REQUIRED) -> int:
        value = self._get(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self._error(name, value, f"an integer from {low} to {high}")
        return value

    def number(self, name: str, low: float, high: float, default: Any = _REQUIRED) -> float:
        value = self._get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise self._error(name, value, f"a number from {low:g} to {high:g}")
        return float(value)

    def boolean(self, name: str, default: Any = _REQUIRED) -> bool:
        value = self._get(name, default)
        if not isinstance(value, bool):
            raise self._error(name, value, "true or false")
        return value

    def text(self, name: str, default: Any = _REQUIRED) -> str:
        value = self._get(name, default)
        if not isinstance(value, str) or not value:
            raise self._error(name, value, "a text")
        return value

    def choice(self, name: str, choices: tuple[Any, ...], default: Any = _REQUIRED) -> Any:
        value = self._get(name, default)
        if value not in choices:
            raise self._error(name, value, "one of " + ", ".join(map(repr, choices)))
        return value

    def numbers(self, name: str, length: int, low: float, high: float) -> tuple[float, ...]:
        value = self._get(name, _REQUIRED)
        if not isinstance(value, list | tuple) or len(value) != length:
            raise self._error(name, value, f"{length} numbers")
        items = Fields({str(index): item for index, item in enumerate(value)}, f"{self.where}, {name}")
        return tuple(items.number(str(index), low, high) for index in range(length))

    def table(self, name: str) -> Fields:
        """A nested object."""
        value = self._get(name, _REQUIRED)
        if not isinstance(value, dict):
            raise self._error(name, value, "an object")
        return Fields(value, f"{self.where}, {name}")

    def has(self, name: str) -> bool:
        """True if the field is there and not null."""
        return self.values.get(name) is not None

    def _get(self, name: str, default: Any) -> Any:
        value = self.values.get(name)
        if value is None:
            value = default
        if value is _REQUIRED:
            raise ValueError(f"{self.where}: {name} is missing")
        return value

    def _error(self, name: str, value: Any, rule: str) -> ValueError:
        return ValueError(f"{self.where}: {name} is {shown(value)}, it must be {rule}")
