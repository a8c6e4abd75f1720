"""How good a classifier is on a labeled split: error, per class, confusion, calibration, mistakes."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sgan_dist.config import Config, load
from sgan_dist.data.index import DatasetIndex, load_index
from sgan_dist.data.remote.cache import Storage
from sgan_dist.data.stream import open_storage, read_split
from sgan_dist.errors import UserError
from sgan_dist.evaluation.classifier import Classifier, load_classifier
from sgan_dist.parallel import collectives
from sgan_dist.parallel.agreement import run_on_all
from sgan_dist.parallel.ddp import AccelerateBackend

BINS = 15
BATCH = 500
MISTAKES = 24


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

    def per_class_error(self) -> list[float]:
        """Fraction of each class's images that were taken for another class."""
        return [1 - row[i] / max(sum(row), 1) for i, row in enumerate(self.confusion)]

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
        rows = zip(self.class_names, self.per_class_error(), self.confusion, strict=True)
        lines += [f"  {name:>{width}}  {error:7.2%}  of {sum(row)}" for name, error, row in rows]
        return "\n".join(lines)


@dataclass(frozen=True)
class Counts:
    """Sums over the images that one process classified, and its most confident mistakes."""

    confusion: NDArray[np.float64]
    """(N, N), as `Metrics.confusion`"""
    bins: NDArray[np.float64]
    """(15, 3): number of images, sum of confidences, number of correct ones"""
    nll: float
    mistakes: list[Mistake]

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


@torch.no_grad()
def count_predictions(
    classifier: Classifier,
    index: DatasetIndex,
    storage: Storage,
    split: str,
    rank: int = 0,
    world_size: int = 1,
) -> Counts:
    """Classifies samples `rank`, `rank + world_size`, ... of a labeled split, in this process only."""
    classes = len(index.class_names)
    confusion, bins, nll = np.zeros((classes, classes)), np.zeros((BINS, 3)), 0.0
    mistakes: list[Mistake] = []
    training = classifier.network.training
    classifier.network.eval()
    for images, labels, _ in read_split(storage, index, split, rank, world_size, BATCH):
        assert labels is not None
        log_p = classifier.log_probabilities(torch.from_numpy(images)).double().cpu().numpy()
        guesses = log_p.argmax(1)
        confidence = np.exp(log_p.max(1))
        nll -= float(log_p[np.arange(len(labels)), labels].sum())
        np.add.at(confusion, (labels, guesses), 1)
        rows = np.minimum((confidence * BINS).astype(np.int64), BINS - 1)
        np.add.at(bins, rows, np.stack([np.ones(len(rows)), confidence, guesses == labels], 1))
        wrong = np.flatnonzero(guesses != labels)
        for i in wrong[np.argsort(-confidence[wrong])[:MISTAKES]]:
            image = images[i].copy()  # a view would keep the whole batch in memory
            mistakes.append(Mistake(float(confidence[i]), int(labels[i]), int(guesses[i]), image))
        mistakes = sorted(mistakes, key=lambda m: -m.confidence)[:MISTAKES]
    classifier.network.train(training)
    return Counts(confusion, bins, nll, mistakes)


def evaluate(classifier: Classifier, index: DatasetIndex, storage: Storage, split: str) -> Metrics:
    """Classifies each image of a labeled split once; ranks share the work and all get the result.

    A collective: all ranks must call it, with the network on the device of their process group.

    Raises:
        UserError: on every rank, where one cannot read the split.
    """
    rank, world_size = collectives.rank(), collectives.world_size()
    counts = run_on_all(
        lambda: count_predictions(classifier, index, storage, split, rank, world_size)
    )
    own = np.concatenate([counts.confusion.ravel(), counts.bins.ravel(), [counts.nll]])
    sums = collectives.all_sum(torch.from_numpy(own).to(classifier.device)).cpu().numpy()
    confusion, bins, nll = np.split(sums, [counts.confusion.size, sums.size - 1])
    if confusion.sum() == 0:
        raise UserError(
            f"all images of the {split} split are damaged, so there is nothing to evaluate: copy its"
            " shards again, or index the dataset again"
        )
    return Counts(
        confusion.reshape(counts.confusion.shape), bins.reshape(BINS, 3), float(nll[0]), []
    ).metrics(index.class_names)


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
            f"{config.data.root} has the classes {', '.join(index.class_names)}, and the classifier"
            f" has {', '.join(classifier.class_names)}: give its own dataset with --data"
        )
    return classifier, index
