"""How good the classifier is: error, per class, confusion, calibration; and pictures of samples."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from sgan_dist import config, distributed, launcher, losses
from sgan_dist.backend import AccelerateBackend
from sgan_dist.data.index import DatasetIndex, load_index
from sgan_dist.data.storage import Storage
from sgan_dist.data.stream import open_storage, read_split, transport
from sgan_dist.distributed import all_sum, is_rank_zero, together, world_size
from sgan_dist.errors import UserError
from sgan_dist.export import load_classifier

BINS = 15
BATCH = 500
MISTAKES = 24


@dataclass(frozen=True)
class Mistake:
    """An image, uint8 (H, W, C), of class `label` that was taken for `guess`."""

    confidence: float
    label: int
    guess: int
    image: NDArray[np.uint8]


@dataclass(frozen=True)
class Evaluation:
    """Figures over a whole split. `confusion[i][j]`: images of class i that were taken for j."""

    error: float
    nll: float
    """mean -log p(label | image, real), nats"""
    calibration_error: float
    """expected calibration error over 15 equal bins of confidence (Guo et al. 2017)"""
    confusion: list[list[int]]
    images: int
    bins: list[tuple[int, float, float]]
    """images, mean confidence and accuracy of each bin"""

    def per_class_error(self) -> list[float]:
        return [1 - row[i] / max(sum(row), 1) for i, row in enumerate(self.confusion)]

    def table(self, class_names: tuple[str, ...]) -> str:
        """Aligned lines for a terminal."""
        wide = max(len(name) for name in class_names)
        lines = [
            f"images             {self.images}",
            f"error              {self.error:.2%}",
            f"calibration error  {self.calibration_error:.2%}",
            f"nll                {self.nll:.4f}",
        ]
        for name, wrong, row in zip(
            class_names, self.per_class_error(), self.confusion, strict=True
        ):
            lines.append(f"  {name:>{wide}}  {wrong:7.2%}  of {sum(row)}")
        return "\n".join(lines)


@dataclass(frozen=True)
class Examination:
    """Sums over the images that one process looked at, and its most confident mistakes."""

    confusion: NDArray[np.float64]
    bins: NDArray[np.float64]
    """(15, 3): images, sum of confidence, correct ones"""
    nll: float
    mistakes: list[Mistake]

    def evaluation(self) -> Evaluation:
        images = int(self.confusion.sum())
        gap = float(np.abs(self.bins[:, 1] - self.bins[:, 2]).sum())
        return Evaluation(
            error=1 - float(self.confusion.trace()) / images,
            nll=self.nll / images,
            calibration_error=gap / images,
            confusion=self.confusion.astype(int).tolist(),
            images=images,
            bins=[(int(n), a / max(n, 1), b / max(n, 1)) for n, a, b in self.bins.tolist()],
        )


@torch.no_grad()
def examine(
    network: nn.Module,
    index: DatasetIndex,
    storage: Storage,
    split: str,
    form: losses.Form,
    rank: int = 0,
    world_size: int = 1,
) -> Examination:
    """Classifies samples `rank`, `rank + world_size`, ... of a labeled split in this process alone."""
    classes = len(index.class_names)
    confusion, bins, nll = np.zeros((classes, classes)), np.zeros((BINS, 3)), 0.0
    mistakes: list[Mistake] = []
    weight = next(network.parameters())
    training = network.training
    network.eval()
    for images, labels, _ in read_split(storage, index, split, rank, world_size, BATCH):
        assert labels is not None
        x = torch.from_numpy(images).to(weight.device).permute(0, 3, 1, 2).to(weight.dtype)
        logits = losses.class_logits(network(x.div(127.5).sub(1)).logits, form)
        log_p = logits.log_softmax(1).double().cpu().numpy()
        guesses = log_p.argmax(1)
        confidence = np.exp(log_p.max(1))
        nll -= float(log_p[np.arange(len(labels)), labels].sum())
        np.add.at(confusion, (labels, guesses), 1)
        place = np.minimum((confidence * BINS).astype(np.int64), BINS - 1)
        np.add.at(bins, place, np.stack([np.ones(len(x)), confidence, guesses == labels], 1))
        wrong = np.flatnonzero(guesses != labels)
        for i in wrong[np.argsort(-confidence[wrong])[:MISTAKES]]:
            pixels = images[i].copy()  # a view would hold the whole batch
            mistakes.append(Mistake(float(confidence[i]), int(labels[i]), int(guesses[i]), pixels))
        mistakes = sorted(mistakes, key=lambda m: -m.confidence)[:MISTAKES]
    network.train(training)
    return Examination(confusion, bins, nll, mistakes)


def evaluate(
    network: nn.Module,
    index: DatasetIndex,
    storage: Storage,
    split: str,
    form: losses.Form,
    device: torch.device,
) -> Evaluation:
    """Classifies a labeled split, each image once, whatever the world size; all ranks get the result.

    `device` is where sums are exchanged: the network's.
    """
    own = together(
        lambda: examine(network, index, storage, split, form, distributed.rank(), world_size())
    )
    sums = np.concatenate([own.confusion.ravel(), own.bins.ravel(), [own.nll]])
    total = all_sum(torch.from_numpy(sums).to(device)).cpu().numpy()
    classes = len(index.class_names)
    confusion = total[: classes**2].reshape(classes, classes)
    bins = total[classes**2 : -1].reshape(BINS, 3)
    return Examination(confusion, bins, float(total[-1]), []).evaluation()


def save_grid(images: Tensor, path: Path, columns: int = 8) -> None:
    """Writes images (n, C, H, W) in [-1, 1] as one PNG of `columns` a row."""
    pixels = images.float().add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8).cpu().numpy()
    n, channels, height, width = pixels.shape
    rows = -(-n // columns)
    sheet = np.zeros((rows * height, columns * width, channels), np.uint8)
    for i, image in enumerate(pixels):
        y, x = i // columns * height, i % columns * width
        sheet[y : y + height, x : x + width] = image.transpose(1, 2, 0)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    Image.fromarray(sheet[..., 0] if channels == 1 else sheet).save(partial, format="png")
    partial.replace(path)


def to_json(evaluation: Evaluation, class_names: tuple[str, ...]) -> dict[str, Any]:
    """The figures as plain JSON values."""
    return {
        "error": evaluation.error,
        "nll": evaluation.nll,
        "calibration_error": evaluation.calibration_error,
        "images": evaluation.images,
        "per_class_error": dict(zip(class_names, evaluation.per_class_error(), strict=True)),
        "confusion": evaluation.confusion,
    }


def main(argv: Sequence[str]) -> int:
    """launch/evaluate.py: evaluates a finished run's classifier; 0, or 2 for a user's error."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--split", default="test", choices=["labeled", "validation", "test"])
    parser.add_argument("--data", help="the prepared dataset; by default the run's own")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    args = parser.parse_args(argv)
    launcher.adopt_slurm(os.environ)
    zero = is_rank_zero()
    try:
        backend = AccelerateBackend(config.Config())
        data = config.load(args.run_dir / "config.yaml").data
        data = dataclasses.replace(data, root=args.data or data.root)
        network, about = load_classifier(args.run_dir / "classifier.safetensors")
        index = load_index(data.root, transport(data))
        if list(index.class_names) != about["class_names"]:
            raise UserError(
                f"{data.root} has the classes {', '.join(index.class_names)}, and the classifier knows"
                f" {', '.join(about['class_names'])}: name its own dataset with --data"
            )
        network.to(backend.device)
        with open_storage(data) as storage:
            found = evaluate(network, index, storage, args.split, about["form"], backend.device)
        backend.close()
    except UserError as error:
        if zero:
            print(f"error: {error}", file=sys.stderr)
        return 2
    if zero and args.json:
        print(json.dumps(to_json(found, index.class_names)))
    elif zero:
        print(f"{args.run_dir}, {args.split} split")
        print(found.table(index.class_names))
    return 0
