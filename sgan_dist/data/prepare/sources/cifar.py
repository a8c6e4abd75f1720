"""CIFAR-10 and CIFAR-100 in the binary layout (https://www.cs.toronto.edu/~kriz/cifar.html)."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from sgan_dist.data.prepare.sources.source import Columns, Part, Source, array_part
from sgan_dist.errors import UserError

SHAPE = (3, 32, 32)
# files of the training part and of the test part, bytes of labels before each image, file of names
LAYOUTS = (
    ([f"data_batch_{n}.bin" for n in range(1, 6)], ["test_batch.bin"], 1, "batches.meta.txt"),
    (["train.bin"], ["test.bin"], 2, "fine_label_names.txt"),
)  # fmt: skip


def read(folder: str, columns: Columns) -> Source:
    """Reads the `.bin` files of either; of CIFAR-100 the fine labels. The Python version is refused."""
    path = Path(folder).expanduser()
    for train, test, label_bytes, names in LAYOUTS:
        if (path / train[0]).is_file():
            class_names = _class_names(path / names)
            classes = len(class_names)
            train_part = _part(path, train, label_bytes, classes)
            return Source(class_names, train_part, _part(path, test, label_bytes, classes))
    if (path / "data_batch_1").exists() or (path / "train").is_file():
        raise UserError(
            f"{path} is the Python version of CIFAR, whose pickles may run code when they are read:"
            " download the binary version, or the parquet files of Hugging Face (parquet:DIR)"
        )
    raise UserError(f"{path} has neither data_batch_1.bin nor train.bin: give the folder of either")


def _part(folder: Path, files: list[str], label_bytes: int, classes: int) -> Part:
    data = b"".join(_read(folder / file) for file in files)
    size = label_bytes + int(np.prod(SHAPE))
    if not data or len(data) % size:
        raise UserError(
            f"the files {files[0]}... of {folder} have {len(data)} bytes, no multiple of {size}:"
            " remove them and download them again"
        )
    records = np.frombuffer(data, np.uint8).reshape(-1, size)
    labels = records[:, label_bytes - 1]
    if labels.max() >= classes:
        raise UserError(f"{folder} has the label {labels.max()} of {classes} classes: is it CIFAR?")
    images = records[:, label_bytes:].reshape(-1, *SHAPE).transpose(0, 2, 3, 1)
    return array_part(np.ascontiguousarray(images), labels)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; download it again") from None


def _class_names(path: Path) -> tuple[str, ...]:
    return tuple(line for line in _read(path).decode().splitlines() if line.strip())
