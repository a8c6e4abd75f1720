"""Folders of image files, one folder a class; files beside these folders have no label."""

from __future__ import annotations

import glob
import logging
import os
from pathlib import Path

from sgan_dist.data.images import SUFFIXES
from sgan_dist.data.prepare.sources.source import (
    Columns,
    Encoded,
    Part,
    Source,
    content_of,
    file_chunks,
    file_states,
    number_classes,
)
from sgan_dist.errors import UserError, plural

# folders of these names, where there is one for `train`, are the parts
PARTS = {"train": "train", "test": "test"} | dict.fromkeys(
    ("val", "valid", "validation"), "validation"
)
UNLABELED = "unlabeled"  # a folder of this name is no class
JUNK = ("Thumbs.db", "desktop.ini")  # of file managers, like names that begin with a dot

log = logging.getLogger(__name__)


def read(place: str, columns: Columns) -> Source:
    """Reads a folder, or the files that a pattern matches (`*`, `?`, `[...]`, `**`).

    In a folder, `CLASS/**/NAME.jpg` is labeled by the first folder below it, and `NAME.jpg` and
    `unlabeled/**/NAME.jpg` have no label; `train/`, `val/` and `test/` are parts of that form. Of a
    pattern's matches, the folder that a file lies in is its class.
    """
    path = Path(place).expanduser()
    if path.is_dir():
        root, files = path, _walk(path)
    elif glob.has_magic(str(path)):
        root = _root(str(path))
        matches = (Path(match) for match in glob.glob(str(path), recursive=True))  # noqa: PTH207
        files = sorted(str(match.relative_to(root)) for match in matches if match.is_file())
    else:
        raise UserError(
            f"there is no folder {path}: give a folder of images, or a pattern in quotes"
        )
    files = [name for name in files if not _is_junk(Path(name).name)]
    images = [name for name in files if _is_image(name)]
    others = [name for name in files if not _is_image(name)]
    if others:
        log.warning(
            f"{plural(len(others), 'file')} passed over, whose names are not those of images"
            f" ({', '.join(SUFFIXES)}); the first is {root / others[0]}"
        )
    if not images:
        raise UserError(f"{path} has no images ({', '.join(SUFFIXES)}): check the folder")
    parts: dict[str, list[str]] = {"train": images}
    labels: dict[str, list[str | None]]
    if not path.is_dir():
        labels = {"train": [Path(name).parent.name or root.name for name in images]}
    elif (path / "train").is_dir():
        parts = {}
        for name in images:
            first = name.partition(os.sep)[0]
            if first not in PARTS and first != UNLABELED:
                raise UserError(f"{path} has train/, and {name} outside the parts: move it")
            parts.setdefault(PARTS.get(first, first), []).append(name)
        if "train" not in parts:
            raise UserError(f"{path / 'train'} has no images: check the folder")
        labels = {
            part: [
                None if part == UNLABELED else _class(name.partition(os.sep)[2]) for name in names
            ]
            for part, names in parts.items()
        }
    else:
        labels = {"train": [_class(name) for name in images]}
    class_names, numbers = number_classes(labels)
    made = {
        part: Part(
            Encoded(file_chunks(root, names), content_of(file_states(root, names))),
            numbers[part],
            numbers[part],
            names,
        )
        for part, names in parts.items()
    }
    return Source(
        class_names,
        made["train"],
        made.get("test"),
        made.get("validation"),
        made.get(UNLABELED),
    )


def _class(name: str) -> str | None:
    first, separator, _ = name.partition(os.sep)
    return first if separator and first != UNLABELED else None


def _is_image(name: str) -> bool:
    return name.lower().rpartition(".")[2] in SUFFIXES


def _is_junk(name: str) -> bool:
    return name.startswith(".") or name in JUNK


def _root(pattern: str) -> Path:
    """Returns the longest folder that all matches of a pattern lie in."""
    parts = Path(pattern).parts
    plain = next(n for n, part in enumerate(parts) if glob.has_magic(part))
    return Path(*parts[:plain])


def _walk(root: Path) -> list[str]:
    """Returns all files below a folder, sorted, through links too."""
    files, visited = [], set()
    for folder, subfolders, names in os.walk(root, followlinks=True):
        stat = Path(folder).stat()
        if (stat.st_dev, stat.st_ino) in visited:  # a link to a folder above
            subfolders.clear()
            continue
        visited.add((stat.st_dev, stat.st_ino))
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        files += [os.path.relpath(Path(folder) / name, root) for name in names]
    return sorted(files)
