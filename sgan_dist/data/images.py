"""Encoded images -> uint8 arrays. JPEG by libjpeg-turbo (simplejpeg), PNG and WebP by Pillow."""

from __future__ import annotations

import io
import math

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

SUFFIXES = ("png", "jpg", "jpeg", "webp")
MAX_PIXELS = 8 * 10**7  # a larger image is taken for a decompression bomb

_GRAY_MODES = ("1", "L", "LA", "I;16")
_INKS = ("CMYK", "YCCK")  # JPEG color spaces that Pillow turns into RGB
_SCALES = (1, 2, 3, 4)  # eighths at which a JPEG is decoded, instead of whole


def decode(encoded: bytes, shape: tuple[int, int, int], resize: bool) -> NDArray[np.uint8]:
    """The pixels of a PNG, JPEG or WebP file, told apart by its first bytes, whatever its name.

    One channel is gray, three are RGB; palettes and CMYK become RGB, transparent images are laid
    on white, of 16 bits the upper 8 are taken, of an animation the first image. Rotation tags are
    not obeyed.

    Args:
        encoded: the file.
        shape: (H, W, C) wanted, C of 1 or 3.
        resize: scale the image so that it just covers (H, W), crop the middle of the longer side,
            and turn gray into RGB or RGB into gray; without, another shape is an error.

    Returns:
        uint8 (H, W, C).

    Raises:
        ValueError: it can't be decoded, whole and without doubt, for one short reason.
    """
    try:
        opened = None if _is_jpeg(encoded) else _open(encoded)
        found = _shape(encoded, opened)
        if resize:
            return _resized(encoded, opened, found, shape)
        if found != shape:
            raise ValueError(f"image of shape {found}, expected {shape}")
        return _pixels(encoded, opened, found, shape[2])
    except MemoryError:  # the machine's fault, not the image's
        raise
    except Exception as error:  # noqa: BLE001 - decoders raise all sorts of them on damaged files
        raise ValueError(_reason(error)) from None


def header(encoded: bytes) -> tuple[int, int, int]:
    """(H, W, C) of an image from its header alone: C is 1 where `decode` finds it gray, else 3.

    Raises:
        ValueError: the header can't be read, for one short reason.
    """
    try:
        return _shape(encoded, None if _is_jpeg(encoded) else _open(encoded))
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001 - decoders raise all sorts of them on damaged files
        raise ValueError(_reason(error)) from None


def _shape(encoded: bytes, opened: ImageFile | None) -> tuple[int, int, int]:
    if opened is None:
        height, width, space, _ = simplejpeg.decode_jpeg_header(encoded)
        channels = 1 if space == "Gray" else 3
    else:
        width, height = opened.size
        channels = 1 if opened.mode in _GRAY_MODES else 3
    if height * width > MAX_PIXELS:
        raise ValueError(f"{height} x {width} pixels, more than {MAX_PIXELS:,} are not decoded")
    return height, width, channels


def _resized(
    encoded: bytes,
    opened: ImageFile | None,
    found: tuple[int, int, int],
    shape: tuple[int, int, int],
) -> NDArray[np.uint8]:
    height, width, channels = shape
    # what is kept: the middle, as large as can be, of the wanted shape's height to width
    kept = min(found[0] / height, found[1] / width)
    # libjpeg halves or quarters at a fraction of the cost; twice the wanted size loses nothing
    # that is seen (45 dB and more), while 5/8 to 7/8 would cost as much as the whole
    eighths = next((n for n in _SCALES if kept * n / 8 >= 2), 8) if _by_turbo(encoded) else 8
    pixels = _pixels(encoded, opened, found, channels, eighths)
    image = Image.fromarray(pixels[..., 0] if channels == 1 else pixels)
    # a scaled image is rounded up to whole pixels, so its size must not be taken for its scale
    scale = eighths / 8
    left, top = (found[1] - width * kept) / 2 * scale, (found[0] - height * kept) / 2 * scale
    right, bottom = left + width * kept * scale, top + height * kept * scale
    box = (max(left, 0), max(top, 0), min(right, image.width), min(bottom, image.height))
    return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC, box)).reshape(shape)


def _pixels(
    encoded: bytes,
    opened: ImageFile | None,
    found: tuple[int, int, int],
    channels: int,
    eighths: int = 8,
) -> NDArray[np.uint8]:
    """The whole image, uint8 (h, w, channels); of a JPEG, `eighths` of it each way."""
    if _by_turbo(encoded):
        pixels: NDArray[np.uint8] = simplejpeg.decode_jpeg(
            encoded,
            "GRAY" if channels == 1 else "RGB",
            min_height=math.ceil(found[0] * eighths / 8),
            min_width=math.ceil(found[1] * eighths / 8),
        )
        return pixels
    with opened or _open(encoded) as image:
        whole = np.asarray(_converted(image, "L" if channels == 1 else "RGB"))
    return whole.reshape(*whole.shape[:2], channels)


def _converted(image: Image.Image, mode: str) -> Image.Image:
    if image.mode == "I;16":
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == mode else image.convert(mode)


def _is_jpeg(encoded: bytes) -> bool:
    return encoded.startswith(b"\xff\xd8\xff")


def _by_turbo(encoded: bytes) -> bool:
    return _is_jpeg(encoded) and simplejpeg.decode_jpeg_header(encoded)[2] not in _INKS


def _open(encoded: bytes) -> ImageFile:
    """The image with its header read; not by Image.open, which warns of large ones."""
    file = io.BytesIO(encoded)
    if encoded.startswith(b"\x89PNG\r\n\x1a\n"):
        return PngImageFile(file)
    if encoded.startswith(b"RIFF") and encoded[8:12] == b"WEBP":
        return WebPImageFile(file)
    if _is_jpeg(encoded):
        return JpegImageFile(file)
    raise ValueError("not a PNG, JPEG or WebP file")


def _reason(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
