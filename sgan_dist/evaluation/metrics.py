"""How good a classifier is on a labeled split: error, per class, confusion, calibration, mistakes."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sgan_dist.config import Config, load
from sgan_dist.data.index import DatasetIndex, load_index
from sgan_dist.data.remote.cache import Storage
from sgan_dist.data.remote.urls import redact_url
from sgan_dist.data.stream import open_storage, read_split
from sgan_dist.errors import UserError
from sgan_dist.evaluation.classifier import Classifier, load_classifier
from sgan_dist.parallel import collectives
from sgan_dist.parallel.agreement import catch, reduce_objects, run_on_all, synchronize
from sgan_dist.parallel.ddp import AccelerateBackend

BINS = 15
BATCH = 500
MISTAKES = 24
TABLE_CLASSES = 50  # more are not listed in a terminal


@dataclass(frozen=True)
class Mistake:
    """An image, uint8 (H, W, C), of class `label` that was taken for class `guess`."""

    confidence: float
    label: int
    guess: int
    image: NDArray[np.uint8]


@dataclass(frozen=True)
class Metrics:
    """Metrics over a whole split. `confusion[i][j]`: images of class i that were taken for j."""

    error: float
    """fraction of the images"""
    nll: float
    """mean -log p(label | image, real), nats"""
    calibration_error: float
    """expected calibration error over 15 equal bins of confidence (Guo et al. 2017)"""
    confusion: list[list[int]]
    images: int
    bins: list[tuple[int, float, float]]
    """number of images, mean confidence and accuracy of each bin"""
    class_names: tuple[str, ...]

    def per_class_error(self) -> list[float | None]:
        """Fraction of each class's images that were taken for another class; None without images."""
        rows = enumerate(self.confusion)
        return [1 - row[i] / sum(row) if any(row) else None for i, row in rows]

    def to_json(self) -> dict[str, Any]:
        """The metrics as plain JSON values."""
        values = dataclasses.asdict(self)
        names, _ = values.pop("class_names"), values.pop("bins")
        return values | {"per_class_error": dict(zip(names, self.per_class_error(), strict=True))}

    def table(self) -> str:
        """Aligned lines for a terminal."""
        lines = [
            f"images             {self.images}",
            f"error              {self.error:.2%}",
            f"calibration error  {self.calibration_error:.2%}",
            f"nll                {self.nll:.4f}",
        ]
        width = max(map(len, self.class_names))
        errors = zip(self.class_names, self.per_class_error(), self.confusion, strict=True)
        rows = [(name, error, sum(row)) for name, error, row in errors]
        if len(rows) > TABLE_CLASSES:
            worst = sorted(rows, key=lambda row: -1.0 if row[1] is None else row[1], reverse=True)
            lines.append(f"of {len(rows)} classes those with the largest errors:")
            rows = worst[:TABLE_CLASSES]
        for name, error, images in rows:
            shown = "n/a" if error is None else f"{error:.2%}"
            lines.append(f"  {name:>{width}}  {shown:>7}  of {images}")
        return "\n".join(lines)


@dataclass(frozen=True)
class Counts:
    """Sums over classified images, and the most confident mistakes among them."""

    confusion: NDArray[np.float64]
    """(N, N), as `Metrics.confusion`"""
    bins: NDArray[np.float64]
    """(15, 3): number of images, sum of confidences, number of correct ones"""
    nll: float
    mistakes: list[Mistake]

    @classmethod
    def none(cls, classes: int) -> Counts:
        """Those of no image."""
        return cls(np.zeros((classes, classes)), np.zeros((BINS, 3)), 0.0, [])

    def __add__(self, other: Counts) -> Counts:
        mistakes = _most_confident([*self.mistakes, *other.mistakes])
        confusion, bins = self.confusion + other.confusion, self.bins + other.bins
        return Counts(confusion, bins, self.nll + other.nll, mistakes)

    def metrics(self, class_names: tuple[str, ...]) -> Metrics:
        """The sums divided by the number of images."""
        images = int(self.confusion.sum())
        gap = float(np.abs(self.bins[:, 1] - self.bins[:, 2]).sum())
        return Metrics(
            error=1 - float(self.confusion.trace()) / images,
            nll=self.nll / images,
            calibration_error=gap / images,
            confusion=self.confusion.astype(int).tolist(),
            images=images,
            bins=[(int(n), a / max(n, 1), b / max(n, 1)) for n, a, b in self.bins.tolist()],
            class_names=class_names,
        )


def _most_confident(mistakes: Iterable[Mistake]) -> list[Mistake]:
    return sorted(mistakes, key=lambda mistake: -mistake.confidence)[:MISTAKES]


@torch.no_grad()
def count_predictions(
    classifiers: Sequence[Classifier],
    index: DatasetIndex,
    storage: Storage,
    split: str,
    rank: int = 0,
    world_size: int = 1,
) -> list[Counts]:
    """Counts of each classifier on the shards of a labeled split that `rank` reads, in one pass."""
    counts = [Counts.none(len(index.class_names)) for _ in classifiers]
    training = [classifier.network.training for classifier in classifiers]
    for classifier in classifiers:
        classifier.network.eval()
    for images, labels, _ in read_split(storage, index, split, rank, world_size, BATCH):
        assert labels is not None
        counts = [
            total + _counts_of(classifier, images, labels)
            for total, classifier in zip(counts, classifiers, strict=True)
        ]
    for classifier, mode in zip(classifiers, training, strict=True):
        classifier.network.train(mode)
    return counts


def _counts_of(
    classifier: Classifier, images: NDArray[np.uint8], labels: NDArray[np.int64]
) -> Counts:
    """Those of one batch: images uint8 (n, H, W, C), labels int64 (n,)."""
    log_p = classifier.log_probabilities(torch.from_numpy(images)).double().cpu().numpy()
    guesses, confidence = log_p.argmax(1), np.exp(log_p.max(1))
    counts = Counts.none(log_p.shape[1])
    np.add.at(counts.confusion, (labels, guesses), 1)
    rows = np.minimum((confidence * BINS).astype(np.int64), BINS - 1)
    np.add.at(counts.bins, rows, np.stack([np.ones(len(rows)), confidence, guesses == labels], 1))
    wrong = np.flatnonzero(guesses != labels)
    mistakes = [
        # a view would keep the whole batch in memory
        Mistake(float(confidence[i]), int(labels[i]), int(guesses[i]), images[i].copy())
        for i in wrong[np.argsort(-confidence[wrong])[:MISTAKES]]
    ]
    nll = -float(log_p[np.arange(len(labels)), labels].sum())
    return Counts(counts.confusion, counts.bins, nll, mistakes)


def count_split(
    classifiers: Sequence[Classifier],
    index: DatasetIndex,
    storage: Storage,
    split: str,
    mistakes: bool = False,
) -> list[Counts]:
    """Classifies each image of a labeled split once by each classifier; all ranks get all counts.

    Each shard is read by one rank. Only with `mistakes` are these gathered. A collective: all ranks
    must call it, with the networks on the device of their process group.

    Raises:
        UserError: on every rank, where one cannot read the split.
    """
    rank, world_size = collectives.rank(), collectives.world_size()
    own, error = catch(
        lambda: count_predictions(classifiers, index, storage, split, rank, world_size)
    )
    own = own or [Counts.none(len(index.class_names)) for _ in classifiers]
    failed = [error is not None]
    flat = np.stack(
        [np.concatenate([c.confusion.ravel(), c.bins.ravel(), [c.nll], failed]) for c in own]
    )
    sums = collectives.all_sum(torch.from_numpy(flat).to(classifiers[0].device)).cpu().numpy()
    if sums[0, -1]:
        synchronize(error)
    gathered = reduce_objects([c.mistakes for c in own], list) if mistakes else []
    totals = []
    for number, (counts, row) in enumerate(zip(own, sums[:, :-1], strict=True)):
        confusion, bins, nll = np.split(row, [counts.confusion.size, row.size - 1])
        if confusion.sum() == 0:
            raise UserError(
                f"all images of the {split} split are damaged, so there is nothing to evaluate: copy"
                " its shards again, or index the dataset again"
            )
        of_all = _most_confident(m for of_rank in gathered for m in of_rank[number])
        square = confusion.reshape(counts.confusion.shape)
        totals.append(Counts(square, bins.reshape(BINS, 3), float(nll[0]), of_all))
    return totals


def evaluate(classifier: Classifier, index: DatasetIndex, storage: Storage, split: str) -> Metrics:
    """The metrics of one classifier. A collective, and raises, as `count_split`."""
    return count_split([classifier], index, storage, split)[0].metrics(index.class_names)


def evaluate_run(
    run: str | os.PathLike[str], split: str = "test", data: str | None = None
) -> Metrics:
    """The metrics of a finished run's classifier on a labeled split.

    `data` is another root of the same dataset. Under a launcher the ranks share the work.

    Raises:
        UserError: the run has no classifier, or the dataset is missing or has other classes.
    """
    run = Path(run)
    config = load(run / "config.yaml", data)
    backend = AccelerateBackend(config)
    classifier, index = run_on_all(lambda: _classifier_and_index(run, config))
    classifier.network.to(backend.device)
    with open_storage(config) as storage:
        return evaluate(classifier, index, storage, split)


def _classifier_and_index(run: Path, config: Config) -> tuple[Classifier, DatasetIndex]:
    classifier = load_classifier(run / "classifier.safetensors")
    index = load_index(config.data.root, config.remote)
    if index.class_names != classifier.class_names:
        raise UserError(
            f"{redact_url(config.data.root)} has the classes {', '.join(index.class_names)}, and the"
            f" classifier has {', '.join(classifier.class_names)}: give its own dataset with --data"
        )
    return classifier, index
