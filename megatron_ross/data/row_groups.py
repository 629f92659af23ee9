"""The groups of rows of parquet files that were decoded last."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Any

_KEPT_BYTES = 64 << 20


class RowGroups:
    """Columns by (file, group, name), `_KEPT_BYTES` of them or one. Thread-safe; empty after pickling.

    It pays off where samples are read in order: by prepare_data and where shards are written.
    """

    def __init__(self) -> None:
        self._kept: OrderedDict[tuple[str, int, str], Any] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: tuple[str, int, str]) -> Any:
        """A column (pyarrow.ChunkedArray), or None."""
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
            return self._kept.get(key)

    def put(self, key: tuple[str, int, str], column: Any) -> None:
        """Keep a column, and forget older ones for it."""
        with self._lock:
            self._kept[key] = column
            while len(self._kept) > 1 and sum(kept.nbytes for kept in self._kept.values()) > _KEPT_BYTES:
                self._kept.popitem(last=False)

    def __reduce__(self) -> tuple[type[RowGroups], tuple[()]]:
        return RowGroups, ()
