"""What a data path may look like: a local file, a URL that fsspec opens, or a brace range of tar shards."""

from __future__ import annotations

import os
import re

_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


def is_url(path: str | os.PathLike[str]) -> bool:
    """Whether fsspec should open it ("s3://...", "gs://...", "memory://...")."""
    return isinstance(path, str) and "://" in path


def expand_braces(pattern: str) -> list[str]:
    """`"a-{08..11}.tar"` -> a-08.tar ... a-11.tar; several ranges multiply; other names stay as they are."""
    match = _RANGE.search(pattern)
    if match is None:
        return [pattern]
    first, last = match.groups()
    width = len(first)
    numbers = (f"{n:0{width}}" for n in range(int(first), int(last) + 1))
    return [name for n in numbers for name in expand_braces(pattern[: match.start()] + n + pattern[match.end() :])]
