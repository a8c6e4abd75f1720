"""Decoding: the same pixels as Pillow, every odd kind of image, and damage that is never missed."""

from __future__ import annotations

import functools
import io
import struct
import zlib
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageOps

from sgan_dist.data.images import Resize, decode, fit, header


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
    decoded = decode(FILES[name], hwc(expected), "none")
    assert decoded.dtype == np.uint8
    np.testing.assert_array_equal(decoded, expected)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_as_exif_says(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(photo().crop((0, 0, 96, 64)), kind, exif=exif)
    upright = pixels(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    assert header(data) == upright.shape
    np.testing.assert_array_equal(decode(data, hwc(upright), "none"), upright)
    np.testing.assert_array_equal(
        decode(data, (40, 40, 3), "shorter"), fit(upright, (40, 40, 3), "shorter")
    )
    if kind != "TIFF":  # which no index of version 1 has
        as_stored = pixels(Image.open(io.BytesIO(data)))
        np.testing.assert_array_equal(decode(data, (64, 96, 3), "none", version=1), as_stored)


def odd_scan(data: bytes) -> bytes:
    """As some phones write it: libjpeg warns of the parameters of the scan."""
    scan = data.index(b"\xff\xda")
    return data[: scan + 11] + bytes(3) + data[scan + 14 :]


def extraneous(data: bytes) -> bytes:
    return data[:-2] + bytes(258) + b"\xff\xd9"


@pytest.mark.parametrize("odd", [odd_scan, extraneous])
@pytest.mark.parametrize("resize", ["none", "shorter"])
def test_what_libjpeg_only_warns_of_is_no_damage(
    odd: Callable[[bytes], bytes], resize: Resize
) -> None:
    shape = (64, 64, 3) if resize == "none" else (24, 24, 3)
    data = FILES["jpeg"]
    with pytest.raises(ValueError, match=r"SOS|extraneous"):
        simplejpeg.decode_jpeg(odd(data))
    expected = fit(pixels(Image.open(io.BytesIO(data))), shape, resize)
    np.testing.assert_array_equal(decode(odd(data), shape, resize), expected)
    for kept in range(300, len(data) - 2, 50):
        with pytest.raises(ValueError):
            decode(odd(data)[:kept], shape, resize)


@pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF", "AVIF"])
def test_further_formats(kind: str) -> None:
    data = encoded(patch(), kind)
    expected = pixels(Image.open(io.BytesIO(data)).convert("RGB"))
    np.testing.assert_array_equal(decode(data, (64, 64, 3), "none"), expected)


def test_pixels_of_32_bits_are_refused() -> None:
    data = encoded(Image.fromarray(np.zeros((8, 8), np.float32)), "TIFF")
    with pytest.raises(ValueError, match="32 bits"):
        decode(data, (8, 8, 1), "shorter")


def test_exact_scales_each_side_for_itself() -> None:
    stripes = np.repeat(np.arange(0, 256, 32, dtype=np.uint8), 8)
    image = np.broadcast_to(stripes[:, None, None], (64, 128, 1)).copy()
    scaled = fit(image, (32, 32, 3), "exact")
    np.testing.assert_array_equal(scaled[2::4, 16, 0], stripes[::8])
    data = encoded(Image.fromarray(image[..., 0]), "PNG")
    np.testing.assert_array_equal(decode(data, (32, 32, 3), "exact"), scaled)


@pytest.mark.parametrize("mode", ["1", "L", "LA"])
def test_gray_kinds_become_one_channel(mode: str) -> None:
    image = patch("L").convert(mode)
    data = encoded(image, "PNG")
    assert header(data) == (64, 64, 1)
    np.testing.assert_array_equal(decode(data, (64, 64, 1), "none")[..., 0], image.convert("L"))


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_transparent_images_get_a_white_background(kind: str) -> None:
    image = Image.new("RGBA", (4, 2), (10, 20, 30, 255))
    image.putpixel((1, 0), (10, 20, 30, 0))
    decoded = decode(encoded(image, kind, lossless=True), (2, 4, 3), "none")
    assert decoded[0, 0].tolist() == [10, 20, 30]
    assert decoded[0, 1].tolist() == [255, 255, 255]


def test_transparent_palette_and_gray() -> None:
    image = Image.new("P", (4, 2), 1)
    image.putpalette([0, 0, 0, 200, 100, 50])
    image.putpixel((0, 0), 0)
    decoded = decode(encoded(image, "PNG", transparency=0), (2, 4, 3), "none")
    assert decoded[0, 0].tolist() == [255, 255, 255]
    assert decoded[1, 1].tolist() == [200, 100, 50]
    gray = Image.new("LA", (4, 2), (100, 255))
    gray.putpixel((0, 0), (100, 0))
    decoded = decode(encoded(gray, "PNG"), (2, 4, 1), "none")
    assert decoded[0, :2, 0].tolist() == [255, 100]


def test_of_16_bits_the_upper_8_are_taken() -> None:
    wide = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000
    data = encoded(Image.fromarray(wide), "PNG")
    np.testing.assert_array_equal(decode(data, (8, 8, 1), "none")[..., 0], wide >> 8)


def test_cmyk_becomes_rgb() -> None:
    decoded = decode(FILES["cmyk jpeg"], (64, 64, 3), "none")
    expected = Image.open(io.BytesIO(FILES["cmyk jpeg"])).convert("RGB")
    np.testing.assert_array_equal(decoded, expected)
    assert abs(decoded.astype(int) - np.asarray(patch())).mean() < 10  # not inverted


@pytest.mark.parametrize("name", FILES)
def test_another_shape_is_damage_without_resize(name: str) -> None:
    height, width, channels = header(FILES[name])
    assert decode(FILES[name], (height, width, channels), "none").shape == (64, 64, channels)
    for shape in ((64, 63, channels), (63, 64, channels), (64, 64, 4 - channels)):
        with pytest.raises(ValueError, match="expected"):
            decode(FILES[name], shape, "none")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("channels", [1, 3])
def test_resize_turns_gray_into_rgb_and_back(name: str, channels: int) -> None:
    decoded = decode(FILES[name], (64, 64, channels), "shorter")
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
    inside = decode(encoded(Image.fromarray(bands), kind), (20, 20, 3), "shorter")[4:16, 4:16]
    assert abs(inside.astype(int) - [0, 200, 0]).max() < 12
    upright = Image.fromarray(bands.swapaxes(0, 1).copy())
    inside = decode(encoded(upright, kind), (20, 20, 3), "shorter")[4:16, 4:16]
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
    decoded = decode(data, hwc(expected), "shorter")
    error = ((decoded.astype(float) - expected) ** 2).mean()
    assert error < 255**2 / 10**4.2


@pytest.mark.parametrize("name", [name for name in FILES if "jpeg" in name])
@pytest.mark.parametrize("resize", ["none", "shorter"])
def test_a_jpeg_that_is_cut_short_is_refused(name: str, resize: Resize) -> None:
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
            decode(data[:length] + bytes(len(data) - length), header(data), "none")


@pytest.mark.parametrize("name", ["png", "gray png", "webp"])
def test_png_and_webp_that_are_cut_short_are_refused(name: str) -> None:
    data = FILES[name]
    for length in range(0, len(data) - 30, 29):
        with pytest.raises(ValueError):
            decode(data[:length], header(data), "none")


def test_bombs_are_refused_by_their_headers() -> None:
    png = with_png_size(FILES["png"], 60_000, 60_000)
    jpeg = with_jpeg_size(FILES["jpeg"], 60_000, 60_000)
    with pytest.raises(ValueError, match="60000 x 60000"):
        header(png)
    with pytest.raises(ValueError, match="60000 x 60000"):
        decode(png, (64, 64, 3), "shorter")
    with pytest.raises(ValueError, match="60000 x 60000"):
        decode(jpeg, (30_000, 30_000, 3), "shorter")
    place = FILES["webp"].index(b"\x9d\x01\x2a") + 3
    for side in (9_000, 16_000):
        size = struct.pack("<HH", side, side)
        webp = FILES["webp"][:place] + size + FILES["webp"][place + 4 :]
        with pytest.raises(ValueError, match="pixels"):
            decode(webp, (64, 64, 3), "shorter")


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
        decode(data, (8, 8, 3), "shorter")


def test_a_jpeg_of_108_megapixels_is_decoded_at_an_eighth() -> None:
    data = encoded(Image.new("L", (12_000, 9_000), 90), "JPEG")
    decoded = decode(data, (32, 32, 1), "shorter")
    assert np.abs(decoded.astype(int) - 90).max() <= 1


def test_other_formats_that_pillow_knows_are_refused() -> None:
    for kind in ("PPM", "ICO", "TGA"):
        with pytest.raises(ValueError, match="not a PNG, JPEG, WebP, GIF, BMP, TIFF or AVIF"):
            decode(encoded(patch(), kind), (64, 64, 3), "none")


@settings(deadline=None, max_examples=400)
@given(
    name=st.sampled_from(sorted(FILES)),
    flips=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)), max_size=6),
    keep=st.one_of(st.none(), st.floats(0, 1)),
    resize=st.sampled_from(["none", "shorter", "exact"]),
)
def test_damage_gives_an_array_or_a_value_error(
    name: str, flips: list[tuple[float, int]], keep: float | None, resize: Resize
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
        assert decode(bytes(data), (40, 40, 3), "shorter").shape == (40, 40, 3)
    except ValueError as error:
        assert str(error) and "\n" not in str(error)
    try:
        assert decode(bytes(data), (64, 64, 3), resize).shape == (64, 64, 3)
    except ValueError as error:
        assert str(error) and "\n" not in str(error)
