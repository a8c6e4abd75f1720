"""What every source gives: images, as arrays or encoded, and what is known of their classes."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sgan_dist.data.order import Int64s
from sgan_dist.data.records import UNLABELED, plain_label
from sgan_dist.errors import UserError, plural

Bytes = NDArray[np.uint8]

CHUNK = 1024  # images that a process reads and decodes at a time
SHOWN = 20  # classes whose map is logged

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Chunk:
    """Images that one process reads and decodes.

    `read` yields `rows` items: an encoded image, one of pixels uint8 (h, w, c), or, as a text, the
    reason why there is none. It can be pickled.
    """

    rows: int
    read: Callable[[], Iterator[bytes | Bytes | str]]


@dataclass(frozen=True)
class Encoded:
    """Images that are still to be decoded. `content` changes with what they are: a sha256."""

    chunks: tuple[Chunk, ...]
    content: str

    def __len__(self) -> int:
        return sum(chunk.rows for chunk in self.chunks)


@dataclass(frozen=True)
class Part:
    """Some images of a source.

    images: uint8 (n, H, W, C), or encoded.
    labels: int64 (n,), the class of each image that may be used as labeled, else -1.
    known: int64 (n,), the class of each image whose class is known, which training never sees.
    names: of each image, for messages and lists of labels; None: its number in the part.
    """

    images: Bytes | Encoded
    labels: Int64s
    known: Int64s
    names: Sequence[str] | None = None

    @property
    def array(self) -> Bytes:
        """The images, uint8 (n, H, W, C), which must not be encoded ones."""
        assert isinstance(self.images, np.ndarray)
        return self.images

    def name(self, row: int) -> str:
        """Returns the name of an image."""
        return str(row) if self.names is None else self.names[row]


@dataclass(frozen=True)
class Source:
    """Images to make a dataset of; parts other than `train` may be absent.

    `unlabeled` holds further images to train on; its labels are known ones at most.
    """

    class_names: tuple[str, ...]
    train: Part
    test: Part | None = None
    validation: Part | None = None
    unlabeled: Part | None = None
    name: str = ""


@dataclass(frozen=True)
class Columns:
    """Where tables and tars have images and labels; None: the usual names."""

    image: str | None = None
    label: str | None = None
    fold: int | None = None
    """of STL-10's ten sets of 1,000 labeled images, from 0"""


def array_part(images: Bytes, labels: NDArray[np.integer] | None) -> Part:
    """Returns a part of arrays: uint8 (n, H, W, C) or (n, H, W), and labels, or none."""
    if images.dtype != np.uint8 or images.ndim not in (3, 4):
        raise UserError(
            f"images are {images.dtype} of shape {images.shape}: they must be uint8 (n, H, W) or"
            " (n, H, W, channels)"
        )
    images = images[..., np.newaxis] if images.ndim == 3 else images
    if labels is None:
        labels = np.full(len(images), UNLABELED)
    if len(labels) != len(images):
        raise UserError(f"there are {len(images)} images and {len(labels)} labels")
    numbers: Int64s = labels.reshape(len(images)).astype(np.int64)
    return Part(images, numbers, numbers)


def file_chunks(folder: Path, names: Sequence[str]) -> tuple[Chunk, ...]:
    """Returns chunks of image files below a folder."""
    return tuple(
        Chunk(len(some), _Files(folder, tuple(some)))
        for some in (names[start : start + CHUNK] for start in range(0, len(names), CHUNK))
    )


@dataclass(frozen=True)
class _Files:
    folder: Path
    names: tuple[str, ...]

    def __call__(self) -> Iterator[bytes | str]:
        for name in self.names:
            try:
                yield (self.folder / name).read_bytes()
            except OSError as error:
                yield error.strerror or str(error)


def content_of(lines: Iterable[str]) -> str:
    """Returns the sha256 of lines that say what encoded images are."""
    digest = hashlib.sha256()
    for line in lines:
        digest.update(line.encode(errors="surrogateescape") + b"\n")
    return digest.hexdigest()


def file_states(folder: Path, names: Iterable[str]) -> Iterator[str]:
    """Yields name, size and time of each file: with others it is another file."""
    for name in names:
        try:
            stat = (folder / name).stat()
            yield f"{name} {stat.st_size} {stat.st_mtime_ns}"
        except OSError as error:
            yield f"{name} {error.strerror}"


def number_classes(
    parts: Mapping[str, Sequence[object]], names: Sequence[str] | None = None
) -> tuple[tuple[str, ...], dict[str, Int64s]]:
    """Returns the names of the classes, and of each part the class numbers, -1 for no label.

    Labels are numbers or names, see `plain_label` and `class_numbers`; the classes are those of the
    part `train`.

    Raises:
        UserError: no image of `train` has a label, or another part has a class that `train` lacks.
    """
    try:
        texts = {part: [plain_label(value) for value in values] for part, values in parts.items()}
    except ValueError as error:
        raise UserError(str(error)) from None
    firsts: dict[str, dict[str, str]] = {"train": {}, "others": {}}
    for part, values in texts.items():
        first = firsts["train" if part == "train" else "others"]
        for row, text in enumerate(values):
            if text is not None and text not in first:
                first[text] = f"image {row} of the {part} part"
    names, numbers = class_numbers(firsts["train"], firsts["others"], names)
    return names, {
        part: np.array([UNLABELED if v is None else numbers[v] for v in values], np.int64)
        for part, values in texts.items()
    }


def class_numbers(
    training: Mapping[str, str], others: Mapping[str, str], names: Sequence[str] | None
) -> tuple[tuple[str, ...], dict[str, int]]:
    """Returns the names of the classes, and label -> class number, -1 for a label that is none.

    Args:
        training: the labels of training images, each with the first image that has it, for messages:
            without `names` they are the classes, in ascending order, and the map is logged if it
            changes anything.
        others: those of other images.
        names: of the classes; labels that are numbers are places in it.

    Raises:
        UserError: there are no labels, or there is one of no class.
    """
    numeric = all(map(_is_number, (*training, *others)))
    present = [label for label in training if not (numeric and int(label) == UNLABELED)]
    if not present:
        raise UserError("no image has a label: give labels, or these images by --unlabeled")
    if names is None:
        if numeric:  # so that 07 is 7
            names = [str(number) for number in sorted(set(map(int, present)))]
        else:
            names = sorted(present)
        if list(names) != [str(number) for number in range(len(names))]:
            shown = ", ".join(f"{n} = {name}" for n, name in enumerate(names[:SHOWN]))
            more = f", and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
            log.info(f"{plural(len(names), 'class')}: {shown}{more}")
        classes = {name: number for number, name in enumerate(names)}
    elif numeric:
        classes = {str(number): number for number in range(len(names))}
    else:
        classes = {name: number for number, name in enumerate(names)}
    numbers = {}
    for label, first in {**others, **training}.items():
        number = classes.get(str(int(label)) if numeric else label)
        if number is None and not (numeric and int(label) == UNLABELED):
            raise UserError(
                f"{first} has the label {label!r}, which is none of the {len(names)} classes"
                f" ({', '.join(list(classes)[:SHOWN])}): give labeled training images of it, or a"
                " name for it among those of the classes"
            )
        numbers[label] = UNLABELED if number is None else number
    return tuple(names), numbers


def _is_number(text: str) -> bool:
    return text.removeprefix("-").isdecimal()
