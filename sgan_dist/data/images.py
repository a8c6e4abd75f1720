"""Images to uint8 arrays of one shape: decoding, orientation, color, resizing.

One set of rules, stated in docs/data.md, serves preparation, reading and prediction. JPEG is
decoded by libjpeg-turbo (simplejpeg), the other formats by Pillow, and so are the JPEG files that
libjpeg-turbo warns of.
"""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image
from PIL.AvifImagePlugin import AvifImageFile
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

Resize = Literal["none", "shorter", "exact"]

SUFFIXES = ("png", "jpg", "jpeg", "webp", "gif", "bmp", "tif", "tiff", "avif")
DECODE_VERSION = 2  # of the rules; 1, of indexes made before 0.2.0, ignores orientation tags
MAX_PIXELS = 8 * 10**7  # a larger image is treated as a decompression bomb

_GRAY_MODES = ("1", "L", "LA", "La", "I;16", "I;16B", "I;16L", "I;16N")
_PILLOW_SPACES = ("CMYK", "YCCK")  # JPEG color spaces that Pillow, not simplejpeg, turns into RGB
_SCALES = (1, 2, 3, 4)  # eighths at which a JPEG is decoded, instead of whole
_CUT_OFF = "Premature end of JPEG file"  # the one warning of libjpeg that means damage
_ORIENTATION = 274  # the EXIF tag
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDEWAYS = [_TURNS[orientation] for orientation in (5, 6, 7, 8)]  # which swap height and width


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
def decode(
    encoded: bytes,
    image_hwc: tuple[int, int, int],
    resize: Resize,
    version: int = DECODE_VERSION,
) -> NDArray[np.uint8]:
    """Returns the pixels of an image file; its first bytes say which format it has.

    One channel is gray, three are RGB; palettes and CMYK become RGB, transparent images get a white
    background, 16 bits are cut to the upper 8, of an animation the first image is taken. The image is
    turned as its EXIF orientation says (not in version 1).

    Args:
        encoded: the file.
        image_hwc: the expected (H, W, C), C of 1 or 3.
        resize: see `fit`.
        version: of the rules.

    Returns:
        uint8 (H, W, C).

    Raises:
        ValueError: it cannot be decoded completely; one short reason.
    """
    file = _open(encoded, version)
    if resize == "none" and file.image_hwc != image_hwc:
        raise ValueError(f"image of shape {file.image_hwc}, expected {image_hwc}")
    eighths = 8
    if resize != "none" and file.pillow is None:
        # libjpeg halves or quarters at a fraction of the cost; twice the final size loses nothing
        # visible (45 dB and more), while 5/8 to 7/8 would cost as much as the whole
        scale = min(file.image_hwc[0] / image_hwc[0], file.image_hwc[1] / image_hwc[1])
        eighths = next((n for n in _SCALES if scale * n / 8 >= 2), 8)
    pixels, part = _pixels(file, image_hwc[2], eighths)
    if resize == "none":
        return pixels
    return _scaled(pixels, image_hwc, resize, file.image_hwc, part)


@_with_value_errors()
def header(encoded: bytes) -> tuple[int, int, int]:
    """Returns (H, W, C) of an image from its header alone: C is 1 if `decode` gives gray, else 3.

    Raises:
        ValueError: the header cannot be read; one short reason.
    """
    return _open(encoded, DECODE_VERSION).image_hwc


@_with_value_errors()
def check(encoded: bytes) -> tuple[int, int, int]:
    """Returns (H, W, C) of an image that can be decoded, at the least cost that shows it.

    Raises:
        ValueError: it cannot be decoded completely; one short reason.
    """
    file = _open(encoded, DECODE_VERSION)
    _pixels(file, file.image_hwc[2], 1)
    return file.image_hwc


def fit(
    pixels: NDArray[np.uint8], image_hwc: tuple[int, int, int], resize: Resize
) -> NDArray[np.uint8]:
    """Returns an image uint8 (h, w, 1 or 3) as uint8 `image_hwc`.

    `shorter` scales it so that it just covers (H, W), and crops the middle of the longer side;
    `exact` scales each side for itself; both turn gray into RGB, and RGB into gray. With `none`
    another shape is a ValueError.
    """
    if resize == "none":
        if pixels.shape != image_hwc:
            raise ValueError(f"image of shape {pixels.shape}, expected {image_hwc}")
        return pixels
    if pixels.shape[2] != image_hwc[2]:
        image = _to_pillow(pixels).convert("L" if image_hwc[2] == 1 else "RGB")
        pixels = np.asarray(image).reshape(*pixels.shape[:2], image_hwc[2])
    height, width, channels = pixels.shape
    return _scaled(pixels, image_hwc, resize, (height, width, channels), 1.0)


def describe_shape(image_hwc: Sequence[int]) -> str:
    """Returns (H, W, C) in words: `28 x 28 (gray)`."""
    height, width, channels = image_hwc
    return f"{height} x {width} ({'gray' if channels == 1 else 'color'})"


class _File(NamedTuple):
    """An image whose header was read: its shape once turned; `pillow` is None for simplejpeg."""

    encoded: bytes
    image_hwc: tuple[int, int, int]
    pillow: ImageFile | None
    turn: Image.Transpose | None


def _open(encoded: bytes, version: int) -> _File:
    pillow: ImageFile | None = None
    space = ""
    if encoded.startswith(b"\xff\xd8\xff"):
        with contextlib.suppress(ValueError):  # such as an unusual subsampling, which Pillow knows
            height, width, space, _ = simplejpeg.decode_jpeg_header(encoded)
    gray = space == "Gray"
    if not space or space in _PILLOW_SPACES:
        pillow = _open_by_pillow(encoded)
        width, height = pillow.size
        gray = pillow.mode in _GRAY_MODES
    if height * width > MAX_PIXELS * (64 if pillow is None else 1):
        raise ValueError(f"{height} x {width} pixels, more than {MAX_PIXELS:,} are not decoded")
    turn = _turn(encoded, pillow) if version > 1 else None
    if turn in _SIDEWAYS:
        height, width = width, height
    return _File(encoded, (height, width, 1 if gray else 3), pillow, turn)


def _open_by_pillow(encoded: bytes) -> ImageFile:
    """Returns the image with its header read; not by Image.open, which warns of large ones."""
    start = encoded[:12]
    if start.startswith(b"\xff\xd8\xff"):
        return JpegImageFile(io.BytesIO(encoded))
    if start.startswith(b"\x89PNG\r\n\x1a\n"):
        return PngImageFile(io.BytesIO(encoded))
    if start.startswith(b"RIFF") and start[8:] == b"WEBP":
        return WebPImageFile(io.BytesIO(encoded))
    if start.startswith((b"GIF87a", b"GIF89a")):
        return GifImageFile(io.BytesIO(encoded))
    if start.startswith(b"BM"):
        return BmpImageFile(io.BytesIO(encoded))
    if start.startswith((b"II*\0", b"MM\0*")):
        return TiffImageFile(io.BytesIO(encoded))
    if start[4:] in (b"ftypavif", b"ftypavis"):
        return AvifImageFile(io.BytesIO(encoded))
    raise ValueError("not a PNG, JPEG, WebP, GIF, BMP, TIFF or AVIF file")


def _turn(encoded: bytes, pillow: ImageFile | None) -> Image.Transpose | None:
    """Returns how the EXIF orientation says to turn the image; Pillow turns TIFF files itself."""
    if isinstance(pillow, TiffImageFile):
        return None
    if pillow is None:
        if encoded.find(b"Exif\0\0", 0, 2**16) < 0:  # a hundred times faster than to parse it
            return None
        pillow = JpegImageFile(io.BytesIO(encoded))
    return _TURNS.get(pillow.getexif().get(_ORIENTATION, 1))


def _pixels(file: _File, channels: int, eighths: int) -> tuple[NDArray[np.uint8], float]:
    """Returns the whole image, turned, uint8 (h, w, channels), and its scale.

    A JPEG is decoded at `eighths` / 8 of each side, if libjpeg-turbo has no warning.
    """
    pixels, pillow = None, file.pillow
    height, width, _ = file.image_hwc
    if pillow is None:
        if file.turn in _SIDEWAYS:
            height, width = width, height
        sides = math.ceil(height * eighths / 8), math.ceil(width * eighths / 8)
        _refuse_bomb(*sides)
        try:
            pixels = simplejpeg.decode_jpeg(
                file.encoded,
                "GRAY" if channels == 1 else "RGB",
                min_height=sides[0],
                min_width=sides[1],
            )
        except ValueError as error:
            if _CUT_OFF in str(error):
                raise
            _refuse_bomb(height, width)
            pillow, eighths = JpegImageFile(io.BytesIO(file.encoded)), 8
    if pillow is not None:
        with pillow as image:
            pixels = np.asarray(_converted(image, "L" if channels == 1 else "RGB"))
    assert pixels is not None
    pixels = pixels.reshape(*pixels.shape[:2], channels)
    if file.turn is not None:
        turned = np.asarray(_to_pillow(pixels).transpose(file.turn))
        pixels = turned.reshape(*turned.shape[:2], channels)
    return pixels, eighths / 8


def _refuse_bomb(height: int, width: int) -> None:
    if height * width > MAX_PIXELS:
        raise ValueError(f"{height} x {width} pixels, more than {MAX_PIXELS:,} are not decoded")


def _converted(image: Image.Image, mode: str) -> Image.Image:
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError("pixels of 32 bits: save the image with 8 or 16 bits")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == mode else image.convert(mode)


def _scaled(
    pixels: NDArray[np.uint8],
    image_hwc: tuple[int, int, int],
    resize: Resize,
    source_hwc: tuple[int, int, int],
    part: float,
) -> NDArray[np.uint8]:
    """Returns uint8 `image_hwc` of `pixels`, which are a source of `source_hwc` scaled by `part`."""
    height, width, _ = image_hwc
    source_height, source_width, _ = source_hwc
    image = _to_pillow(pixels)
    # libjpeg rounds a scaled image up to whole pixels, so the box follows from `part`, not from the
    # size of the image
    left, top, right, bottom = 0.0, 0.0, source_width * part, source_height * part
    if resize == "shorter":
        # the crop is height * scale by width * scale pixels in the middle of the source
        scale = min(source_height / height, source_width / width)
        left, top = (
            (source_width - width * scale) / 2 * part,
            (source_height - height * scale) / 2 * part,
        )
        right, bottom = left + width * scale * part, top + height * scale * part
    box = (max(left, 0), max(top, 0), min(right, image.width), min(bottom, image.height))
    resized = image.resize((width, height), Image.Resampling.BICUBIC, box)
    return np.asarray(resized).reshape(image_hwc)


def _to_pillow(pixels: NDArray[np.uint8]) -> Image.Image:
    return Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
