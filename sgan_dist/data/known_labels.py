"""What is known of the classes of unlabeled images, in a file that training never reads.

It shows afterwards how true the targets were. An import contract keeps it from losses and order.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from sgan_dist.data.index import DatasetIndex
from sgan_dist.data.order import Int64s
from sgan_dist.errors import UserError
from sgan_dist.files import npy_bytes, write_whole

NAME = "unlabeled/known_labels.npy"


def write_known_labels(root: Path, labels: Int64s) -> None:
    """Writes int64 (n,): by sample the class of each unlabeled image, -1 where it is not known."""
    write_whole(root / NAME, npy_bytes(labels), fsync=True)


def read_known_labels(root: Path, index: DatasetIndex) -> Int64s | None:
    """Returns what `write_known_labels` wrote for a local dataset, None if there is no such file.

    Raises:
        UserError: it is of another dataset.
    """
    path = root / NAME
    if not path.exists():
        return None
    try:
        labels: Int64s = np.load(path)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"cannot read {path}: {error}; prepare the dataset again") from None
    if labels.shape != (index.unlabeled.samples,) or labels.dtype != np.int64:
        raise UserError(f"{path} is not of this dataset: copy the dataset's own one")
    return labels
