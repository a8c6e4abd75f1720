"""Encoded images -> uint8 arrays. JPEG by libjpeg-turbo (simplejpeg), PNG and WebP by Pillow."""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

SUFFIXES = ("png", "jpg", "jpeg", "webp")
MAX_PIXELS = 8 * 10**7  # a larger image is treated as a decompression bomb

_GRAY_MODES = ("1", "L", "LA", "I;16")
_PILLOW_SPACES = ("CMYK", "YCCK")  # JPEG color spaces that Pillow, not simplejpeg, turns into RGB
_SCALES = (1, 2, 3, 4)  # eighths at which a JPEG is decoded, instead of whole


@contextlib.contextmanager
def _with_value_errors() -> Iterator[None]:
    """Turns what decoders raise on damaged files, which is of many types, into a ValueError."""
    try:
        yield
    except MemoryError:  # the machine's fault, not the image's
        raise
    except Exception as error:  # noqa: BLE001
        text = str(error).strip()
        raise ValueError(text.splitlines()[0] if text else type(error).__name__) from None


@_with_value_errors()
def decode(encoded: bytes, image_hwc: tuple[int, int, int], resize: bool) -> NDArray[np.uint8]:
    """Returns the pixels of a PNG, JPEG or WebP file; its first bytes say which of them it is.

    One channel is gray, three are RGB; palettes and CMYK become RGB, transparent images get a white
    background, 16 bits are cut to the upper 8, an animation to its first image. Rotation tags are
    ignored.

    Args:
        encoded: the file.
        image_hwc: the expected (H, W, C), C of 1 or 3.
        resize: scale the image so that it just covers (H, W), crop the middle of the longer side,
            and turn gray into RGB or RGB into gray; without, another shape is an error.

    Returns:
        uint8 (H, W, C).

    Raises:
        ValueError: it cannot be decoded completely; one short reason.
    """
    file = _open(encoded)
    if resize:
        return _resized(file, image_hwc)
    if file.image_hwc != image_hwc:
        raise ValueError(f"image of shape {file.image_hwc}, expected {image_hwc}")
    return _pixels(file, image_hwc[2])


@_with_value_errors()
def header(encoded: bytes) -> tuple[int, int, int]:
    """Returns (H, W, C) of an image from its header alone: C is 1 if `decode` gives gray, else 3.

    Raises:
        ValueError: the header cannot be read; one short reason.
    """
    return _open(encoded).image_hwc


class _File(NamedTuple):
    """An image whose header was read; `pillow` is None if simplejpeg decodes it."""

    encoded: bytes
    image_hwc: tuple[int, int, int]
    pillow: ImageFile | None


def _open(encoded: bytes) -> _File:
    pillow: ImageFile | None = None
    if encoded.startswith(b"\xff\xd8\xff"):
        height, width, space, _ = simplejpeg.decode_jpeg_header(encoded)
        gray = space == "Gray"
        if space in _PILLOW_SPACES:
            pillow = JpegImageFile(io.BytesIO(encoded))
    else:
        pillow = _open_by_pillow(encoded)
        width, height = pillow.size
        gray = pillow.mode in _GRAY_MODES
    if height * width > MAX_PIXELS:
        raise ValueError(f"{height} x {width} pixels, more than {MAX_PIXELS:,} are not decoded")
    return _File(encoded, (height, width, 1 if gray else 3), pillow)


def _open_by_pillow(encoded: bytes) -> ImageFile:
    """Returns the image with its header read; not by Image.open, which warns of large ones."""
    if encoded.startswith(b"\x89PNG\r\n\x1a\n"):
        return PngImageFile(io.BytesIO(encoded))
    if encoded.startswith(b"RIFF") and encoded[8:12] == b"WEBP":
        return WebPImageFile(io.BytesIO(encoded))
    raise ValueError("not a PNG, JPEG or WebP file")


def _resized(file: _File, image_hwc: tuple[int, int, int]) -> NDArray[np.uint8]:
    height, width, channels = image_hwc
    source_height, source_width, _ = file.image_hwc
    # the crop is height * scale by width * scale pixels in the middle of the source
    scale = min(source_height / height, source_width / width)
    # libjpeg halves or quarters at a fraction of the cost; twice the final size loses nothing
    # visible (45 dB and more), while 5/8 to 7/8 would cost as much as the whole
    eighths = 8
    if file.pillow is None:
        eighths = next((n for n in _SCALES if scale * n / 8 >= 2), 8)
    pixels = _pixels(file, channels, eighths)
    image = Image.fromarray(pixels[..., 0] if channels == 1 else pixels)
    # libjpeg rounds a scaled image up to whole pixels, so the box follows from `eighths`, not from
    # the size of the image
    part = eighths / 8
    left, top = (
        (source_width - width * scale) / 2 * part,
        (source_height - height * scale) / 2 * part,
    )
    right, bottom = left + width * scale * part, top + height * scale * part
    box = (max(left, 0), max(top, 0), min(right, image.width), min(bottom, image.height))
    resized = image.resize((width, height), Image.Resampling.BICUBIC, box)
    return np.asarray(resized).reshape(image_hwc)


def _pixels(file: _File, channels: int, eighths: int = 8) -> NDArray[np.uint8]:
    """Returns the whole image, uint8 (h, w, channels); of a JPEG, `eighths` / 8 of each side."""
    if file.pillow is None:
        height, width, _ = file.image_hwc
        pixels: NDArray[np.uint8] = simplejpeg.decode_jpeg(
            file.encoded,
            "GRAY" if channels == 1 else "RGB",
            min_height=math.ceil(height * eighths / 8),
            min_width=math.ceil(width * eighths / 8),
        )
        return pixels
    with file.pillow as image:
        whole = np.asarray(_converted(image, "L" if channels == 1 else "RGB"))
    return whole.reshape(*whole.shape[:2], channels)


def _converted(image: Image.Image, mode: str) -> Image.Image:
    if image.mode == "I;16":
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == mode else image.convert(mode)
