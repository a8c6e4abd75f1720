"""Sources of `prepare`: one file a source, each with a function `read` that gives a `Source`."""

from __future__ import annotations

import hashlib
import importlib
from dataclasses import replace
from pathlib import Path

import numpy as np

from sgan_dist.data.order import Int64s
from sgan_dist.data.prepare.sources.source import Columns, Encoded, Part, Source
from sgan_dist.data.records import UNLABELED
from sgan_dist.errors import UserError

NAMED_SOURCES = ("digits", "mnist", "fashion-mnist")
# kind -> module, and what stands after the colon
KINDS = {
    "folder": ("folder", "DIR"),
    "csv": ("table", "FILE"),
    "jsonl": ("table", "FILE"),
    "parquet": ("parquet", "DIR"),
    "arrow": ("parquet", "DIR"),
    "hub": ("hub", "NAME"),
    "npz": ("npz", "FILE"),
    "idx": ("idx", "DIR"),
    "cifar": ("cifar", "DIR"),
    "svhn": ("svhn", "DIR"),
    "stl10": ("stl10", "DIR"),
    "tars": ("tars", "PATTERN"),
}
CHOICES = ", ".join([*NAMED_SOURCES, *(f"{kind}:{place}" for kind, (_, place) in KINDS.items())])


def source_name(spec: str) -> str:
    """Returns the `Source.name` of a spec; reads nothing. Raises UserError for an unknown spec."""
    kind, _, place = spec.partition(":")
    if spec not in NAMED_SOURCES and not (kind in KINDS and place):
        hint = f"; for a folder of images: folder:{spec}" if Path(spec).is_dir() and spec else ""
        raise UserError(f"unknown source {spec!r}: use one of {CHOICES}{hint}")
    # the base name only: an index must not show private paths
    return f"{kind}:{Path(place).resolve().name}" if place else spec


def load_source(spec: str, columns: Columns = Columns()) -> Source:  # noqa: B008 - frozen
    """Reads a source, `digits` or `KIND:PLACE`; encoded images are not decoded yet.

    Raises UserError for an unknown spec, and if the source is damaged or incomplete.
    """
    name = source_name(spec)
    kind, _, place = spec.partition(":")
    module = "known" if spec in NAMED_SOURCES else KINDS[kind][0]
    read = importlib.import_module(f"sgan_dist.data.prepare.sources.{module}").read
    source: Source = read(place or spec, columns)
    return replace(source, name=name)


def with_parts(source: Source, test: Source | None, unlabeled: Source | None) -> Source:
    """Returns the source with test images, or further unlabeled ones, of others.

    Raises:
        UserError: it has such images itself, or the test images have further classes.
    """
    if test is not None:
        if source.test is not None:
            raise UserError(f"{source.name} has test images of its own: leave --test out")
        labels = _renumbered(test.train.labels, test.class_names, source.class_names)
        lost = (labels == UNLABELED) & (test.train.labels != UNLABELED)
        if lost.any():
            name = test.class_names[int(test.train.labels[lost.argmax()])]
            raise UserError(
                f"{test.name} has images of the class {name}, which {source.name} lacks: its classes"
                f" are {', '.join(source.class_names[:20])}"
            )
        source = replace(source, test=replace(test.train, labels=labels, known=labels))
    if unlabeled is not None:
        if source.unlabeled is not None:
            raise UserError(f"{source.name} has unlabeled images of its own: leave --unlabeled out")
        part = unlabeled.train
        known = _renumbered(part.known, unlabeled.class_names, source.class_names)
        source = replace(source, unlabeled=replace(part, labels=known, known=known))
    return source


def _renumbered(labels: Int64s, names: tuple[str, ...], to: tuple[str, ...]) -> Int64s:
    """Returns the numbers that the same names have in `to`, -1 for those that are not in it."""
    numbers = {name: number for number, name in enumerate(to)}
    table = np.array([*(numbers.get(name, UNLABELED) for name in names), UNLABELED], np.int64)
    return table[labels]  # the last for -1


def content_hash(source: Source) -> str:
    """Returns the sha256 of what the source's images and labels are, and of nothing else."""
    content = hashlib.sha256()
    for part in (source.train, source.test, source.validation, source.unlabeled):
        if part is not None:
            _add(content, part)
    return content.hexdigest()


def _add(content: hashlib._Hash, part: Part) -> None:
    if isinstance(part.images, Encoded):
        content.update(part.images.content.encode())
    else:
        content.update(str(part.images.shape).encode())
        for start in range(0, len(part.images), 8192):  # a copy of all may not fit
            content.update(np.ascontiguousarray(part.images[start : start + 8192]).data)
    content.update(str(part.labels.shape).encode())
    content.update(np.ascontiguousarray(part.labels).data)
