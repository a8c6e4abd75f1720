"""Shows what a prepared dataset holds: counts, classes, images of each class, and what was left out."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from numpy.typing import NDArray
from PIL import Image

from sgan_dist.config import RemoteConfig
from sgan_dist.data.index import SPLITS, DatasetIndex, load_index
from sgan_dist.data.known_labels import read_known_labels
from sgan_dist.data.prepare.folder import SKIPPED, Skipped, read_skipped
from sgan_dist.data.remote.cache import Storage
from sgan_dist.data.stream import read_split
from sgan_dist.errors import UserError, plural
from sgan_dist.files import write_whole

IMAGES = 12  # of a class, on its contact sheet
CLASSES = 100  # with a contact sheet
SAMPLES = 20_000  # of a split that are looked at for contact sheets
SHOWN = 20  # skipped images that are named in the text
PAGE = "inspect.html"


def inspect(root: Path) -> str:
    """Writes DIR/inspect.html, and returns the same as text, without the images.

    Raises:
        UserError: `root` is no dataset.
    """
    index = load_index(root)
    known = read_known_labels(root, index)
    skipped = read_skipped(root)
    rows = _rows(index, known)
    sheets = {
        "labeled": _sheets(root, index, "labeled"),
        "unlabeled": _sheets(root, index, "unlabeled"),
    }
    environment = Environment(
        loader=PackageLoader("sgan_dist.evaluation", "."),
        autoescape=True,
        trim_blocks=True,
        undefined=StrictUndefined,
    )
    page = environment.get_template("inspect.html.j2").render(
        root=root.resolve(), index=index, rows=rows, sheets=sheets, skipped=skipped, splits=SPLITS
    )
    try:
        write_whole(root / PAGE, page)
    except OSError as error:
        raise UserError(f"cannot write {root / PAGE}: {error.strerror}") from None
    return "\n".join([*_text(index, rows, skipped), f"{root / PAGE} shows images of each class"])


def _rows(index: DatasetIndex, known: NDArray[np.int64] | None) -> list[tuple[str, list[str]]]:
    """The images of each class by split; of the unlabeled split those whose class is known."""
    classes = len(index.class_names)
    counts = {name: index.split(name).label_histogram for name in SPLITS}
    if known is not None:
        counts["unlabeled"] = tuple(np.bincount(known[known >= 0], minlength=classes).tolist())
    return [
        (name, [f"{counts[split][i]:,}" if counts[split] else "" for split in SPLITS])
        for i, name in enumerate(index.class_names)
    ]


def _sheets(root: Path, index: DatasetIndex, split: str) -> list[tuple[str, str]]:
    """(title, data URI) of contact sheets: of each class, or of the first images without labels."""
    found: dict[int, list[NDArray[np.uint8]]] = {}
    seen = 0
    for samples in read_split(Storage(str(root), RemoteConfig()), index, split, 0, 1):
        labels = np.full(len(samples.ids), -1) if samples.labels is None else samples.labels
        for image, label in zip(samples.images, labels.tolist(), strict=True):
            wanted = IMAGES * (4 if label < 0 else 1)
            if len(found.setdefault(label, [])) < wanted:
                found[label].append(image)
        seen += len(samples.ids)
        if seen >= SAMPLES or samples.labels is None:
            break
    return [
        ("" if label < 0 else index.class_names[label], _sheet(found[label]))
        for label in sorted(found)[:CLASSES]
    ]


def _sheet(images: list[NDArray[np.uint8]]) -> str:
    """Returns images (H, W, C) side by side, in rows of IMAGES, as a data URI."""
    height, width, channels = images[0].shape
    rows = -(-len(images) // IMAGES)
    sheet = np.full(
        (rows * (height + 2), min(len(images), IMAGES) * (width + 2), channels), 255, np.uint8
    )
    for number, image in enumerate(images):
        y, x = number // IMAGES * (height + 2), number % IMAGES * (width + 2)
        sheet[y : y + height, x : x + width] = image
    content = io.BytesIO()
    Image.fromarray(sheet[..., 0] if channels == 1 else sheet).save(content, "WEBP", quality=80)
    return f"data:image/webp;base64,{base64.b64encode(content.getvalue()).decode()}"


def _text(
    index: DatasetIndex, rows: list[tuple[str, list[str]]], skipped: list[Skipped]
) -> list[str]:
    height, width, channels = index.image_hwc
    lines = [
        f"{index.source}: {height} x {width} x {channels}, fingerprint {index.fingerprint[:12]}"
    ]
    for name in SPLITS:
        split = index.split(name)
        lines.append(
            f"{name:>10}: {split.samples:,} images in {plural(len(split.shards), 'shard')}"
        )
    size = max(len(name) for name, _ in rows)
    lines.append("".join([" " * size, *(f"{split:>12}" for split in SPLITS)]))
    lines += ["".join([f"{name:>{size}}", *(f"{n:>12}" for n in counts)]) for name, counts in rows]
    if skipped:
        lines.append(f"{plural(len(skipped), 'image')} could not be decoded:")
        lines += [f"  {name}: {why}" for _, name, why in skipped[:SHOWN]]
        if len(skipped) > SHOWN:
            lines.append(f"  ... and {len(skipped) - SHOWN} more: {SKIPPED} names all")
    return lines
