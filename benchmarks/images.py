"""The images that are streamed, and the folders from which the pipelines read them."""

from __future__ import annotations

import contextlib
import functools
import io
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import util
from pathlib import Path
from unittest import mock

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from webdataset.writer import TarWriter

from sgan_dist.data.prepare.foreign import index_shards
from sgan_dist.data.prepare.shards import prepare
from sgan_dist.data.prepare.sources import load_source
from sgan_dist.data.prepare.sources.known import DIGITS
from sgan_dist.data.prepare.sources.source import Source, array_part
from sgan_dist.data.prepare.splits import Labels

Bytes = NDArray[np.uint8]

HELD_OUT = 10  # images for validation, and as many for the test
SHARDS = 8  # of a per-sample set, so that every worker gets some


@dataclass(frozen=True)
class Kind:
    """One kind of images: `packed` of them in packed records (0: none), `encoded` as files."""

    name: str
    shape: tuple[int, int, int]
    packed: int
    encoded: int
    batch: int

    @property
    def suffix(self) -> str:
        """The extension of an image's file: larger photos are JPEG, as usual."""
        return "jpg" if self.shape[0] > 64 else "png"

    @property
    def format(self) -> str:
        """The name of the format."""
        return "JPEG" if self.suffix == "jpg" else "PNG"


def draw(kind: Kind) -> Bytes:
    """Returns the images of a kind, always the same: repeated digits, or crops of real photos."""
    count = max(kind.packed, kind.encoded) + HELD_OUT
    if kind.shape[2] == 1:
        digits = load_source("digits").train.array
        return np.resize(digits, (count, *kind.shape))
    random = np.random.default_rng(0)
    scenes = _photos(kind.shape[0])
    images = np.empty((count, *kind.shape), np.uint8)
    side = kind.shape[0]
    for number in range(count):
        scene = scenes[random.integers(len(scenes))]
        top, left = random.integers(0, np.array(scene.shape[:2]) - side + 1)
        images[number] = scene[top : top + side, left : left + side]
    return images


def _photos(side: int) -> list[Bytes]:
    """Returns scikit-learn's two photos, each at four scales that contain a crop of `side`."""
    from sklearn.datasets import load_sample_images

    scenes = []
    for photo in load_sample_images().images:
        height, width = photo.shape[:2]
        for scale in np.geomspace(1, min(1, 2 * side / height), 4):
            size = round(width * scale), round(height * scale)
            scenes.append(np.asarray(Image.fromarray(photo).resize(size)))
    return scenes


def encode(image: Bytes, suffix: str) -> bytes:
    """Returns the image as a PNG or JPEG file."""
    buffer = io.BytesIO()
    pixels = Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)
    pixels.save(buffer, format="JPEG" if suffix == "jpg" else "PNG", quality=90)
    return buffer.getvalue()


def make(folder: Path, kind: Kind, images: Bytes, optional: bool) -> None:
    """Makes the missing folders of a kind; with `optional`, also those of installed libraries."""
    encoded = images[: kind.encoded + HELD_OUT]
    if kind.packed:
        _once(folder / "packed", lambda out: _prepare(out, images, "packed", "windowed"))
        _once(folder / "full", lambda out: _prepare(out, images, "packed", "full"))
    if kind.suffix == "png":
        _once(folder / "encoded", lambda out: _prepare(out, encoded, "per-sample", "windowed"))
    else:
        _once(folder / "tars", lambda out: _write_jpegs(out, encoded))
        unlabeled, held = ([f"{folder / 'tars' / part}/*.tar"] for part in ("unlabeled", "held"))
        _once(
            folder / "encoded",
            lambda out: index_shards(
                unlabeled, held, held, held, out, order="windowed", progress=False
            ),
        )
    _once(folder / "raw", lambda out: _write_raw(out, encoded[: kind.encoded]))
    if optional and util.find_spec("litdata"):
        _once(folder / "litdata", lambda out: _write_litdata(out, encoded[: kind.encoded], kind))


def _once(out: Path, write: Callable[[Path], object]) -> None:
    """Writes a folder, unless an earlier run has written it."""
    if out.exists():
        return
    partial = out.with_name(f"{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    write(partial)
    partial.rename(out)


def _prepare(out: Path, images: Bytes, layout: str, order: str) -> None:
    labels = np.arange(len(images)) % len(DIGITS)
    train, test = array_part(images, labels), array_part(images[:HELD_OUT], labels[:HELD_OUT])
    source = Source(DIGITS, train, test, name="benchmark")
    samples = None if layout == "packed" else (len(images) - HELD_OUT) // SHARDS
    # the images are in memory, and no source name stands for them
    with mock.patch("sgan_dist.data.prepare.shards.load_source", return_value=source):
        prepare(
            "benchmark",
            out,
            Labels(1),
            HELD_OUT,
            layout=layout,
            order=order,
            samples_per_shard=samples,
            progress=False,
        )


def _write_jpegs(out: Path, images: Bytes) -> None:
    """Writes the usual WebDataset tars of `jpg` and `cls`."""

    def record(number: int, image: Bytes) -> dict[str, bytes]:
        return {"jpg": encode(image, "jpg"), "cls": str(number % len(DIGITS)).encode()}

    _write_tars(out / "held", images[-HELD_OUT:], 1, record)
    _write_tars(out / "unlabeled", images[:-HELD_OUT], SHARDS, record)


def _write_raw(out: Path, images: Bytes) -> None:
    _write_tars(out, images, SHARDS, lambda number, image: {"bin": image.tobytes()})


def _write_tars(
    out: Path, images: Bytes, shards: int, record: Callable[[int, Bytes], dict[str, bytes]]
) -> None:
    out.mkdir(parents=True)
    for shard, numbers in enumerate(np.array_split(np.arange(len(images)), shards)):
        with TarWriter(str(out / f"{shard:06d}.tar"), encoder=False) as writer:
            for number in numbers.tolist():
                writer.write({"__key__": f"{number:06d}", **record(number, images[number])})


def _write_litdata(out: Path, images: Bytes, kind: Kind) -> None:
    import litdata

    with _silence():
        litdata.optimize(
            functools.partial(_litdata_record, images, kind),
            list(range(len(images))),
            str(out),
            chunk_size=len(images) // SHARDS,
            num_workers=1,
            start_method="fork",
        )


def _litdata_record(images: Bytes, kind: Kind, number: int) -> dict[str, object]:
    image = images[number]
    return {"image": encode(image, "jpg") if kind.suffix == "jpg" else image}


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    with open(os.devnull, "w") as null:  # noqa: SIM117 - the file must outlast both
        with contextlib.redirect_stdout(null), contextlib.redirect_stderr(null):
            yield


def encoded_tars(folder: Path, kind: Kind) -> Path:
    """Returns the folder of a kind's tars of PNG or JPEG files."""
    return folder / ("encoded" if kind.suffix == "png" else "tars") / "unlabeled"
