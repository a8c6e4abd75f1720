"""STL-10's binary files (https://cs.stanford.edu/~acoates/stl10), with its 100,000 unlabeled images."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from sgan_dist.data.order import Int64s
from sgan_dist.data.prepare.sources.source import Bytes, Columns, Part, Source, array_part
from sgan_dist.data.records import UNLABELED
from sgan_dist.errors import UserError

IMAGE = (3, 96, 96)  # stored as channel, column, row
FOLDS = 10


def read(folder: str, columns: Columns) -> Source:
    """Reads `train_X.bin`, `train_y.bin`, `test_X.bin`, `test_y.bin`, and `unlabeled_X.bin` if present.

    With `columns.fold`, only the 1,000 images of that line of `fold_indices.txt` may be labeled.
    """
    path = Path(folder).expanduser()
    names = tuple(_bytes(path / "class_names.txt").decode().split())
    train, test = (
        array_part(_images(path / f"{part}_X.bin"), _labels(path / f"{part}_y.bin", len(names)))
        for part in ("train", "test")
    )
    if columns.fold is not None:
        labels = np.full(len(train.labels), UNLABELED)
        chosen = _fold(path / "fold_indices.txt", columns.fold, len(labels))
        labels[chosen] = train.labels[chosen]
        train = Part(train.images, labels, train.known)
    unlabeled = None
    if (path / "unlabeled_X.bin").exists():
        unlabeled = array_part(_images(path / "unlabeled_X.bin"), None)
    return Source(names, train, test, unlabeled=unlabeled)


def _images(path: Path) -> Bytes:
    size = int(np.prod(IMAGE))
    try:
        data = np.memmap(path, np.uint8, "r")  # 2.8 GB of unlabeled images
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}; give the folder of STL-10") from None
    if len(data) % size:
        raise UserError(f"{path} has {len(data)} bytes, no multiple of {size}: download it again")
    return data.reshape(-1, *IMAGE).transpose(0, 3, 2, 1)


def _labels(path: Path, classes: int) -> Int64s:
    labels = np.frombuffer(_bytes(path), np.uint8).astype(np.int64) - 1  # stored from 1 on
    if not len(labels) or labels.min() < 0 or labels.max() >= classes:
        raise UserError(f"{path} must hold a number from 1 to {classes} for each image")
    return labels


def _fold(path: Path, fold: int, images: int) -> Int64s:
    lines = _bytes(path).decode().splitlines()
    if not 0 <= fold < min(FOLDS, len(lines)):
        raise UserError(f"--fold is {fold}: {path} has the folds 0 to {min(FOLDS, len(lines)) - 1}")
    rows = np.array(lines[fold].split(), np.int64)
    if not len(rows) or rows.min() < 0 or rows.max() >= images:
        raise UserError(f"{path} names images that train_X.bin does not have")
    return rows


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(
            f"cannot read {path}: {error.strerror}; give the folder of STL-10"
        ) from None
