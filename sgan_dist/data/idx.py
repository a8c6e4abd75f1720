"""The IDX files of MNIST and its kin: four in a folder, images and labels as unsigned bytes."""

from __future__ import annotations

import gzip
import hashlib
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sgan_dist.data.order import Int64s
from sgan_dist.errors import UserError

Bytes = NDArray[np.uint8]


def read_pair(
    folder: Path, part: str, sha256: Mapping[str, str] | None = None
) -> tuple[Bytes, Int64s]:
    """Images uint8 (n, H, W, 1) and labels int64 (n,) of a part, `train` or `t10k`.

    Each file may be plain or end in .gz. With `sha256`, of the unpacked files by name, they must
    be those very files.
    """
    images = _read(folder, f"{part}-images-idx3-ubyte", 3, sha256)
    labels = _read(folder, f"{part}-labels-idx1-ubyte", 1, sha256)
    if len(images) != len(labels):
        raise UserError(f"{folder}: {len(images)} {part} images but {len(labels)} {part} labels")
    if images.size == 0:
        raise UserError(f"{folder}: the {part} files hold no images")
    return images[..., np.newaxis], labels.astype(np.int64)


def _read(folder: Path, name: str, dimensions: int, sha256: Mapping[str, str] | None) -> Bytes:
    """One file as uint8 of its own shape."""
    path, data = _content(folder, name)
    if sha256 is not None and hashlib.sha256(data).hexdigest() != sha256[name]:
        raise UserError(
            f"{path} is not the file that {folder.name} is known by (the sha256 of its content "
            "differs): remove it and download it again, or name another dataset as idx:FOLDER"
        )
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
            f"{len(data) - header}; remove it and download it again"
        )
    return np.frombuffer(data, np.uint8, offset=header).reshape(shape)


def _content(folder: Path, name: str) -> tuple[Path, bytes]:
    """Where the file is, and its content, unpacked."""
    path = folder / f"{name}.gz"
    try:
        if not path.is_file():
            path = folder / name
        data = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"{folder} has neither {name}.gz nor {name}: give the folder of IDX files"
        ) from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; check its permissions") from None
    if path.suffix != ".gz":
        return path, data
    try:
        return path, gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"cannot read {path}: {error}; remove it and download it again") from None
