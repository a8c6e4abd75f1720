"""NumPy archives: MedMNIST's layout (`train_images`, `train_labels`, `val_`, `test_`), and Keras'."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from sgan_dist.data.prepare.sources.source import (
    Columns,
    Part,
    Source,
    array_part,
    number_classes,
)
from sgan_dist.errors import UserError

PARTS = {"train": ("train",), "validation": ("val", "validation"), "test": ("test",)}


def read(file: str, columns: Columns) -> Source:
    """Reads a .npz file: uint8 images (n, H, W) or (n, H, W, C), and a class number each.

    Arrays of Python objects, which are pickles, are refused.
    """
    path = Path(file).expanduser()
    try:
        with np.load(path, allow_pickle=False) as archive:
            if not hasattr(archive, "files"):
                raise UserError(f"{path} is one array: give an .npz file of images and labels")
            arrays = {name: archive[name] for name in archive.files}
    except ValueError as error:
        if "pickle" not in str(error):
            raise UserError(f"cannot read {path}: {error}") from None
        raise UserError(
            f"{path} holds Python objects (a pickle), which may run code when they are read: save"
            " plain arrays, np.savez(file, train_images=uint8, train_labels=int64)"
        ) from None
    except (OSError, EOFError, zipfile.BadZipFile) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"cannot read {path}: {reason}; give an .npz file") from None
    found = {part: _array(arrays, "images", "x", names) for part, names in PARTS.items()}
    labels = {part: _array(arrays, "labels", "y", names) for part, names in PARTS.items()}
    if found["train"] is None or labels["train"] is None:
        raise UserError(
            f"{path} holds {', '.join(sorted(arrays))}: it needs train_images and train_labels (and"
            " may have val_ and test_)"
        )
    present = {part: array for part, array in found.items() if array is not None}
    for part in present:
        array = labels[part]
        if array is None or array.shape not in ((len(present[part]),), (len(present[part]), 1)):
            shape = "none" if array is None else array.shape
            raise UserError(
                f"{path}: the {part} labels must be one number an image, and are {shape} for"
                f" {len(present[part])} images"
            )
    class_names, numbers = number_classes(
        {
            part: array.ravel().tolist()
            for part, array in labels.items()
            if array is not None and part in present
        }
    )
    parts: dict[str, Part] = {
        part: array_part(array, numbers[part]) for part, array in present.items()
    }
    return Source(class_names, parts["train"], parts.get("test"), parts.get("validation"))


def _array(
    arrays: Mapping[str, np.ndarray], kind: str, letter: str, names: tuple[str, ...]
) -> np.ndarray | None:
    for name in names:
        for key in (f"{name}_{kind}", f"{letter}_{name}"):
            if key in arrays:
                return arrays[key]
    return None
