"""The view of a tar file that `tarfile` gets: headers, and nothing that a header merely claims.

`tarfile` believes sizes: it allocates a name of a terabyte before it reads it, and a negative size takes it back to
headers it has seen, for ever.
"""

from __future__ import annotations

import tarfile
from typing import IO

MAX_HEADER_BYTES = 1 << 20
"""Names and attributes of one member; real ones have a few hundred bytes."""


class HeaderReader:
    """A file that refuses to read more than a header at a time. `size` is that of the whole file."""

    def __init__(self, file: IO[bytes], size: int):
        self._file = file
        self._size = size
        self._last = -1

    def read(self, size: int) -> bytes:
        """Raises tarfile.ReadError: no header is so long."""
        if not 0 <= size <= MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {size} bytes at {self.tell()}")
        return self._file.read(size)

    def seek(self, position: int) -> int:
        """Raises tarfile.ReadError: outside of the file."""
        if not 0 <= position <= self._size:
            raise tarfile.ReadError(f"a member ends at byte {position}, the file has {self._size}")
        return self._file.seek(position)

    def tell(self) -> int:
        """Position in the file."""
        return self._file.tell()

    def check(self, member: tarfile.TarInfo) -> None:
        """A member lies behind the one before, and inside the file.

        Raises:
            tarfile.ReadError: it does not.
        """
        if member.size < 0 or member.offset_data <= self._last:
            raise tarfile.ReadError(f"{member.name!r:.200} has {member.size} bytes")
        if not member.issparse() and member.isreg() and member.offset_data + member.size > self._size:
            raise tarfile.ReadError(f"{member.name!r:.200} has {member.size} bytes, the file {self._size}")
        self._last = member.offset_data
