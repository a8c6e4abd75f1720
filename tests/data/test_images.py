"""Decoding: the same pixels as Pillow, every odd kind of image, and damage that is never missed."""

from __future__ import annotations

import functools
import io
import struct
import zlib
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from sgan_dist.data.images import decode, header


@functools.cache
def photo() -> Image.Image:
    spec = find_spec("sklearn")
    assert spec is not None and spec.origin is not None
    folder = Path(spec.origin).parent
    return Image.open(folder / "datasets" / "images" / "china.jpg").convert("RGB")


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def patch(mode: str = "RGB", side: int = 64) -> Image.Image:
    """A square of the photo."""
    return photo().crop((200, 100, 200 + side, 100 + side)).convert(mode)


def pixels(image: Image.Image) -> NDArray[np.uint8]:
    """uint8 (H, W, C)."""
    array = np.asarray(image)
    return array[..., np.newaxis] if array.ndim == 2 else array


def hwc(array: NDArray[np.uint8]) -> tuple[int, int, int]:
    height, width, channels = array.shape
    return height, width, channels


def with_png_size(data: bytes, width: int, height: int) -> bytes:
    """A PNG that states another size; its checksum is right."""
    head = b"IHDR" + struct.pack(">II", width, height) + data[24:29]
    return data[:12] + head + struct.pack(">I", zlib.crc32(head)) + data[33:]


def with_jpeg_size(data: bytes, width: int, height: int) -> bytes:
    """A JPEG that states another size."""
    place = data.index(b"\xff\xc0") + 5
    return data[:place] + struct.pack(">HH", height, width) + data[place + 4 :]


FILES = {
    "jpeg": encoded(patch(), "JPEG", quality=90),
    "gray jpeg": encoded(patch("L"), "JPEG", quality=90),
    "progressive jpeg": encoded(patch(), "JPEG", progressive=True),
    "cmyk jpeg": encoded(patch("CMYK"), "JPEG"),
    "png": encoded(patch(), "PNG"),
    "gray png": encoded(patch("L"), "PNG"),
    "palette png": encoded(patch().quantize(256), "PNG"),
    "rgba png": encoded(patch("RGBA"), "PNG"),
    "webp": encoded(patch(), "WEBP"),
    "lossless webp": encoded(patch("RGBA"), "WEBP", lossless=True),
}


@pytest.mark.parametrize(
    "name", ["jpeg", "gray jpeg", "progressive jpeg", "png", "gray png", "webp"]
)
def test_pixels_are_those_that_pillow_decodes(name: str) -> None:
    expected = pixels(Image.open(io.BytesIO(FILES[name])))
    decoded = decode(FILES[name], hwc(expected), False)
    assert decoded.dtype == np.uint8
    np.testing.assert_array_equal(decoded, expected)


def test_no_decoder_rotates_by_tags() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    image = photo().crop((0, 0, 48, 32))
    data = encoded(image, "JPEG", exif=exif)
    np.testing.assert_array_equal(decode(data, (32, 48, 3), False), Image.open(io.BytesIO(data)))
    data = encoded(image, "PNG", exif=exif)
    np.testing.assert_array_equal(decode(data, (32, 48, 3), False), image)


@pytest.mark.parametrize("mode", ["1", "L", "LA"])
def test_gray_kinds_become_one_channel(mode: str) -> None:
    image = patch("L").convert(mode)
    data = encoded(image, "PNG")
    assert header(data) == (64, 64, 1)
    np.testing.assert_array_equal(decode(data, (64, 64, 1), False)[..., 0], image.convert("L"))


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_transparent_images_get_a_white_background(kind: str) -> None:
    image = Image.new("RGBA", (4, 2), (10, 20, 30, 255))
    image.putpixel((1, 0), (10, 20, 30, 0))
    decoded = decode(encoded(image, kind, lossless=True), (2, 4, 3), False)
    assert decoded[0, 0].tolist() == [10, 20, 30]
    assert decoded[0, 1].tolist() == [255, 255, 255]


def test_transparent_palette_and_gray() -> None:
    image = Image.new("P", (4, 2), 1)
    image.putpalette([0, 0, 0, 200, 100, 50])
    image.putpixel((0, 0), 0)
    decoded = decode(encoded(image, "PNG", transparency=0), (2, 4, 3), False)
    assert decoded[0, 0].tolist() == [255, 255, 255]
    assert decoded[1, 1].tolist() == [200, 100, 50]
    gray = Image.new("LA", (4, 2), (100, 255))
    gray.putpixel((0, 0), (100, 0))
    decoded = decode(encoded(gray, "PNG"), (2, 4, 1), False)
    assert decoded[0, :2, 0].tolist() == [255, 100]


def test_of_16_bits_the_upper_8_are_taken() -> None:
    wide = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000
    data = encoded(Image.fromarray(wide), "PNG")
    np.testing.assert_array_equal(decode(data, (8, 8, 1), False)[..., 0], wide >> 8)


def test_cmyk_becomes_rgb() -> None:
    decoded = decode(FILES["cmyk jpeg"], (64, 64, 3), False)
    expected = Image.open(io.BytesIO(FILES["cmyk jpeg"])).convert("RGB")
    np.testing.assert_array_equal(decoded, expected)
    assert abs(decoded.astype(int) - np.asarray(patch())).mean() < 10  # not inverted


@pytest.mark.parametrize("name", FILES)
def test_another_shape_is_damage_without_resize(name: str) -> None:
    height, width, channels = header(FILES[name])
    assert decode(FILES[name], (height, width, channels), False).shape == (64, 64, channels)
    for shape in ((64, 63, channels), (63, 64, channels), (64, 64, 4 - channels)):
        with pytest.raises(ValueError, match="expected"):
            decode(FILES[name], shape, False)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("channels", [1, 3])
def test_resize_turns_gray_into_rgb_and_back(name: str, channels: int) -> None:
    decoded = decode(FILES[name], (64, 64, channels), True)
    assert decoded.shape == (64, 64, channels)
    expected = pixels(patch("L" if channels == 1 or "gray" in name else "RGB"))
    assert abs(decoded.astype(int) - expected).mean() < 12


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("size", [(60, 20), (600, 200)], ids=str)
def test_resize_keeps_the_middle_of_the_longer_side(kind: str, size: tuple[int, int]) -> None:
    width, height = size
    bands = np.zeros((height, width, 3), np.uint8)
    for number in range(3):
        bands[:, number * width // 3 : (number + 1) * width // 3, number] = 200
    inside = decode(encoded(Image.fromarray(bands), kind), (20, 20, 3), True)[4:16, 4:16]
    assert abs(inside.astype(int) - [0, 200, 0]).max() < 12
    upright = Image.fromarray(bands.swapaxes(0, 1).copy())
    inside = decode(encoded(upright, kind), (20, 20, 3), True)[4:16, 4:16]
    assert abs(inside.astype(int) - [0, 200, 0]).max() < 12


@pytest.mark.parametrize(
    "target", [(32, 32), (48, 48), (64, 40), (100, 100), (224, 224), (500, 700)], ids=str
)
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_scaled_jpegs_look_like_wholly_decoded_ones(target: tuple[int, int], mode: str) -> None:
    """libjpeg's scales must not shift the image: half a pixel would cost 10 dB."""
    image = photo().resize((641, 427)).convert(mode)
    data = encoded(image, "JPEG", quality=95)
    whole = Image.open(io.BytesIO(data)).convert("L" if mode == "L" else "RGB")
    height, width = target
    scale = min(whole.width / width, whole.height / height)
    left, top = (whole.width - width * scale) / 2, (whole.height - height * scale) / 2
    box = (left, top, left + width * scale, top + height * scale)
    expected = pixels(whole.resize((width, height), Image.Resampling.BICUBIC, box))
    decoded = decode(data, hwc(expected), True)
    error = ((decoded.astype(float) - expected) ** 2).mean()
    assert error < 255**2 / 10**4.2


@pytest.mark.parametrize("name", [name for name in FILES if "jpeg" in name])
@pytest.mark.parametrize("resize", [False, True], ids=["whole", "resized"])
def test_a_jpeg_that_is_cut_short_is_refused(name: str, resize: bool) -> None:
    data = FILES[name]
    shape = header(data)
    for length in range(0, len(data) - 2, 7):
        with pytest.raises(ValueError):
            decode(data[:length], shape, resize)


@pytest.mark.parametrize("name", ["jpeg", "gray jpeg", "progressive jpeg"])
def test_a_jpeg_whose_end_became_zeros_is_refused(name: str) -> None:
    """Such as an interrupted download into a preallocated file: Pillow accepts it."""
    data = FILES[name]
    for length in range(len(data) // 4, len(data) - 2, 41):
        with pytest.raises(ValueError):
            decode(data[:length] + bytes(len(data) - length), header(data), False)


@pytest.mark.parametrize("name", ["png", "gray png", "webp"])
def test_png_and_webp_that_are_cut_short_are_refused(name: str) -> None:
    data = FILES[name]
    for length in range(0, len(data) - 30, 29):
        with pytest.raises(ValueError):
            decode(data[:length], header(data), False)


def test_bombs_are_refused_by_their_headers() -> None:
    png = with_png_size(FILES["png"], 60_000, 60_000)
    jpeg = with_jpeg_size(FILES["jpeg"], 60_000, 60_000)
    for data in (png, jpeg):
        with pytest.raises(ValueError, match="60000 x 60000"):
            header(data)
        for resize in (False, True):
            with pytest.raises(ValueError, match="60000 x 60000"):
                decode(data, (64, 64, 3), resize)
    place = FILES["webp"].index(b"\x9d\x01\x2a") + 3
    for side in (9_000, 16_000):
        size = struct.pack("<HH", side, side)
        webp = FILES["webp"][:place] + size + FILES["webp"][place + 4 :]
        with pytest.raises(ValueError, match="pixels"):
            decode(webp, (64, 64, 3), True)


@pytest.mark.parametrize(
    "data",
    [b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF    WEBP", b"GIF89a", b"BM", b"x" * 1000],
    ids=str,
)
def test_what_is_no_image_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError) as refusal:
        header(data)
    assert str(refusal.value)
    with pytest.raises(ValueError):
        decode(data, (8, 8, 3), True)


def test_other_formats_that_pillow_knows_are_refused() -> None:
    for kind in ("GIF", "BMP", "TIFF", "PPM"):
        with pytest.raises(ValueError, match="not a PNG, JPEG or WebP"):
            decode(encoded(patch(), kind), (64, 64, 3), False)


@settings(deadline=None, max_examples=400)
@given(
    name=st.sampled_from(sorted(FILES)),
    flips=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)), max_size=6),
    keep=st.one_of(st.none(), st.floats(0, 1)),
    resize=st.booleans(),
)
def test_damage_gives_an_array_or_a_value_error(
    name: str, flips: list[tuple[float, int]], keep: float | None, resize: bool
) -> None:
    data = bytearray(FILES[name])
    # half of the flips near the start, where the headers are
    for number, (place, change) in enumerate(flips):
        length = len(data) if number % 2 else min(len(data), 200)
        data[int(place * length)] ^= change
    if keep is not None:
        del data[int(keep * len(data)) :]
    try:
        height, width, channels = header(bytes(data))
        assert height > 0 and width > 0 and channels in (1, 3)
    except ValueError as error:
        assert str(error) and "\n" not in str(error)
    try:
        assert decode(bytes(data), (40, 40, 3), True).shape == (40, 40, 3)
    except ValueError as error:
        assert str(error) and "\n" not in str(error)
    try:
        assert decode(bytes(data), (64, 64, 3), resize).shape == (64, 64, 3)
    except ValueError as error:
        assert str(error) and "\n" not in str(error)
