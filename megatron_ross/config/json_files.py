"""Read a JSON file that a stranger may have written."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from megatron_ross.config.shown import shown

_MAX_BYTES = 64 << 20


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        ValueError: the file is missing, absurdly large, not JSON, or not an object.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            value = json.loads(file.read()) if size <= _MAX_BYTES else None
    except FileNotFoundError:
        raise ValueError(f"{path} is missing") from None
    except RecursionError:
        raise ValueError(f"{path} is not valid JSON: nested too deeply") from None
    except ValueError as error:  # also text that is not UTF-8, and numbers of thousands of digits
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if size > _MAX_BYTES:
        raise ValueError(f"{path} has {size:,} bytes, too many for a JSON file")
    if not isinstance(value, dict):
        raise ValueError(f"{path} should hold a JSON object, found {shown(value)}")
    return value
