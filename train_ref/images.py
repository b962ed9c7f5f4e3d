"""Files of images, as eight bits of red, green and blue."""

from __future__ import annotations

import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageCms, UnidentifiedImageError
from torch import Tensor

from .errors import UsageError

# Modes of eight bits a channel and fewer, which Pillow converts to RGB as they should be. Alpha is left out,
# as in torchvision.
DIRECT = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV")
PREMULTIPLIED = {"La": "LA", "RGBa": "RGBA"}  # by alpha, and how Pillow divides by it
# Pillow brings the values of these formats, in mode I, to 0 … 65535, whatever their largest is in the file.
OF_16_BITS = ("PNG", "PPM")
BITS_PER_SAMPLE, PHOTOMETRIC, SAMPLE_FORMAT = 258, 262, 339  # tags of TIFF
WHITE_IS_ZERO, UNSIGNED, UNDEFINED = 0, 1, 4  # values of the second, and of the third
RANGE_UNKNOWN = "whose range is unknown"
SIZE_MARKER = b"\xff\x4f\xff\x51"  # starts JPEG 2000's codestream: sizes and channels follow

# What torchvision decodes to the same bytes as Pillow, by the same library, in two thirds of the time.
JPEG, GRAY_OR_RGB = ("JPEG", "MPO"), ("L", "RGB")

try:
    from torchvision.io import decode_jpeg
except ImportError:  # torchvision means to leave it to another package some day
    decode_jpeg = None
warnings.filterwarnings("ignore", message="The image decoding and encoding capabilities of TorchVision")


class UnknownRange(Exception):
    """Nothing says which of an image's values are black and white, or Pillow does not keep them apart."""


def read_image(path: str | Path) -> Tensor:
    """The image of a file as `open_image` has it, (3, H, W) of bytes, side by side in the order of the file.

    Raises:
        UsageError: as `open_image` does.
    """
    with image_errors(path, "cannot be read as an image"), open(path, "rb") as file:
        return decoded(file, path)


def decoded(file: BinaryIO, path: str | Path) -> Tensor:
    """`read_image` of a file that is open, or of bytes in memory.

    Args:
        file: whose beginning is the image's.
        path: what messages call it.
    """
    image = Image.open(file)  # reads no more than the header
    if decode_jpeg is not None and image.format in JPEG and image.mode in GRAY_OR_RGB:
        file.seek(0)
        with suppress(RuntimeError):  # Pillow is asked for its opinion, and names what is wrong
            return decode_jpeg(torch.frombuffer(bytearray(file.read()), dtype=torch.uint8)).expand(3, -1, -1)
    pixels = np.array(open_image_of(image, file, path))  # (H, W, 3)
    return torch.from_numpy(pixels).permute(2, 0, 1)


def open_image(path: str | Path) -> Image.Image:
    """The image of a file, its first where there are several, as 8-bit RGB.

    More than eight bits are scaled, so that black stays black and white is 255. Pillow's own conversion cuts
    them off at 255: a photograph of 16 bits turns white.

    Raises:
        UsageError: the file is missing, damaged, or has pixels whose range nothing tells; it is named.
    """
    with image_errors(path, "cannot be read as an image"), open(path, "rb") as file:
        return open_image_of(Image.open(file), file, path)


def open_image_of(image: Image.Image, file: BinaryIO, path: str | Path) -> Image.Image:
    """`open_image` of a file whose header Pillow has read."""
    image.load()
    try:
        return eight_bit_rgb(image, file)
    except UnknownRange as unknown:
        raise UsageError(f"data.root: {path} has pixels of mode {image.mode}, {unknown}") from None


@contextmanager
def image_errors(path: str | Path, what: str) -> Iterator[None]:
    """Within this, whatever fails with an image's file is a UsageError that names it. Pillow and its codecs
    raise all kinds of exceptions: for files that end too soon, are too large, or break a rule of their
    format.

    Args:
        path: of the file.
        what: is to be said of it.
    """
    try:
        yield
    except UsageError:
        raise
    except UnidentifiedImageError as error:  # its own text names an object in memory
        raise UsageError(f"data.root: {path} {what}: Pillow knows no such format or pixels") from error
    except OSError as error:
        raise UsageError(f"data.root: {path} {what}: {error.strerror or error}") from error
    except Exception as error:
        raise UsageError(f"data.root: {path} {what}: {type(error).__name__}: {error}") from error


def eight_bit_rgb(image: Image.Image, file: BinaryIO) -> Image.Image:
    """An image that Pillow has loaded, as 8-bit RGB.

    Args:
        image: in any mode.
        file: that it was loaded from.

    Raises:
        UnknownRange: the mode's values, or these of this file, have no range that is known.
    """
    tags = image.tag_v2 if image.format == "TIFF" else {}
    for sample_format in every(tags.get(SAMPLE_FORMAT, UNSIGNED)):
        if sample_format not in (UNSIGNED, UNDEFINED):  # even of eight bits, which Pillow takes for 0 … 255
            raise UnknownRange(f"{RANGE_UNKNOWN}: its SampleFormat is {sample_format}, and 1 is wanted")
    if image.format == "JPEG2000":
        white = white_of_jpeg2000(image.mode, file)
    elif image.mode == "I":
        white = 65535 if image.format in OF_16_BITS else None
    elif image.mode.startswith("I;16"):
        bits = {"PNG": 16, "TIFF": every(tags.get(BITS_PER_SAMPLE, 16))[0]}.get(image.format)
        white = None if bits is None else (1 << bits) - 1
    else:
        white = None
    if white is not None:
        inverted = image.format == "TIFF" and tags.get(PHOTOMETRIC, WHITE_IS_ZERO) == WHITE_IS_ZERO
        return from_gray(np.asarray(image), white, inverted)
    image.info.pop("transparency", None)  # a colour or a table, which to convert takes time and can fail
    if image.mode in PREMULTIPLIED:
        image = image.convert(PREMULTIPLIED[image.mode])
    if image.mode in DIRECT:
        return image.convert("RGB")
    if image.mode == "LAB":
        lab, rgb = (ImageCms.createProfile(space) for space in ("LAB", "sRGB"))
        # As exact as eight bits are: what it optimizes by default is up to two levels off.
        return ImageCms.profileToProfile(image, lab, rgb, outputMode="RGB", flags=ImageCms.Flags.NOOPTIMIZE)
    raise UnknownRange(f"{RANGE_UNKNOWN} in {image.format}: 8-bit gray or RGB, or 16-bit PNG is wanted")


def every(values: int | tuple[int, ...]) -> tuple[int, ...]:
    """The values of a tag, of which Pillow may have made a single one."""
    return values if isinstance(values, tuple) else (values,)


def from_gray(values: np.ndarray, white: int, inverted: bool) -> Image.Image:
    """An RGB image of gray values (H, W).

    Args:
        values: 0 … white.
        white: becomes 255.
        inverted: 0 is white instead, in the file. Pillow inverts eight bits and fewer, no more.
    """
    gray = (255 * values.astype(np.int64).clip(0, white) + white // 2) // white
    gray = (255 - gray if inverted else gray).astype(np.uint8)
    return Image.fromarray(gray).convert("RGB")


def white_of_jpeg2000(mode: str, file: BinaryIO) -> int | None:
    """The value that white has in mode L or I;16, where the channel is not of eight bits; else None.

    Pillow shifts values to the left until they have the mode's eight or sixteen bits. Where it must shift to
    the right, it rounds up, and white overflows: it becomes black.

    Raises:
        UnknownRange: there are several channels, or palette's indices, of other than eight bits, or a channel
            is signed.
    """
    file.seek(0)
    _, _, sizes = file.read().partition(SIZE_MARKER)
    (channels,) = struct.unpack_from(">H", sizes, 36)
    precisions = [sizes[38 + 3 * channel] for channel in range(channels)]  # the sign, and bits less one
    (bits, *others) = (1 + (precision & 0x7F) for precision in precisions)
    if max(precisions) > 0x7F:
        raise UnknownRange(f"{RANGE_UNKNOWN}: JPEG 2000 has them signed")
    if {bits, *others} == {8}:
        return None
    width = {"L": 8, "I;16": 16}.get(mode, 0)
    if others or bits > width:
        raise UnknownRange(f"which JPEG 2000 has in {bits} bits: 8 are wanted, or up to 16 of gray")
    return ((1 << bits) - 1) << (width - bits)
