"""How good the classifier is: error, per class, confusion, calibration; and pictures of samples."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from sgan_dist import config, losses
from sgan_dist.data.index import DatasetIndex, load_index
from sgan_dist.data.stream import read_split
from sgan_dist.distributed import all_sum, rank, together, world_size
from sgan_dist.errors import UserError
from sgan_dist.export import load_classifier

BINS = 15


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


@torch.no_grad()
def evaluate(
    network: nn.Module,
    index: DatasetIndex,
    root: str,
    split: str,
    form: losses.Form,
    device: torch.device,
    batch: int = 500,
) -> Evaluation:
    """Classifies a labeled split with `network`; each image once, whatever the world size.

    Rank r takes samples r, r + W, ...; counts and sums are added up. All ranks get the result.
    """
    classes = len(index.class_names)
    confusion = torch.zeros(classes, classes, dtype=torch.float64, device=device)
    bins = torch.zeros(3, BINS, dtype=torch.float64, device=device)  # count, confidence, correct
    nll = torch.zeros(1, dtype=torch.float64, device=device)
    dtype = next(network.parameters()).dtype
    network.eval()

    def add(images: np.ndarray, labels: np.ndarray) -> None:
        x = torch.from_numpy(images).to(device).permute(0, 3, 1, 2).to(dtype).div(127.5).sub(1)
        y = torch.from_numpy(labels).to(device)
        log_p = losses.class_logits(network(x).logits, form).log_softmax(1).double()
        confidence, guess = log_p.exp().max(1)
        confusion.view(-1).add_(
            torch.bincount(y * classes + guess, minlength=classes * classes).double()
        )
        place = (confidence * BINS).long().clamp(max=BINS - 1)
        rows = torch.stack([torch.ones_like(confidence), confidence, (guess == y).double()])
        bins.index_add_(1, place, rows)
        nll.sub_(log_p.gather(1, y[:, None]).sum())

    def whole_part() -> None:
        for images, labels, _ in read_split(root, index, split, rank(), world_size(), batch):
            assert labels is not None
            add(images, labels)

    together(whole_part)
    packed = all_sum(torch.cat([confusion.flatten(), bins.flatten(), nll])).cpu()
    confusion = packed[: classes * classes].view(classes, classes)
    counts, confidences, corrects = packed[classes * classes : -1].view(3, BINS)
    images = int(counts.sum())
    return Evaluation(
        error=1 - float(confusion.trace()) / images,
        nll=float(packed[-1]) / images,
        calibration_error=float((confidences - corrects).abs().sum()) / images,
        confusion=[[int(count) for count in row] for row in confusion],
        images=images,
    )


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
    Image.fromarray(sheet[..., 0] if channels == 1 else sheet).save(path)


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
    try:
        root = args.data or config.load(args.run_dir / "config.yaml").data.root
        network, about = load_classifier(args.run_dir / "classifier.safetensors")
        index = load_index(root)
        if list(index.class_names) != about["class_names"]:
            raise UserError(
                f"{root} has the classes {', '.join(index.class_names)}, and the classifier knows"
                f" {', '.join(about['class_names'])}: name its own dataset with --data"
            )
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        found = evaluate(network.to(device), index, root, args.split, about["form"], device)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if args.json:
        print(json.dumps(to_json(found, index.class_names)))
    else:
        print(f"{args.run_dir}, {args.split} split")
        print(found.table(index.class_names))
    return 0
