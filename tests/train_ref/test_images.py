from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from train_ref.errors import UsageError
from train_ref.images import open_image

RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)  # every gray once
DEEP = RAMP.astype(np.uint16) * 257  # the same of 16 bits


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def gray() -> Image.Image:
    return Image.fromarray(RAMP)


def opaque(mode: str) -> Image.Image:
    """The ramp with another alpha in every pixel but black's, which is left without."""
    bands = 1 if mode == "LA" else 3
    return Image.fromarray(np.dstack([RAMP] * bands + [RAMP[::-1]]), mode)


def palette(transparency: int | bytes | None = None) -> Image.Image:
    """The ramp, whose indices count down, with transparent entries."""
    image = Image.fromarray(255 - RAMP, "L").convert("P")
    image.putdata((255 - RAMP).ravel().tolist())
    image.putpalette([255 - i // 3 for i in range(768)])
    if transparency is not None:
        image.info["transparency"] = transparency
    return image


def tiff(
    samples: np.ndarray | bytes, bits: int | tuple[int, ...], photometric: int | None = 1, **tags
) -> bytes:
    """An uncompressed TIFF of 16 × 16 pixels; its byte order is little-endian or, with `big`, big-endian."""
    order = ">" if tags.pop("big", False) else "<"
    data = (
        samples if isinstance(samples, bytes) else samples.astype(samples.dtype.newbyteorder(order)).tobytes()
    )
    bits = (bits,) if isinstance(bits, int) else bits
    entries = {256: (16,), 257: (16,), 258: bits, 259: (1,), 277: (len(bits),), 278: (16,)}
    if photometric is not None:
        entries[262] = (photometric,)
    if "sample_format" in tags:
        entries[339] = (tags["sample_format"],) * len(bits)
    if "extra" in tags:
        entries[338] = (tags["extra"],)
    directory, more = b"", b""
    end = 8 + 2 + 12 * (len(entries) + 2) + 4  # of the directory
    entries |= {273: (0,), 279: (len(data),)}
    long = sum(2 * len(values) for values in entries.values() if len(values) > 2)
    entries[273] = (end + long,)
    for tag, values in sorted(entries.items()):
        packed = struct.pack(f"{order}{len(values)}H", *values)
        if len(packed) > 4:
            packed, more = struct.pack(f"{order}I", end + len(more)), more + packed
        directory += struct.pack(f"{order}HHI", tag, 3, len(values)) + packed.ljust(4, b"\0")
    start = (b"MM" if order == ">" else b"II") + struct.pack(f"{order}HI", 42, 8)
    return start + struct.pack(f"{order}H", len(entries)) + directory + bytes(4) + more + data


def twelve_bits() -> bytes:
    """The ramp, two values in three bytes."""
    values = (DEEP >> 4).ravel().tolist()
    pairs = zip(values[::2], values[1::2], strict=True)
    return b"".join((a << 12 | b).to_bytes(3, "big") for a, b in pairs)


def png(samples: bytes, bits: int, colour: int) -> bytes:
    """A PNG of 16 × 16 pixels from its lines, each without the byte that tells its filter."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    length = len(samples) // 16
    lines = b"".join(b"\0" + samples[i * length : (i + 1) * length] for i in range(16))
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 16, 16, bits, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")


def deep(channels: int) -> bytes:
    """The ramp of 16 bits in some channels, big-endian."""
    return np.dstack([DEEP] * channels).astype(">u2").tobytes()


def pgm(white: int, magic: bytes = b"P5", channels: int = 1) -> bytes:
    """A ramp from 0 to some white."""
    values = np.repeat((RAMP.astype(np.int64) * white / 255).round().astype(int).ravel(), channels)
    head = magic + b" 16 16 %d\n" % white
    if magic in (b"P2", b"P3"):
        return head + b" ".join(b"%d" % value for value in values)
    return head + values.astype(np.uint8 if white < 256 else ">u2").tobytes()


def jpeg2000(bits: int, mode: str = "I;16", kind: str = "jp2") -> bytes:
    """A ramp of so many bits. Pillow writes 8 and 16 of them, without loss: in the others' file the values are
    so small that the bits above them are never used, and the header says so."""
    values = np.round(RAMP * (((1 << bits) - 1) / 255))
    image = Image.fromarray(values.astype(np.uint16 if mode == "I;16" else np.uint8))
    if mode in ("RGB", "RGBA", "LA"):
        image = image.convert(mode)
    return encoded(image, "JPEG2000", no_jp2=kind == "j2k")


CASES: dict[str, Callable[[], bytes]] = {
    **{
        f"L in {kind}": lambda kind=kind: encoded(gray(), kind)
        for kind in ("PNG", "BMP", "TIFF", "GIF", "PPM")
    },
    "L in JPEG": lambda: encoded(gray(), "JPEG", quality=100),
    "L in JPEG 2000": lambda: encoded(gray(), "JPEG2000"),
    **{
        f"RGB in {kind}": lambda kind=kind: encoded(gray().convert("RGB"), kind, **{"lossless": True})
        for kind in ("PNG", "BMP", "TIFF", "WEBP", "PPM", "JPEG2000", "GIF")
    },
    "RGB in TIFF, LZW": lambda: encoded(gray().convert("RGB"), "TIFF", compression="tiff_lzw"),
    "CMYK in JPEG": lambda: encoded(gray().convert("CMYK"), "JPEG", quality=100),
    "CMYK in TIFF": lambda: encoded(gray().convert("CMYK"), "TIFF"),
    "YCbCr in TIFF": lambda: encoded(gray().convert("RGB").convert("YCbCr"), "TIFF"),
    "LA in PNG": lambda: encoded(opaque("LA"), "PNG"),
    "LA in TIFF": lambda: encoded(opaque("LA"), "TIFF"),
    "LA in WebP": lambda: encoded(opaque("LA"), "WEBP", lossless=True, exact=True),
    **{
        f"RGBA in {kind}": lambda kind=kind: encoded(
            opaque("RGBA"), kind, **{"lossless": True, "exact": True}
        )
        for kind in ("PNG", "TIFF", "WEBP", "BMP", "JPEG2000")
    },
    "RGBX in TIFF": lambda: encoded(opaque("RGBX"), "TIFF"),
    "P in PNG": lambda: encoded(palette(), "PNG"),
    "P in PNG, one entry transparent": lambda: encoded(palette(7), "PNG"),
    "P in PNG, entries half transparent": lambda: encoded(palette(bytes(range(256))), "PNG"),
    "P in GIF": lambda: encoded(palette(), "GIF"),
    "P in GIF, one entry transparent": lambda: encoded(palette(9), "GIF"),
    "P in BMP": lambda: encoded(palette(), "BMP"),
    "P in TIFF": lambda: encoded(palette(), "TIFF"),
    "I;16 in PNG": lambda: png(deep(1), 16, 0),
    "RGB of 16 bits in PNG": lambda: png(deep(3), 16, 2),
    "LA of 16 bits in PNG": lambda: png(deep(2), 16, 4),
    "RGBA of 16 bits in PNG": lambda: png(deep(4), 16, 6),
    "I;16 in TIFF": lambda: tiff(DEEP, 16),
    "I;16B in TIFF": lambda: tiff(DEEP, 16, big=True),
    "I;16 in TIFF, LZW": lambda: encoded(Image.fromarray(DEEP), "TIFF", compression="tiff_lzw"),
    "I;16 in TIFF, said to be unsigned": lambda: tiff(DEEP, 16, sample_format=1),
    "I;16 in TIFF, white is zero": lambda: tiff(65535 - DEEP, 16, 0),
    "I;16 in TIFF, LZW, white is zero": lambda: encoded(
        Image.fromarray(65535 - DEEP), "TIFF", compression="tiff_lzw", tiffinfo={262: 0}
    ),
    "12 bits in TIFF": lambda: tiff(twelve_bits(), 12),
    "L in TIFF, white is zero": lambda: tiff(255 - RAMP, 8, 0),
    "L in TIFF that does not say what is white": lambda: tiff(255 - RAMP, 8, None),
    "I;16 in TIFF that does not say what is white": lambda: tiff(65535 - DEEP, 16, None),
    "RGB of 16 bits in TIFF": lambda: tiff(np.dstack([DEEP] * 3), (16,) * 3, 2),
    "RGB of 16 bits in TIFF, big-endian": lambda: tiff(np.dstack([DEEP] * 3), (16,) * 3, 2, big=True),
    "RGBA of 16 bits in TIFF": lambda: tiff(np.dstack([DEEP] * 4), (16,) * 4, 2, extra=2),
    "I;16 in JPEG 2000": lambda: jpeg2000(16),
    "I;16 in JPEG 2000's codestream": lambda: jpeg2000(16, kind="j2k"),
    **{f"PGM to {white}": lambda white=white: pgm(white) for white in (255, 256, 1000, 4095, 65534, 65535)},
    **{f"PGM as text to {white}": lambda white=white: pgm(white, b"P2") for white in (255, 1000, 65535)},
    **{f"PPM to {white}": lambda white=white: pgm(white, b"P6", 3) for white in (255, 1000, 65535)},
    "PPM as text to 1000": lambda: pgm(1000, b"P3", 3),
}


@pytest.mark.parametrize("case", CASES)
def test_black_stays_black_and_white_is_255(tmp_path, case):
    (tmp_path / "ramp").write_bytes(CASES[case]())
    image = open_image(tmp_path / "ramp")
    assert (image.mode, image.size) == ("RGB", (16, 16))
    assert np.abs(np.asarray(image).astype(int) - RAMP[..., None]).max() <= 1
