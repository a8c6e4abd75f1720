"""Pairs of IDX files: MNIST's format, under the names of MNIST, EMNIST, 7-Zip and Kaggle."""

from __future__ import annotations

import gzip
import hashlib
import re
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from sgan_dist.data.prepare.sources.source import (
    Bytes,
    Columns,
    Part,
    Source,
    array_part,
    number_classes,
)
from sgan_dist.errors import UserError

_FILE = re.compile(
    r"(?P<prefix>.*?)(?P<part>train|t10k|test)-(?P<what>images|labels)[-.]idx\d-ubyte(\.gz)?"
)


def read(folder: str, columns: Columns) -> Source:
    """Reads `train-images-idx3-ubyte` and `train-labels-idx1-ubyte`, and `t10k-` or `test-` if there.

    Files may end in .gz, have a dot before `idx`, lie in folders of their own names, and have a prefix:
    of several, `folder` ends with one: `emnist/emnist-letters-`.
    """
    return read_idx(Path(folder).expanduser())


def read_idx(
    path: Path,
    class_names: tuple[str, ...] = (),
    sha256: Mapping[str, str] | None = None,
) -> Source:
    """Reads the files of a folder; without `class_names`, classes are numbers.

    `sha256` holds the sums of the unpacked files by name: these four must be there.
    """
    if sha256 is not None:
        files = {tuple(file.split("-")[:2]): _named(path, file) for file in sha256}
    else:
        files = _files(path)
    arrays = {}
    for (part, what), file in files.items():
        checksum = None if sha256 is None else sha256[file.name.removesuffix(".gz")]
        arrays[part, what] = _array(file, checksum)
    parts = {part: _part(path, part, arrays) for part in sorted({part for part, _ in arrays})}
    if "train" not in parts:
        raise UserError(f"{path} has no train-images-idx3-ubyte: give the folder of IDX files")
    train, test = parts["train"], parts.get("t10k", parts.get("test"))
    if test is not None and train.array.shape[1:] != test.array.shape[1:]:
        raise UserError(
            f"{path}: train images are {train.array.shape[1:3]}, t10k images"
            f" {test.array.shape[1:3]} pixels; they must be equal"
        )
    if class_names:
        return Source(class_names, train, test)
    labels = {"train": train.labels.tolist()}
    if test is not None:
        labels["test"] = test.labels.tolist()
    class_names, numbers = number_classes(labels)
    train = array_part(train.array, numbers["train"])
    if test is not None:
        test = array_part(test.array, numbers["test"])
    return Source(class_names, train, test)


def _named(folder: Path, name: str) -> Path:
    for path in (folder / f"{name}.gz", folder / name):
        if path.is_file():
            return path
    raise UserError(f"{folder} has neither {name}.gz nor {name}: give the folder of IDX files")


def _files(path: Path) -> dict[tuple[str, ...], Path]:
    """Returns the files by part and kind: of one prefix, packed ones first."""
    folder, wanted = (path, None) if path.is_dir() else (path.parent, path.name)
    files: dict[str, dict[tuple[str, ...], Path]] = {}
    for file in sorted(folder.glob("**/*"), reverse=True):  # so that x.gz replaces x
        match = _FILE.fullmatch(file.name)
        if match and file.is_file() and wanted in (None, match["prefix"], match["prefix"][:-1]):
            files.setdefault(match["prefix"], {})[match["part"], match["what"]] = file
    if not files:
        raise UserError(
            f"{path} has neither train-images-idx3-ubyte.gz nor train-images-idx3-ubyte: give the"
            " folder of IDX files"
        )
    if len(files) > 1:
        choices = " or ".join(f"idx:{folder / prefix}" for prefix in sorted(files))
        raise UserError(f"{path} holds several sets of IDX files: give {choices}")
    return next(iter(files.values()))


def _part(folder: Path, part: str, arrays: Mapping[tuple[str, str], Bytes]) -> Part:
    for what in ("images", "labels"):
        if (part, what) not in arrays:
            raise UserError(f"{folder} has no {part}-{what} file: give both IDX files of each part")
    images, labels = arrays[part, "images"], arrays[part, "labels"]
    if images.ndim < 3 or labels.ndim != 1:
        raise UserError(
            f"{folder}: {part} images have {images.ndim} dimensions and labels {labels.ndim}, and must"
            " have 3 or 4 and 1"
        )
    if len(images) != len(labels):
        raise UserError(f"{folder}: {len(images)} {part} images but {len(labels)} {part} labels")
    if images.size == 0:
        raise UserError(f"{folder}: the {part} files hold no images")
    return array_part(images, labels)


def _array(path: Path, sha256: str | None) -> Bytes:
    """Returns one file as an array of the shape in its header."""
    try:
        data = path.read_bytes()
        if data.startswith(b"\x1f\x8b"):  # some programs unpack a file and keep its name
            data = gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(
            f"cannot read {path}: {error}; check its permissions, or remove it and download it again"
        ) from None
    if sha256 is not None and hashlib.sha256(data).hexdigest() != sha256:
        raise UserError(
            f"{path} is not the known file of {path.parent.name} (the sha256 of its content differs):"
            " remove it and download it again, or give another dataset as idx:FOLDER"
        )
    # magic: two zero bytes, 8 = unsigned byte, then the number of dimensions
    if len(data) < 8 or data[:3] != bytes((0, 0, 8)) or not 1 <= data[3] <= 4:
        raise UserError(
            f"{path} is not an IDX file of unsigned bytes: it begins with"
            f" {data[:4].hex() or 'nothing'}"
        )
    start = 4 + 4 * data[3]
    shape = struct.unpack(f">{data[3]}I", data[4:start].ljust(4 * data[3], b"\0"))
    expected = int(np.prod(shape, dtype=object))
    if len(data) - start != expected:
        raise UserError(
            f"{path} says {'x'.join(map(str, shape))} = {expected} bytes, but holds"
            f" {len(data) - start}; remove it and download it again"
        )
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)
