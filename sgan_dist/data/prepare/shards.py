"""Prepares a source dataset: a folder of labeled/ unlabeled/ validation/ test/ and index.json.

The validation and test splits are the same for every choice of labels. The unlabeled split is the
whole training part, including the labeled images, without labels. Same request, same bytes.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm
from webdataset.writer import TarWriter

from sgan_dist.data.index import (
    LAYOUTS,
    ORDERS,
    SPLITS,
    DatasetIndex,
    Shard,
    SplitIndex,
    order_for,
    save,
    with_fingerprint,
)
from sgan_dist.data.order import ORDER_VERSION, Int64s, permutation
from sgan_dist.data.prepare.folder import dataset_folder, npy_bytes
from sgan_dist.data.prepare.sources import Bytes, Source, load_source
from sgan_dist.errors import UserError
from sgan_dist.files import flush_folder, write_whole

PACKED_BLOCK = 256  # samples in a packed record
PACKED_PIXELS = 64  # images up to this side are packed by default
SHARD_SAMPLES = 8192
SHARD_BYTES = 64 * 2**20  # default maximum of a shard's decoded size, for large images


@dataclass(frozen=True)
class _Format:
    layout: str
    block: int
    samples_per_shard: int


@dataclass(frozen=True)
class _SplitArrays:
    """One split in memory: images uint8 (n, H, W, C), labels int64 (n,) or None."""

    images: Bytes
    labels: Int64s | None


def prepare(
    source_spec: str,
    out: str | os.PathLike[str],
    labels_per_class: int = 10,
    label_seed: int = 0,
    validation: int | None = None,
    layout: str | None = None,
    order: str = "auto",
    samples_per_shard: int | None = None,
    progress: bool = True,
) -> DatasetIndex:
    """Prepares the source into the folder `out` and returns the index.

    Args:
        source_spec: `digits`, `mnist`, `fashion-mnist` or `idx:FOLDER`.
        out: the folder to make; absent, empty, or with the same dataset.
        labels_per_class: labeled images per class.
        label_seed: decides which images are labeled, and nothing else.
        validation: images held out of training, at least one, stratified by class; None takes a
            tenth of `digits`, and 5,000 of other sources (a twelfth of a small one).
        layout: `packed`, `per-sample`, or None: packed for images of up to 64 pixels.
        order: of the unlabeled split: `full`, `windowed`, or `auto`, by size as in other splits.
        samples_per_shard: None takes 8,192, fewer for large images.
        progress: show a progress bar.

    Raises:
        UserError: the request cannot be met, or `out` holds something else.
    """
    source = load_source(source_spec)
    out = Path(out).resolve()
    image_hwc = (source.train_images.shape[1], *source.train_images.shape[2:])
    classes = len(source.class_names)
    form = _format(layout, samples_per_shard, image_hwc)
    if order not in ("auto", *ORDERS):
        raise UserError(f"unknown order {order!r}: use auto, {' or '.join(ORDERS)}")
    arrays = _split_source(source, labels_per_class, label_seed, validation)
    orders = {name: order_for(len(split.images), image_hwc) for name, split in arrays.items()}
    if order != "auto":
        orders["unlabeled"] = order
    request = (
        f"{source.name} (content {_content_hash(source)[:12]}),"
        f" {labels_per_class} labels per class, label seed {label_seed},"
        f" validation {len(arrays['validation'].images)}, {form.layout},"
        f" unlabeled order {orders['unlabeled']}, {form.samples_per_shard} samples per shard"
    )
    with dataset_folder(out, request, "preparing", "nothing half-written was kept") as existing:
        if existing is not None:
            return existing
        with (
            _partial_folder(out) as partial,
            tqdm(
                total=sum(len(split.images) for split in arrays.values()),
                unit=" images",
                disable=None if progress else True,
            ) as bar,
        ):
            splits = {
                name: _write_split(partial, name, split, form, orders[name], classes, bar.update)
                for name, split in arrays.items()
            }
            index = with_fingerprint(
                DatasetIndex(
                    **splits,
                    image_hwc=image_hwc,
                    class_names=source.class_names,
                    label="cls",
                    resize=False,
                    source=source.name,
                    request=request,
                    label_seed=label_seed,
                    labels_per_class=labels_per_class,
                    order_version=ORDER_VERSION,
                    fingerprint="",
                )
            )
            save(index, partial)
    return index


def _format(
    layout: str | None, samples_per_shard: int | None, image_hwc: tuple[int, int, int]
) -> _Format:
    height, width, channels = image_hwc
    if layout is None:
        layout = "packed" if max(height, width) <= PACKED_PIXELS else "per-sample"
    if layout not in LAYOUTS:
        raise UserError(f"unknown layout {layout!r}: use {' or '.join(LAYOUTS)}")
    if layout == "per-sample" and channels not in (1, 3):
        raise UserError(f"images of {channels} channels cannot be PNG files: use --layout packed")
    block = PACKED_BLOCK if layout == "packed" else 1
    if samples_per_shard is None:
        fitting = SHARD_BYTES // (height * width * channels) // PACKED_BLOCK * PACKED_BLOCK
        samples_per_shard = min(SHARD_SAMPLES, max(PACKED_BLOCK, fitting))
    if samples_per_shard < 1:
        raise UserError(f"samples per shard is {samples_per_shard}, and must be at least 1")
    return _Format(layout, block, samples_per_shard)


def _split_source(
    source: Source, labels_per_class: int, label_seed: int, validation: int | None
) -> dict[str, _SplitArrays]:
    """Returns the four splits by name, each in a keyed order that is independent of the classes."""
    images, labels = source.train_images, source.train_labels
    total = len(images)
    train = np.arange(total)
    if source.test_images is None or source.test_labels is None:
        chosen = _stratified(labels, total // 5, "test")
        test = _SplitArrays(images[chosen], labels[chosen])
        train = np.setdiff1d(train, chosen)
        default = total // 10
    else:
        storage = permutation(len(source.test_images), "storage", "test")
        test = _SplitArrays(source.test_images[storage], source.test_labels[storage])
        default = min(5000, total // 12)
    if validation is None:
        validation = max(1, default)
    if not 1 <= validation < len(train):
        raise UserError(
            f"validation is {validation}: choose from 1 to {len(train) - 1}, as {source.name} has"
            f" {len(train)} images to train on"
        )
    held_out = train[_stratified(labels[train], validation, "validation")]
    train = np.setdiff1d(train, held_out)
    unlabeled = train[permutation(len(train), "storage", "unlabeled")]
    labeled = _draw_labels(source, train, labels_per_class, label_seed)
    return {
        "labeled": _SplitArrays(images[labeled], labels[labeled]),
        "unlabeled": _SplitArrays(images[unlabeled], None),
        "validation": _SplitArrays(images[held_out], labels[held_out]),
        "test": test,
    }


def _stratified(labels: Int64s, count: int, name: str) -> Int64s:
    """Returns `count` positions in `labels`, in a keyed order, the same for every seed.

    Each class gets its share of them, rounded by the largest remainder method.
    """
    histogram = np.bincount(labels)
    share, remainder = np.divmod(histogram * count, len(labels))
    rounded_up = np.argsort(-remainder, kind="stable")[: count - int(share.sum())]
    share[rounded_up] += 1
    chosen = np.concatenate(
        [
            np.flatnonzero(labels == label)[permutation(histogram[label], name, label)[:number]]
            for label, number in enumerate(share)
        ]
    )
    return chosen[permutation(len(chosen), "storage", name)]


def _draw_labels(source: Source, train: Int64s, per_class: int, seed: int) -> Int64s:
    """Returns `per_class` images of every class in `train`; fewer labels are a subset of more."""
    if per_class < 1:
        raise UserError(f"labels per class is {per_class}, and must be at least 1")
    drawn = []
    for label, name in enumerate(source.class_names):
        members = train[source.train_labels[train] == label]
        if len(members) < per_class:
            raise UserError(
                f"class {name} of {source.name} has {len(members)} training images left, fewer"
                f" than {per_class} labels per class: ask for fewer labels or less validation"
            )
        drawn.append(members[permutation(len(members), "labels", seed, label)[:per_class]])
    labeled = np.concatenate(drawn)
    return labeled[permutation(len(labeled), "storage", "labeled", seed)]


def _content_hash(source: Source) -> str:
    """Returns the sha256 of the source's images and labels, and of nothing else."""
    content = hashlib.sha256()
    parts = (source.train_images, source.train_labels, source.test_images, source.test_labels)
    for array in parts:
        if array is not None:
            content.update(str(array.shape).encode())
            content.update(np.ascontiguousarray(array).data)
    return content.hexdigest()


@contextlib.contextmanager
def _partial_folder(out: Path) -> Iterator[Path]:
    """Yields an empty hidden sibling of `out`, which is renamed to `out` after a success."""
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
    partial.mkdir()
    try:
        yield partial
        for folder in (*(partial / name for name in SPLITS), partial):
            flush_folder(folder)
        partial.rename(out)
        flush_folder(out.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _write_split(
    root: Path,
    name: str,
    arrays: _SplitArrays,
    form: _Format,
    order: str,
    classes: int,
    written: Callable[[int], object],
) -> SplitIndex:
    (root / name).mkdir()
    total = len(arrays.images)
    shards: list[Shard] = []
    for start in range(0, total, form.samples_per_shard):
        stop = min(start + form.samples_per_shard, total)
        path = root / name / f"{len(shards):06d}.tar"
        _write_shard(path, arrays, form, start, stop)
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        shards.append(Shard(f"{name}/{path.name}", stop - start, path.stat().st_size, digest))
        written(stop - start)
    histogram: list[int] = []
    if arrays.labels is not None:
        histogram = np.bincount(arrays.labels, minlength=classes).tolist()
    return SplitIndex(form.layout, order, form.block, total, tuple(histogram), tuple(shards))


def _write_shard(path: Path, arrays: _SplitArrays, form: _Format, start: int, stop: int) -> None:
    """Writes samples [start, stop) as one tar; a per-sample one gets a sidecar of record offsets."""
    encode = _packed if form.layout == "packed" else _per_sample
    records_per_shard = -(-form.samples_per_shard // form.block)
    number = start // form.samples_per_shard * records_per_shard
    offsets: list[int] = []
    with open(path, "wb") as file:
        # with a fixed time the tar's bytes depend on the samples alone
        with TarWriter(file, encoder=False, mtime=0) as writer:
            for first in range(start, stop, form.block):
                last = min(first + form.block, stop)
                labels = None if arrays.labels is None else arrays.labels[first:last]
                record = encode(arrays.images[first:last], labels)
                key = f"{number + len(offsets):06d}"
                offsets.append(writer.tarstream.offset)
                writer.write({"__key__": key, **record})
            offsets.append(writer.tarstream.offset)
        file.flush()
        os.fsync(file.fileno())
    if form.layout == "per-sample":
        sidecar = path.with_name(f"{path.name}.offsets.npy")
        write_whole(sidecar, npy_bytes(np.array(offsets, np.int64)), fsync=True)


def _packed(images: Bytes, labels: Int64s | None) -> dict[str, bytes]:
    record = {"images.npy": npy_bytes(images)}
    if labels is not None:
        record["labels.npy"] = npy_bytes(labels)
    return record


def _per_sample(images: Bytes, labels: Int64s | None) -> dict[str, bytes]:
    (image,) = images
    buffer = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(buffer, format="PNG")
    record = {"png": buffer.getvalue()}
    if labels is not None:
        record["cls"] = str(int(labels[0])).encode()
    return record
