"""IDX files: small ones, and the real ones in SGAN_DATA."""

from __future__ import annotations

import gzip
import os
import struct
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from sgan_dist.data.order import permutation

REAL = Path(os.environ.get("SGAN_DATA", "/no/such/folder"))  # folders mnist and fashion-mnist
needs_real = pytest.mark.skipif("SGAN_DATA" not in os.environ, reason="SGAN_DATA is not set")


def idx_bytes(array: NDArray[np.uint8]) -> bytes:
    return struct.pack(f">4B{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


def write_idx(folder: Path, compress: bool = True) -> Path:
    """Writes 600 training and 60 test images, 8 x 8, distinct and random, of 4 classes in turn."""
    folder.mkdir()
    for part, samples in (("train", 600), ("t10k", 60)):
        images = (permutation(samples * 64, part) % 251).astype(np.uint8)
        labels = (np.arange(samples) % 4).astype(np.uint8)
        for name, array in (
            (f"{part}-images-idx3-ubyte", images.reshape(samples, 8, 8)),
            (f"{part}-labels-idx1-ubyte", labels),
        ):
            data = idx_bytes(array)
            (folder / (name + ".gz" * compress)).write_bytes(
                gzip.compress(data) if compress else data
            )
    return folder
