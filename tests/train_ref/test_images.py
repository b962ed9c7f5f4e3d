from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image

from train_ref.errors import UsageError
from train_ref.images import open_image, read_image

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


def premultiplied(colours: int) -> np.ndarray:
    """The ramp, multiplied by an alpha of 255 and, in the lower half, of 254."""
    alpha = np.where(RAMP < 128, 255, 254)
    colour = np.round(RAMP * (alpha / 255))
    return np.dstack([colour] * colours + [alpha]).astype(np.uint8)


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


def jpeg2000(bits: int, dtype: type = np.uint16, mode: str = "", sign: int = 0) -> bytes:
    """A codestream whose channels have so many bits, or claim to. Pillow writes 8 and 16 of them. Half of the
    range is subtracted before values are encoded, and added after: values of fewer bits are written with the
    difference of the halves."""
    full = 8 * np.dtype(dtype).itemsize
    values = np.round(RAMP * (((1 << bits) - 1) / 255)).astype(int) + (1 << full - 1) - (1 << bits - 1)
    image = Image.fromarray(values.astype(dtype))
    data = bytearray(encoded(image.convert(mode) if mode else image, "JPEG2000", no_jp2=True))
    for channel in range(data[41]):
        data[42 + 3 * channel] = sign | bits - 1
    return bytes(data)


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
    "La in TIFF": lambda: tiff(premultiplied(1), (8, 8), extra=1),
    "RGBA in TIFF, premultiplied": lambda: tiff(premultiplied(3), (8,) * 4, 2, extra=1),
    "PA in TIFF": lambda: encoded(Image.merge("LA", (gray(), gray())).convert("PA"), "TIFF"),
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
    "I;16 in JPEG 2000": lambda: encoded(Image.fromarray(DEEP), "JPEG2000"),
    **{f"{bits} bits in JPEG 2000": lambda bits=bits: jpeg2000(bits) for bits in (10, 12, 16)},
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


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "JPEG 2000"])
def test_few_bits_reach_white_too(tmp_path, bits, kind):
    white = (1 << bits) - 1
    values = np.round(RAMP / 255 * white).astype(np.uint8)
    unpacked = (values[..., None] >> np.arange(bits - 1, -1, -1)) & 1
    packed = np.packbits(unpacked.reshape(16, -1), axis=1).tobytes()
    write = {"PNG": lambda: png(packed, bits, 0), "TIFF": lambda: tiff(packed, bits)}
    (tmp_path / "ramp").write_bytes(write.get(kind, lambda: jpeg2000(bits, np.uint8))())
    image = np.asarray(open_image(tmp_path / "ramp"))
    np.testing.assert_array_equal(image[..., 0], np.round(values * (255 / white)))


def test_lab_becomes_the_colours_that_it_means(tmp_path):
    lab = np.zeros((16, 16, 3), np.uint8)  # L from 0 to 255 for 0 to 100; a and b of no colour
    lab[..., 0] = RAMP
    (tmp_path / "ramp").write_bytes(tiff(lab, (8, 8, 8), 8))
    image = np.asarray(open_image(tmp_path / "ramp")).astype(int)
    y = RAMP / 255 * 100
    y = np.where(y > 8, ((y + 16) / 116) ** 3, y / 903.3)  # CIE's lightness to luminance
    srgb = 255 * np.where(y > 0.0031308, 1.055 * y ** (1 / 2.4) - 0.055, 12.92 * y)
    assert np.abs(image - srgb[..., None]).max() <= 1.01
    lab[..., 0], lab[..., 1] = 136, 80  # sRGB's red has L = 53, a = 80, b = 67 or 70, by the white
    lab[..., 2] = 68
    (tmp_path / "red").write_bytes(tiff(lab, (8, 8, 8), 8))
    red, green, blue = np.asarray(open_image(tmp_path / "red"))[0, 0]
    assert red > 245
    assert max(green, blue) < 25


def test_more_colours_than_gray_keep_their_places(tmp_path):
    """Channels of 16 bits, of which each has another ramp."""
    ramps = np.dstack([RAMP, RAMP[::-1], RAMP.T])
    deep = ramps.astype(np.uint16) * 257
    for name, data in {
        "png": png(deep.astype(">u2").tobytes(), 16, 2),
        "tiff": tiff(deep, (16,) * 3, 2),
        "ppm": b"P6 16 16 65535\n" + deep.astype(">u2").tobytes(),
    }.items():
        (tmp_path / name).write_bytes(data)
        assert np.abs(np.asarray(open_image(tmp_path / name)).astype(int) - ramps).max() <= 1


def fits() -> bytes:
    """The ramp as astronomers keep it: values of 16 bits with a sign."""
    cards = {"SIMPLE": "T", "BITPIX": 16, "NAXIS": 2, "NAXIS1": 16, "NAXIS2": 16}
    head = "".join(f"{name:8}= {value:>20}".ljust(80) for name, value in cards.items()) + "END".ljust(80)
    return head.ljust(2880).encode() + DEEP.astype(">u2").tobytes()


SIGNED = DEEP.astype(np.int32)
REFUSED: dict[str, tuple[Callable[[], bytes], str]] = {
    "F in TIFF": (
        lambda: tiff(RAMP.astype(np.float32), 32, sample_format=3),
        "mode F, whose range is unknown",
    ),
    "F in PFM": (lambda: b"Pf 16 16 -1.0\n" + RAMP.astype("<f4").tobytes(), "mode F, whose range is unknown"),
    "signed 8 bits in TIFF": (lambda: tiff(RAMP, 8, sample_format=2), "mode L, whose range is unknown"),
    "signed 16 bits in TIFF": (lambda: tiff(DEEP, 16, sample_format=2), "mode I, whose range is unknown"),
    "signed 32 bits in TIFF": (lambda: tiff(SIGNED, 32, sample_format=2), "mode I, whose range is unknown"),
    "32 bits in TIFF": (lambda: tiff(SIGNED, 32), "mode I, whose range is unknown in TIFF"),
    "I;16 in FITS": (fits, "mode I;16, whose range is unknown in FITS"),
    "RGB of 12 bits in JPEG 2000": (
        lambda: jpeg2000(12, np.uint8, "RGB"),
        "mode RGB, which JPEG 2000 has in 12",
    ),
    "RGBA of 16 bits in JPEG 2000": (
        lambda: jpeg2000(16, np.uint8, "RGBA"),
        "mode RGBA, which JPEG 2000 has",
    ),
    "LA of 4 bits in JPEG 2000": (
        lambda: jpeg2000(4, np.uint8, "LA"),
        "mode LA, which JPEG 2000 has in 4 bits",
    ),
    "signed in JPEG 2000": (lambda: jpeg2000(16, sign=0x80), "mode I;16, whose range is unknown: JPEG 2000"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_pixels_whose_range_is_unknown_are_refused_by_name(tmp_path, case):
    write, message = REFUSED[case]
    path = tmp_path / "image.png"
    path.write_bytes(write())
    with pytest.raises(UsageError) as raised:
        open_image(path)
    assert f"data.root: {path} has pixels of {message}" in str(raised.value)


def bomb() -> bytes:
    """A PNG's head that promises a hundred thousand pixels to each side."""
    head = png(RAMP.tobytes(), 8, 0)
    size = struct.pack(">IIBBBBB", 10**5, 10**5, 8, 0, 0, 0, 0)
    return head[:16] + size + struct.pack(">I", zlib.crc32(b"IHDR" + size)) + head[33:]


def text_png() -> bytes:
    """A PNG with more text than Pillow takes."""
    text = b"comment\0\0" + zlib.compress(bytes(2 * 2**20))
    chunk = struct.pack(">I", len(text)) + b"zTXt" + text + struct.pack(">I", zlib.crc32(b"zTXt" + text))
    whole = png(RAMP.tobytes(), 8, 0)
    return whole[:33] + chunk + whole[33:]


DAMAGED: dict[str, tuple[Callable[[], bytes] | None, str]] = {
    "missing": (None, "No such file or directory"),
    "empty": (lambda: b"", "Pillow knows no such format"),
    "no image": (lambda: b"It is a text.", "Pillow knows no such format"),
    "half a PNG": (lambda: png(np.random.default_rng(0).bytes(256), 8, 0)[:150], "truncated"),
    "half a JPEG": (lambda: encoded(gray(), "JPEG", quality=100)[:-100], "runcated"),
    "half a PGM": (lambda: pgm(1000)[:100], "ValueError: not enough image data"),
    "half a TIFF": (lambda: tiff(DEEP, 16)[:300], "truncated"),
    "half of JPEG 2000": (lambda: jpeg2000(16)[:60], ""),
    "a PNG with much text": (text_png, "ValueError: Decompressed data too large"),
    "a bomb": (bomb, "DecompressionBombError: Image size (10000000000 pixels) exceeds limit"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_whatever_fails_is_told_of_the_file(tmp_path, case):
    write, message = DAMAGED[case]
    path = tmp_path / "image.png"
    if write:
        path.write_bytes(write())
    with pytest.raises(UsageError) as raised:
        open_image(path)
    assert str(raised.value).startswith(f"data.root: {path} cannot be read as an image: ")
    assert message in str(raised.value)
    assert " at 0x" not in str(raised.value)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize(
    "options",
    [{}, {"progressive": True}, {"subsampling": 0}, {"subsampling": 1}, {"keep_rgb": True}],
    ids=str,
)
def test_a_jpeg_has_the_same_bytes_by_either_decoder(tmp_path, mode, options):
    pixels = np.random.default_rng(0).integers(0, 256, (37, 51, 3), dtype=np.uint8)
    (tmp_path / "image").write_bytes(encoded(Image.fromarray(pixels).convert(mode), "JPEG", **options))
    image = read_image(tmp_path / "image")
    assert image.dtype == torch.uint8
    assert np.array_equal(image.permute(1, 2, 0), np.asarray(open_image(tmp_path / "image")))


@pytest.mark.parametrize("kept", [0.1, 0.5, 0.9])
def test_a_jpeg_that_ends_too_soon_is_named_as_pillow_has_it(tmp_path, kept):
    data = encoded(Image.fromarray(np.zeros((64, 64, 3), dtype=np.uint8)), "JPEG")
    (tmp_path / "image").write_bytes(data[: int(kept * len(data))])
    messages = []
    for read in (read_image, open_image):
        with pytest.raises(UsageError, match="cannot be read as an image") as raised:
            read(tmp_path / "image")
        messages.append(str(raised.value))
    assert messages[0] == messages[1]


def test_what_is_no_jpeg_is_read_by_pillow(tmp_path):
    (tmp_path / "ramp").write_bytes(encoded(gray(), "PNG"))
    assert np.array_equal(read_image(tmp_path / "ramp").permute(1, 2, 0), np.dstack([RAMP] * 3))
