"""What hostile files are made of: values of any shape, pickles with code, and a meter for memory."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from hypothesis import strategies as st

Result = TypeVar("Result")

ABSURD = [
    -1,
    0,
    2**31,
    2**62,
    10**18,
    -(10**18),
    10**400,
    1.5,
    1e308,
    -1e308,
    float("nan"),
    float("inf"),
    True,
    None,
    "",
    "x",
    "\0",
    [],
    {},
    [[[]]],
    {"a": {"b": []}},
]
"""Numbers nobody means, and values of the wrong kind."""

_SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=20),
    st.sampled_from(["../../etc/passwd", "<image>", "\ud800", "a\0b"]),
)


def json_values(*keys: str) -> st.SearchStrategy[Any]:
    """JSON of any shape, in which objects often have these keys."""
    names = st.one_of(st.sampled_from(keys), st.text(max_size=5)) if keys else st.text(max_size=5)
    return st.recursive(
        _SCALARS,
        lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(names, inner, max_size=5)),
        max_leaves=12,
    )


def nested_json(depth: int) -> str:
    """A list in a list in a list ..."""
    return "[" * depth + "]" * depth


class Trap:
    """Unpickling this creates a file: whoever loads it freely runs its code."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.target,))


def attempt(expected: type[Exception], action: Callable[..., Result], *args: Any) -> tuple[Result | None, str]:
    """What `action` gives, or None and the message of an `expected` error; every other error, a subclass's too, is
    raised."""
    try:
        return action(*args), ""
    except expected as error:
        if type(error) is not expected or not str(error).strip():
            raise
        return None, str(error)


@contextmanager
def at_most(megabytes: float) -> Iterator[None]:
    """Fail if Python objects in the block, numpy's arrays among them, ever took more memory at a time.

    Torch's tensors are none; the fixture `little_memory` limits them.
    """
    tracemalloc.start()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak <= megabytes * 2**20, f"{peak / 2**20:.1f} MB were allocated"
