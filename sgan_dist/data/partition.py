"""Which images of a source are labeled, unlabeled, for validation and for the test."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sgan_dist.data.order import Int64s, permutation
from sgan_dist.data.sources import Source
from sgan_dist.errors import UserError


@dataclass(frozen=True)
class Part:
    """One split in memory: images uint8 (n, H, W, C), labels int64 (n,) or None."""

    images: NDArray[np.uint8]
    labels: Int64s | None


def split_source(
    source: Source, labels_per_class: int, label_seed: int, validation: int | None
) -> dict[str, Part]:
    """The four parts by name, each in a keyed order, so that no part's order tells of classes.

    `prepare` explains the arguments. Raises UserError where the source has too few images.
    """
    images, labels = source.train_images, source.train_labels
    total = len(images)
    train = np.arange(total)
    if source.test_images is None or source.test_labels is None:
        chosen = _stratified(labels, total // 5, "test")
        test = Part(images[chosen], labels[chosen])
        train = np.setdiff1d(train, chosen)
        default = total // 10
    else:
        storage = permutation(len(source.test_images), "storage", "test")
        test = Part(source.test_images[storage], source.test_labels[storage])
        default = min(5000, total // 12)
    if validation is None:
        validation = max(1, default)
    if not 1 <= validation < len(train):
        raise UserError(
            f"validation is {validation}: choose from 1 to {len(train) - 1}, "
            f"as {source.name} has {len(train)} images to train on"
        )
    held_out = train[_stratified(labels[train], validation, "validation")]
    train = np.setdiff1d(train, held_out)
    unlabeled = train[permutation(len(train), "storage", "unlabeled")]
    labeled = _draw_labels(source, train, labels_per_class, label_seed)
    return {
        "labeled": Part(images[labeled], labels[labeled]),
        "unlabeled": Part(images[unlabeled], None),
        "validation": Part(images[held_out], labels[held_out]),
        "test": test,
    }


def _stratified(labels: Int64s, count: int, name: str) -> Int64s:
    """`count` positions in `labels`, every class by its share; decided by no seed, in keyed order.

    Shares are rounded by largest remainder.
    """
    histogram = np.bincount(labels)
    share, remainder = np.divmod(histogram * count, len(labels))
    most = np.argsort(-remainder, kind="stable")[: count - int(share.sum())]
    share[most] += 1
    chosen = np.concatenate(
        [
            np.flatnonzero(labels == label)[permutation(histogram[label], name, label)[:few]]
            for label, few in enumerate(share)
        ]
    )
    return chosen[permutation(len(chosen), "storage", name)]


def _draw_labels(source: Source, train: Int64s, per_class: int, seed: int) -> Int64s:
    """`per_class` images of every class out of `train`: fewer labels are a subset of more."""
    if per_class < 1:
        raise UserError(f"labels per class is {per_class}, and must be at least 1")
    drawn = []
    for label, name in enumerate(source.class_names):
        members = train[source.train_labels[train] == label]
        if len(members) < per_class:
            raise UserError(
                f"class {name} of {source.name} has {len(members)} training images left, fewer "
                f"than {per_class} labels per class: ask for fewer labels or less validation"
            )
        drawn.append(members[permutation(len(members), "labels", seed, label)[:per_class]])
    labeled = np.concatenate(drawn)
    return labeled[permutation(len(labeled), "storage", "labeled", seed)]


def content_hash(source: Source) -> str:
    """sha256 of the source's images and labels, and of nothing else."""
    content = hashlib.sha256()
    for array in (
        source.train_images,
        source.train_labels,
        source.test_images,
        source.test_labels,
    ):
        if array is not None:
            content.update(str(array.shape).encode())
            content.update(np.ascontiguousarray(array).data)
    return content.hexdigest()
