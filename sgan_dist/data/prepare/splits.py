"""Which images of a source are labeled, unlabeled, validation and test images: keyed, and by class.

What is drawn from a class depends on the images of that class and their order, on nothing else: so a
set gives the same splits from any source. Validation and test are the same for every choice of labels,
but for a list: what it names is never held out.
"""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sgan_dist.data.order import Int64s, permutation
from sgan_dist.data.prepare.decoding import Pool
from sgan_dist.data.prepare.sources.source import Part, Source
from sgan_dist.data.records import UNLABELED
from sgan_dist.errors import UserError


@dataclass(frozen=True)
class Labels:
    """Which images of the training part become labeled ones; of the choices at most one is given.

    per_class: so many of each class. fraction: this part of each class, at least one image. file: a
    CSV file of names of images, and labels if they are not those of the source. None of these: all
    that have a label, where only some have one, else 10 of each class. `seed` draws them.
    """

    per_class: int | None = None
    fraction: float | None = None
    file: Path | None = None
    seed: int = 0

    def describe(self, source: Source) -> str:
        """Returns the choice in words."""
        per_class = self.resolved(source)
        if self.file is not None:
            content = hashlib.sha256(repr(read_lines(self.file)).encode()).hexdigest()
            return f"labels of {self.file.name} (content {content[:12]})"
        if self.fraction is not None:
            return f"{self.fraction:g} of the labels, label seed {self.seed}"
        if per_class is None:
            return "all labels"
        return f"{per_class} labels per class, label seed {self.seed}"

    def resolved(self, source: Source) -> int | None:
        """Returns the labels of each class, None for another choice."""
        if self.fraction is not None or self.file is not None or self.per_class is not None:
            return self.per_class
        return None if is_partly_labeled(source.train) else 10


@dataclass(frozen=True)
class Rows:
    """The images of a split: rows of a pool, in the order in which they are written."""

    pool: Pool
    rows: Int64s
    labels: Int64s | None


def is_partly_labeled(part: Part) -> bool:
    """Returns whether some images have a label and others none."""
    return bool((part.labels == UNLABELED).any())


def held_out(source: Source, validation: int | None) -> int | None:
    """Returns how many training images become validation images, None if there is a part of them.

    Without a number: a tenth of the labeled images of a source without a test part, else a twelfth, up
    to 5,000.
    """
    if source.validation is not None:
        if validation is not None:
            raise UserError(
                f"{source.name} has validation images of its own: leave the number of them out"
            )
        return None
    if validation is not None:
        return validation
    labeled = int((source.train.labels != UNLABELED).sum())
    return max(1, labeled // 10 if source.test is None else min(5000, labeled // 12))


def split(
    source: Source, pools: Mapping[str, Pool], labels: Labels, validation: int | None
) -> dict[str, Rows]:
    """Returns the four splits, each in a keyed order.

    Raises:
        UserError: there are too few images with labels.
    """
    pool = pools["train"]
    train, classes = pool.good, pool.labels.copy()
    listed = np.empty(0, np.int64)
    if labels.file is not None:
        listed, given = _read_list(labels.file, source)
        classes[listed] = given
    # unlabeled images cannot be evaluated on, and listed ones are wanted as labeled ones
    open_rows = np.setdiff1d(train[classes[train] != UNLABELED], listed)
    if "test" in pools:
        test = _whole(pools["test"], "test")
    else:
        count = len(open_rows) // 5
        chosen = open_rows[_stratified(classes[open_rows], count, "test")]
        test = Rows(pool, chosen, classes[chosen])
        train, open_rows = np.setdiff1d(train, chosen), np.setdiff1d(open_rows, chosen)
    if validation is None:
        valid = _whole(pools["validation"], "validation")
    else:
        if not 1 <= validation < max(len(open_rows), 2):
            raise UserError(
                f"validation is {validation}: choose from 1 to {max(len(open_rows) - 1, 1)}, as"
                f" {source.name} has {len(open_rows)} images with labels to train on"
            )
        chosen = open_rows[_stratified(classes[open_rows], validation, "validation")]
        valid = Rows(pool, chosen, classes[chosen])
        train, open_rows = np.setdiff1d(train, chosen), np.setdiff1d(open_rows, chosen)
    for name, rows in (("test", test), ("validation", valid)):
        if not len(rows.rows):
            raise UserError(f"{source.name} has too few images with labels for a {name} split")
    if labels.file is not None:
        labeled = np.intersect1d(listed, train)
    else:
        labeled = _draw(source, classes, open_rows, labels)
    if not len(labeled):
        raise UserError(f"{source.name} has no labeled images left: choose less validation")
    labeled = labeled[permutation(len(labeled), "storage", "labeled", labels.seed)]
    unlabeled = train[permutation(len(train), "storage", "unlabeled")]
    return {
        "labeled": Rows(pool, labeled, classes[labeled]),
        "unlabeled": Rows(pool, unlabeled, None),
        "validation": valid,
        "test": test,
    }


def _whole(pool: Pool, name: str) -> Rows:
    rows = pool.good[pool.labels[pool.good] != UNLABELED]
    rows = rows[permutation(len(rows), "storage", name)]
    return Rows(pool, rows, pool.labels[rows])


def _by_class(labels: Int64s) -> list[Int64s]:
    """Returns the positions of each class, ascending."""
    order = np.argsort(labels, kind="stable")
    return np.split(order, np.cumsum(np.bincount(labels))[:-1])


def _stratified(labels: Int64s, count: int, name: str) -> Int64s:
    """Returns `count` positions in `labels`, in a keyed order, the same for every seed.

    Each class gets its share of them, rounded by the largest remainder method.
    """
    if not len(labels):
        return labels
    members = _by_class(labels)
    share, remainder = np.divmod(np.bincount(labels) * count, len(labels))
    rounded_up = np.argsort(-remainder, kind="stable")[: count - int(share.sum())]
    share[rounded_up] += 1
    chosen = np.concatenate(
        [
            rows[permutation(len(rows), name, label)[:number]]
            for label, (rows, number) in enumerate(zip(members, share, strict=True))
        ]
    )
    return chosen[permutation(len(chosen), "storage", name)]


def _draw(source: Source, classes: Int64s, candidates: Int64s, labels: Labels) -> Int64s:
    """Returns the labeled images among the candidates; fewer labels are a subset of more."""
    per_class = labels.resolved(source)
    if per_class is not None and per_class < 1:
        raise UserError(f"labels per class is {per_class}, and must be at least 1")
    if labels.fraction is not None and not 0 < labels.fraction <= 1:
        raise UserError(f"the fraction of labels is {labels.fraction:g}: choose from above 0 to 1")
    members = _by_class(classes[candidates])
    members += [np.empty(0, np.int64)] * (len(source.class_names) - len(members))
    drawn = []
    for label, (name, rows) in enumerate(zip(source.class_names, members, strict=True)):
        count = len(rows)
        if labels.fraction is not None:
            count = min(len(rows), max(1, round(labels.fraction * len(rows))))
        elif per_class is not None:
            count = per_class
        if len(rows) < count:
            raise UserError(
                f"class {name} of {source.name} has {len(rows)} training images left, fewer"
                f" than {per_class} labels per class: ask for fewer labels or less validation"
            )
        drawn.append(candidates[rows[permutation(len(rows), "labels", labels.seed, label)[:count]]])
    return np.concatenate(drawn)


def _read_list(path: Path, source: Source) -> tuple[Int64s, Int64s]:
    """Returns the rows that a file names, ascending, and their classes."""
    lines = [line for line in read_lines(path) if line]
    part = source.train
    names = part.names if part.names is not None else [str(row) for row in range(len(part.labels))]
    places = {name: row for row, name in enumerate(names)}
    numbers = {name: number for number, name in enumerate(source.class_names)}
    classes: dict[int, int] = {}
    for line in lines:
        row = places.get(line[0])
        if row is None:
            raise UserError(
                f"{path} names the image {line[0]!r}, which is not in the training part of"
                f" {source.name}; its images have names like {names[0]!r}"
            )
        label = numbers.get(line[1].strip()) if len(line) > 1 else int(part.known[row])
        if label is None or label == UNLABELED:
            raise UserError(
                f"{path}: the image {line[0]!r} has no label of a known class: write NAME,LABEL"
                f" with one of {', '.join(source.class_names[:20])}"
            )
        classes[row] = label
    rows = np.array(sorted(classes), np.int64)
    return rows, np.array([classes[row] for row in rows.tolist()], np.int64)


def read_lines(path: Path) -> Sequence[list[str]]:
    """Returns the fields of the lines of a CSV file."""
    try:
        with open(path, newline="", encoding="utf-8") as file:
            return list(csv.reader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(
            f"cannot read {path}: {reason}; give a CSV file of names of images"
        ) from None
