"""Looks at the opcodes of a pickle before it is read: some make the reader allocate whatever number they carry."""

from __future__ import annotations

import os
import pickletools
from typing import IO

_SLOTS = {"PUT", "BINPUT", "LONG_BINPUT"}


def check_pickle_sizes(file: IO[bytes]) -> None:
    """Check the pickle at the start of `file`, and go back there.

    Python's unpickler makes room for memory slot N as soon as it sees the number, and for N bytes before it reads them.
    A pickle has fewer slots and bytes than the file it is in.

    Raises:
        ValueError: a slot or a length is larger than the file, or an opcode is cut off or unknown.
    """
    size = os.fstat(file.fileno()).st_size
    for opcode, argument, position in pickletools.genops(file):
        if opcode.name in _SLOTS and int(argument or 0) > size:
            raise ValueError(f"byte {position} asks for memory slot {argument}, the file has {size} bytes")
    file.seek(0)
