"""`image_conversion`: what a viewer shows of every kind of picture, and that `published` stays Pillow's `convert`."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image

from megatron_ross.data import rgb
from megatron_ross.data.errors import ImageError
from megatron_ross.data.images import ImageProcessor, decode_image, inspect_image, open_decodable
from megatron_ross.data.rgb import CONVERSIONS, KINDS

HEIGHT, WIDTH = 37, 53
RAMP = np.linspace(0, 1, HEIGHT * WIDTH).reshape(HEIGHT, WIDTH)
GREY = np.rint(RAMP * 255).astype(np.uint8)
COLOURS = np.random.default_rng(1).integers(1, 255, (HEIGHT, WIDTH, 3), dtype=np.uint8)
WRITING = np.zeros((HEIGHT, WIDTH), dtype=bool)
WRITING[10:14, 8:40] = True


def file_of(image: Image.Image | np.ndarray, kind: str, **options: Any) -> bytes:
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png(bits: int, colour_type: int, rows: np.ndarray, transparency: bytes = b"", behind: bytes = b"") -> bytes:
    """A PNG file chunk by chunk; `rows` are the packed bytes [h, n], `behind` an eXIf chunk after the pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    width = {1: 8, 2: 8 * 2 // 4, 4: 2}.get(bits, 0) * rows.shape[1]
    if bits >= 8:
        width = rows.shape[1] // (bits // 8) // {0: 1, 2: 3}[colour_type]
    elif bits == 2:
        width = rows.shape[1] * 4
    header = struct.pack(">IIBBBBB", width, len(rows), bits, colour_type, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    parts = [chunk(b"IHDR", header), *([chunk(b"tRNS", transparency)] if transparency else []), chunk(b"IDAT", pixels)]
    return b"\x89PNG\r\n\x1a\n" + b"".join([*parts, *([chunk(b"eXIf", behind)] if behind else []), chunk(b"IEND", b"")])


def seen(data: bytes, conversion: str = "viewer") -> np.ndarray:
    """uint8 [h, w, 3]."""
    image = decode_image(data, "a", conversion)
    assert image.mode == "RGB"
    return np.asarray(image)


def kinds(data: bytes) -> list[str]:
    return inspect_image(data, "a", "viewer")[1]


SHORTS = np.rint(RAMP * 65535).astype(np.uint16)
DEEP: dict[str, tuple[bytes, str]] = {
    "png 16": (file_of(SHORTS, "PNG"), "image_16_bit"),
    "tiff 16 little": (file_of(SHORTS, "TIFF"), "image_16_bit"),
    "tiff 16 big": (file_of(SHORTS.astype(">u2"), "TIFF"), "image_16_bit"),
    "tiff 16 deflate": (file_of(SHORTS, "TIFF", compression="tiff_deflate"), "image_16_bit"),
    "tiff 16 white is zero": (file_of(65535 - SHORTS, "TIFF", tiffinfo={262: 0}), "image_16_bit"),
    "pgm 16": (b"P5 53 37 65535\n" + SHORTS.astype(">u2").tobytes(), "image_16_bit"),
    "pgm 12": (b"P5 53 37 4095\n" + np.rint(RAMP * 4095).astype(">u2").tobytes(), "image_16_bit"),
    "float 0-1": (file_of(RAMP.astype(np.float32), "TIFF"), "image_float"),
    "float 0-255": (file_of((RAMP * 255).astype(np.float32), "TIFF"), "image_float"),
    "float any": (file_of((RAMP * 3000 - 1024).astype(np.float32), "TIFF"), "image_float"),
    "float huge": (file_of((RAMP * 2 - 1).astype(np.float32) * np.float32(3e38), "TIFF"), "image_float"),
    "float white is zero": (file_of((1 - RAMP).astype(np.float32), "TIFF", tiffinfo={262: 0}), "image_float"),
    "int 32": (file_of(np.rint(RAMP * 2_000_000 - 1_000_000).astype(np.int32), "TIFF"), "image_float"),
    "pfm": (b"Pf\n53 37\n-1.0\n" + RAMP[::-1].astype("<f4").tobytes(), "image_float"),
}


@pytest.mark.parametrize("name", DEEP)
def test_a_ramp_is_a_ramp_whatever_its_depth(name: str) -> None:
    data, kind = DEEP[name]
    picture = seen(data)
    assert picture.shape == (HEIGHT, WIDTH, 3)
    assert np.abs(picture.astype(int) - GREY[:, :, None]).max() <= 1
    assert kinds(data) == [kind]


def test_large_pictures_are_converted_in_strips(monkeypatch: pytest.MonkeyPatch) -> None:
    """Float64 of the largest picture that is allowed would take gigabytes."""
    whole = {name: seen(data) for name, (data, _) in DEEP.items()}
    monkeypatch.setattr(rgb, "_STRIP_PIXELS", 3 * WIDTH + 1)
    for name, (data, _) in DEEP.items():
        assert np.array_equal(seen(data), whole[name])


def test_a_range_that_the_file_defines_is_not_stretched() -> None:
    """Two X-rays of one exposure stay comparable; a float picture within 0-255 is one of 0-255."""
    assert seen(file_of(SHORTS // 4, "PNG")).max() == 64
    assert seen(file_of((RAMP * 100).astype(np.float32), "TIFF")).max() == 100


def test_32_bit_tiffs_without_a_sign_do_not_wrap() -> None:
    values = np.rint(RAMP * (2**32 - 1)).astype(np.uint32)
    signed = file_of(values.view(np.int32), "TIFF")
    signs = [struct.pack("<HHIHH", 339, 3, 1, sample_format, 0) for sample_format in (2, 1)]
    assert signed.count(signs[0]) == 1
    unsigned = signed.replace(*signs)
    with Image.open(io.BytesIO(unsigned)) as image:
        assert image.tag_v2[339] == (1,)
    assert np.abs(seen(unsigned)[:, :, 0].astype(int) - GREY).max() <= 1
    assert np.abs(seen(signed)[:, :, 0].astype(int) - GREY).max() > 100


def test_numbers_that_are_none() -> None:
    values = (RAMP * 2000).astype(np.float32)
    values[0, 0], values[0, 1], values[0, 2] = np.nan, np.inf, -np.inf
    picture = seen(file_of(values, "TIFF"))[:, :, 0]
    assert picture[0, :3].tolist() == [0, 255, 0]
    assert np.abs(picture.astype(int) - GREY)[1:].max() <= 1
    for constant in (np.nan, -np.inf, 7000.0, 0.0):
        assert seen(file_of(np.full((3, 4), constant, dtype=np.float32), "TIFF")).max() == 0


def black_writing(kind: str) -> bytes:
    """Black writing; the transparent ground is black, too."""
    alpha = np.where(WRITING, 255, 0).astype(np.uint8)
    rgba = np.zeros((HEIGHT, WIDTH, 4), dtype=np.uint8)
    rgba[:, :, 3] = alpha
    if kind == "palette":
        image = Image.fromarray(WRITING.astype(np.uint8)).convert("P")
        image.putpalette([0] * 768)
        return file_of(image, "PNG", transparency=bytes([0, 255]))
    if kind == "gif":
        image = Image.fromarray(WRITING.astype(np.uint8)).convert("P")
        image.putpalette([0] * 768)
        return file_of(image, "GIF", transparency=0)
    if kind == "la":
        return file_of(Image.fromarray(rgba[:, :, [0, 3]]), "PNG")
    if kind == "premultiplied":
        return file_of(Image.fromarray(rgba), "TIFF", tiffinfo={338: 1})
    return file_of(Image.fromarray(rgba), kind, **({"lossless": True, "exact": True} if kind == "WEBP" else {}))


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF", "palette", "gif", "la", "premultiplied"])
def test_black_writing_on_nothing_is_black_on_white(kind: str) -> None:
    data = black_writing(kind)
    assert np.array_equal(seen(data), np.where(WRITING, 0, 255)[:, :, None].repeat(3, axis=2))
    assert kinds(data) == ["image_transparent"]
    assert seen(data, "published").max() == 0


@pytest.mark.parametrize(
    ("bits", "colour_type", "key"),
    [(1, 0, 0), (2, 0, 1), (4, 0, 5), (8, 0, 90), (16, 0, 40_000), (8, 2, 200), (16, 2, 51_234)],
)
def test_the_transparent_colour_of_a_png(bits: int, colour_type: int, key: int) -> None:
    """One value, in the file's bits, is transparent; the writing has another, which is kept."""
    ink = 1 if bits == 1 else key + 1 if bits < 8 else key // 2
    values = np.where(WRITING[:, :48], ink, key)
    channels = {0: 1, 2: 3}[colour_type]
    if bits < 8:
        places = np.unpackbits(values.astype(np.uint8)[:, :, None], axis=2)[:, :, -bits:].reshape(HEIGHT, -1)
        rows = np.packbits(places, axis=1)
    else:
        rows = values.astype(f">u{bits // 8}").repeat(channels, axis=1).view(np.uint8).reshape(HEIGHT, -1)
    data = png(bits, colour_type, rows, struct.pack(">H", key) * channels)
    shown = round(255 * ink / (2**bits - 1))
    picture = seen(data)
    assert picture.shape == (HEIGHT, 48, 3)
    expected = np.where(WRITING[:, :48], shown, 255)[:, :, None]
    assert np.abs(picture.astype(int) - expected).max() <= 1
    assert "image_transparent" in kinds(data)


def test_half_transparent_colours_are_mixed_with_white() -> None:
    rgba = np.dstack([COLOURS, np.full((HEIGHT, WIDTH), 64, dtype=np.uint8)])
    expected = COLOURS * (64 / 255) + 255 * (191 / 255)
    assert np.abs(seen(file_of(rgba, "PNG")) - expected).max() <= 1


def test_opaque_pictures_are_left_alone() -> None:
    opaque = np.dstack([COLOURS, np.full((HEIGHT, WIDTH), 255, dtype=np.uint8)])
    for image, kind in ((opaque, "PNG"), (COLOURS, "PNG"), (GREY, "PNG"), (COLOURS, "JPEG"), (COLOURS, "WEBP")):
        data = file_of(image, kind)
        assert kinds(data) == []
        assert np.array_equal(seen(data), seen(data, "published"))


@pytest.mark.parametrize("orientation", range(9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF", "PNG behind"])
def test_a_turned_picture_stands_upright(kind: str, orientation: int) -> None:
    """0 is no orientation; it is damaged metadata, of which there is a lot."""
    upright = np.zeros((48, 32, 3), dtype=np.uint8)
    upright[:8, :8] = 255  # the corner at the top left
    upright[24:, 16:, 2] = 200
    back = {
        2: np.fliplr,
        3: lambda a: np.rot90(a, 2),
        4: np.flipud,
        5: lambda a: a.swapaxes(0, 1),
        6: lambda a: np.rot90(a, 1),
        7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
        8: lambda a: np.rot90(a, -1),
    }
    stored = np.ascontiguousarray(back.get(orientation, lambda a: a)(upright))
    exif = Image.Exif()
    exif[274] = orientation
    if kind == "PNG behind":
        data = png(8, 2, stored.reshape(len(stored), -1), behind=exif.tobytes().removeprefix(b"Exif\0\0"))
    else:
        data = file_of(stored, kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {"quality": 98}))
    picture = seen(data)
    assert picture.shape == upright.shape
    assert np.abs(picture.astype(int) - upright).mean() < 3
    turns = orientation > 1 and kind != "TIFF"  # which Pillow turns by itself
    assert kinds(data) == (["image_rotated"] if turns else [])
    if turns:
        assert np.array_equal(seen(data, "published"), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


def test_a_damaged_exif_block_costs_nothing() -> None:
    for block in (b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x07"):
        data = file_of(COLOURS, "JPEG", exif=block)
        assert np.array_equal(seen(data), seen(data, "published"))


def test_several_ways_at_once() -> None:
    exif = Image.Exif()
    exif[274] = 6
    rgba = np.dstack([np.zeros((HEIGHT, WIDTH, 3), dtype=np.uint8), np.where(WRITING, 255, 0).astype(np.uint8)])
    data = file_of(rgba, "PNG", exif=exif)
    assert kinds(data) == ["image_transparent", "image_rotated"]
    assert np.array_equal(seen(data)[:, :, 0], np.rot90(np.where(WRITING, 0, 255), -1))


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_picture_of_several(kind: str) -> None:
    first, *rest = (Image.new("RGB", (20, 10), colour) for colour in ("red", "lime", "blue"))
    picture = seen(file_of(first, kind, save_all=True, append_images=rest, lossless=True))
    assert picture.shape == (10, 20, 3)
    assert (picture == (255, 0, 0)).all()


def test_cmyk_is_not_inverted_and_profiles_are_not_applied() -> None:
    cmyk = Image.new("CMYK", (16, 16), (0, 255, 255, 0))  # Pillow writes Adobe's marker, and so inverted values
    data = file_of(cmyk, "JPEG", quality=98)
    assert b"Adobe" in data
    assert np.abs(seen(data).astype(int) - (255, 0, 0)).max() < 8
    profiled = file_of(COLOURS, "PNG", icc_profile=b"no profile at all")
    assert np.array_equal(seen(profiled), COLOURS)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "I;16", "I", "F"])
def test_published_is_pillows_convert(mode: str) -> None:
    image = Image.fromarray(COLOURS).convert("L" if mode in ("I;16", "I", "F", "PA") else "RGB").convert(mode)
    kind = {"YCbCr": "TIFF", "CMYK": "TIFF", "I": "TIFF", "F": "TIFF", "PA": ""}.get(mode, "PNG")
    if kind:
        data = file_of(image, kind)
        expected = Image.open(io.BytesIO(data)).convert("RGB")
        assert seen(data, "published").tobytes() == expected.tobytes()
    processor = ImageProcessor((0.5,) * 3, (0.5,) * 3, 28, conversion="published")
    assert np.array_equal(processor.to_uint8(image), processor.to_uint8(image.convert("RGB")))


@pytest.mark.parametrize("name", ["png 16", "tiff 16 white is zero", "float any", "turned", "palette", "16-bit key"])
def test_a_processor_gives_the_same_from_a_file_and_from_an_opened_picture(name: str) -> None:
    """As training does from bytes, and the exported processor from what the user opened; twice changes nothing."""
    exif = Image.Exif()
    exif[274] = 6
    rows = np.full((HEIGHT, WIDTH * 3), 51_234, dtype=">u2").view(np.uint8).reshape(HEIGHT, -1)
    others = {"turned": lambda: file_of(COLOURS, "JPEG", exif=exif), "palette": lambda: black_writing("palette"),
              "16-bit key": lambda: png(16, 2, rows, struct.pack(">HHH", *[51_234] * 3))}  # fmt: skip
    data = DEEP[name][0] if name in DEEP else others[name]()
    for conversion in CONVERSIONS:
        processor = ImageProcessor((0.5,) * 3, (0.4,) * 3, 28, conversion=conversion)
        decoded = processor.decode(data, "a")
        pixels = processor.to_uint8(decoded)
        assert np.array_equal(pixels, processor.to_uint8(Image.open(io.BytesIO(data))))
        assert np.array_equal(pixels, processor.to_uint8(open_decodable(data, "a")))
    assert len({ImageProcessor((0.5,) * 3, (0.4,) * 3, 28, conversion=c).to_uint8(
        Image.open(io.BytesIO(data))).tobytes() for c in CONVERSIONS}) == 2  # fmt: skip


def test_broken_files_are_image_errors() -> None:
    data = file_of(SHORTS, "PNG")
    for conversion in CONVERSIONS:
        with pytest.raises(ImageError, match="'a' cannot be decoded"):
            decode_image(data[: len(data) // 2], "a", conversion)
    with pytest.raises(ValueError, match="image_conversion 'browser' is unknown"):
        ImageProcessor((0.5,) * 3, (0.5,) * 3, 28, conversion="browser")
    assert all(len(ways) == len(CONVERSIONS) for ways in KINDS.values())
