"""SVHN's cropped digits (http://ufldl.stanford.edu/housenumbers), the extra ones unlabeled."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from sgan_dist.data.prepare.sources.source import Columns, Part, Source, array_part
from sgan_dist.errors import UserError

DIGITS = tuple("0123456789")


def read(folder: str, columns: Columns) -> Source:
    """Reads the files of a folder; the extra images, if present, are unlabeled ones.

    The label 10 is the digit 0.
    """
    path = Path(folder).expanduser()
    train, test = _part(path / "train_32x32.mat"), _part(path / "test_32x32.mat")
    extra = None
    if (path / "extra_32x32.mat").exists():
        extra = _part(path / "extra_32x32.mat")
    return Source(DIGITS, train, test, unlabeled=extra)


def _part(path: Path) -> Part:
    try:
        from scipy.io import loadmat
    except ImportError:
        raise UserError("reading .mat files takes scipy: pip install 'sgan_dist[mat]'") from None
    try:
        arrays = loadmat(path)
        images, labels = arrays["X"], arrays["y"]
    except (OSError, ValueError, KeyError, NotImplementedError, TypeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(
            f"cannot read {path}: {reason}; give the folder of SVHN's cropped digits, format 2"
        ) from None
    images = np.ascontiguousarray(images.transpose(3, 0, 1, 2))  # stored as (H, W, C, n)
    return array_part(images, labels.ravel().astype(np.int64) % 10)
