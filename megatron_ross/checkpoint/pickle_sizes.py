"""Looks at the opcodes of a pickle before it is read: some make the reader allocate whatever number they carry."""

from __future__ import annotations

import pickletools

_SLOTS = {"PUT", "BINPUT", "LONG_BINPUT"}


def check_pickle_sizes(data: bytes) -> None:
    """Check the pickle at the start of `data`.

    Python's unpickler makes room for memory slot N as soon as it sees the number, and for N bytes before it reads them.
    A pickle has fewer slots and bytes than the file it is in.

    Raises:
        ValueError: a slot or a length is larger than the data, or an opcode is cut off or unknown.
    """
    for opcode, argument, position in pickletools.genops(data):
        if opcode.name in _SLOTS and int(argument or 0) > len(data):
            raise ValueError(f"byte {position} asks for memory slot {argument}, the file has {len(data)} bytes")
