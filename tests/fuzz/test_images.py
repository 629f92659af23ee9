"""Image files that unfold, lie about their size, or start programs: refused by name before pixels are allocated."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from megatron_ross.data.errors import ImageError
from megatron_ross.data.images import MAX_SCANS, decode_image
from tests.helpers.hostile import at_most, attempt


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _png(width: int, height: int, *extra: bytes) -> bytes:
    """A grey PNG of one row of data, whatever size it claims."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    rows = zlib.compress(b"\0" * (min(width, 64) + 1) * min(height, 64))
    chunks = [_chunk(b"IHDR", header), *extra, _chunk(b"IDAT", rows), _chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def _zeros(size: int) -> bytes:
    return zlib.compress(b"\0" * size, 9)


def _gif(width: int, height: int) -> bytes:
    screen = b"GIF89a" + struct.pack("<HHBBB", 4, 4, 0x80, 0, 0) + b"\0" * 6
    return screen + b"," + struct.pack("<HHHHB", 0, 0, width, height, 0) + b"\x02\x02\x4c\x01\x00;"


def _bmp(width: int, height: int) -> bytes:
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 54 + 100, 0, 0, 54) + header + b"\0" * 100


def _jpeg_of_scans(number: int) -> bytes:
    """A progressive JPEG whose last scan comes again and again; Pillow decodes it, scan by scan."""
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), (200, 10, 10)).save(buffer, "JPEG", progressive=True)
    body, _, scan = buffer.getvalue().removesuffix(b"\xff\xd9").rpartition(b"\xff\xda")
    scans = body.count(b"\xff\xda")
    return body + (b"\xff\xda" + scan) * (number - scans) + b"\xff\xd9"


STARTS = [b"", b"\xff\xd8\xff", b"GIF89a", b"RIFF", b"II*\0", b"BM", b"P6 "]
BOMBS = {
    "png of 10 billion pixels": _png(100_000, 100_000),
    "png of the largest size": _png(2**31 - 1, 2**31 - 1),
    "png with a profile of 200 MB": _png(8, 8, _chunk(b"iCCP", b"x\0\0" + _zeros(200 << 20))),
    "png with a text of 200 MB": _png(8, 8, _chunk(b"zTXt", b"x\0\0" + _zeros(200 << 20))),
    "png with texts of 100 MB": _png(8, 8, *[_chunk(b"zTXt", b"x\0\0" + _zeros((1 << 20) - 1))] * 100),
    "png with a chunk longer than the file": _png(8, 8)[:33] + struct.pack(">I", 2**31 - 1) + b"tEXtx",
    "gif whose frame is larger than its screen": _gif(65535, 65535),
    "bmp of 10 billion pixels": _bmp(100_000, 100_000),
    "bmp of a negative width": _bmp(-100_000, 100_000),
    "ppm of 10 billion pixels": b"P6 100000 100000 255\n" + b"\0" * 100,
    "ppm of a number without end": b"P6 " + b"9" * 10_000 + b" 1 255\n",
    "jpeg of thousands of scans": _jpeg_of_scans(MAX_SCANS + 1),
    "webp that is only a header": b"RIFF\xff\xff\xff\x7fWEBPVP8X" + b"\xff" * 30,
    "tiff with a claim of 4 billion entries": b"II*\0\x08\0\0\0\xff\xff" + b"\xff" * 60,
}


@pytest.mark.usefixtures("little_memory")
@pytest.mark.parametrize("bomb", BOMBS)
def test_decompression_bombs(bomb: str) -> None:
    assert len(BOMBS[bomb]) < 1 << 20
    with at_most(80), pytest.raises(ImageError, match=r"image 'dir/bomb\.img' ") as caught:
        decode_image(BOMBS[bomb], "dir/bomb.img")
    assert "MemoryError" not in str(caught.value)


@pytest.mark.parametrize("kind", ["EPS", "ICO", "PCX", "TGA", "SGI", "PDF", "ICNS"])
def test_formats_that_start_programs_or_hold_files_are_not_tried(kind: str) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32)).save(buffer, kind)
    with pytest.raises(ImageError, match=r"image 'a\.jpg' cannot be decoded: none of JPEG, PNG"):
        decode_image(buffer.getvalue(), "a.jpg")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "PPM", "TIFF"])
def test_formats_of_data_sets_are_read(kind: str) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (32, 16), (200, 10, 10)).save(buffer, kind)
    assert decode_image(buffer.getvalue(), "a").size == (32, 16)


def test_a_jpeg_of_the_most_scans_is_read() -> None:
    assert decode_image(_jpeg_of_scans(MAX_SCANS), "a").size == (64, 64)


@given(data=st.binary(max_size=200), start=st.sampled_from(STARTS))
def test_any_bytes(data: bytes, start: bytes) -> None:
    image, message = attempt(ImageError, decode_image, start + data, "dir/a.jpg")
    assert "'dir/a.jpg'" in message if image is None else np.asarray(image).ndim == 3
