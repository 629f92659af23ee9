"""What a data path may look like: a local file, a URL that fsspec opens, or a brace range of tar shards."""

from __future__ import annotations

import os
import re

MAX_FILES = 100_000
_LONGEST_NUMBER = 18
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


def is_url(path: str | os.PathLike[str]) -> bool:
    """Whether fsspec should open it ("s3://...", "gs://...", "memory://...")."""
    return isinstance(path, str) and "://" in path


def expand_braces(pattern: str) -> list[str]:
    """`"a-{08..11}.tar"` -> a-08.tar ... a-11.tar; several ranges multiply; other names stay as they are.

    Raises:
        ValueError: more than MAX_FILES names.
    """
    count = 1
    for first, last in _RANGE.findall(pattern):
        is_long = max(len(first), len(last)) > _LONGEST_NUMBER
        count *= MAX_FILES + 1 if is_long else max(0, int(last) - int(first) + 1)
    if count > MAX_FILES:
        raise ValueError(f"its braces stand for more than {MAX_FILES:,} files; name fewer")
    return _expanded(pattern)


def _expanded(pattern: str) -> list[str]:
    match = _RANGE.search(pattern)
    if match is None:
        return [pattern]
    first, last = match.groups()
    width = len(first)
    numbers = (f"{n:0{width}}" for n in range(int(first), int(last) + 1))
    return [name for n in numbers for name in _expanded(pattern[: match.start()] + n + pattern[match.end() :])]
