"""A foreign value in a message: short, on one line, and never a reason to fail again."""

from __future__ import annotations

import reprlib
from typing import Any

_TOO_LONG = "a number with thousands of digits"


class _Short(reprlib.Repr):
    """`reprlib` looks at a few levels and items only, so that nested and huge values cost nothing."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.maxstring = self.maxlong = self.maxother = width

    def repr_int(self, x: int, level: int) -> str:
        """Python refuses to print integers of more than 4300 digits, and needs long for those below."""
        return _TOO_LONG if x.bit_length() > 4 * self.maxlong else repr(x)


def shown(value: Any, width: int = 80) -> str:
    """`repr(value)`, cut in the middle when it is longer than `width`."""
    text = _Short(width).repr(value)
    return text if len(text) <= width else text[: width - 3] + "..."
