"""A source dataset -> a folder of labeled/ unlabeled/ validation/ test/ shards and index.json.

The validation and test parts are the same for every draw of labels. The unlabeled split is the
whole training part, the labeled images included, and carries no labels. Same request, same bytes.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import fcntl
import hashlib
import io
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm
from webdataset.writer import TarWriter

from sgan_dist.data.index import (
    INDEX_NAME,
    LAYOUTS,
    ORDERS,
    SPLITS,
    DatasetIndex,
    Shard,
    SplitIndex,
    load_index,
    made_by,
    order_for,
    save,
    with_fingerprint,
)
from sgan_dist.data.order import ORDER_VERSION, Int64s
from sgan_dist.data.partition import Part, content_hash, split_source
from sgan_dist.data.sources import NAMED_SOURCES, Source, load_source
from sgan_dist.errors import UserError

PACKED_BLOCK = 256  # samples in a packed record
PACKED_PIXELS = 64  # images up to this side are packed by default
SHARD_SAMPLES = 8192
SHARD_BYTES = 64 * 2**20  # decoded size that a shard of large images stays below by default


@dataclass(frozen=True)
class _Format:
    layout: str
    block: int
    samples_per_shard: int


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
    """Prepare the source into the folder `out` and return the index.

    Args:
        source_spec: `digits`, `mnist`, `fashion-mnist` or `idx:FOLDER`.
        out: the folder to make; absent, empty, or holding the very same dataset.
        labels_per_class: labeled images a class.
        label_seed: decides which images are labeled, and nothing else.
        validation: images held out of training, at least one, stratified by class; None takes a
            tenth of `digits`, and 5,000 of other sets (a twelfth of a small one).
        layout: `packed`, `per-sample`, or None: packed for images of up to 64 pixels.
        order: of the unlabeled split: `full`, `windowed`, or `auto`, by size as in other splits.
        samples_per_shard: None takes 8,192, fewer for large images.
        progress: a progress bar, and a line for each download and where nothing is to be done.

    Raises:
        UserError: what was asked for can't be made, or `out` holds something else.
    """
    source = load_source(source_spec, progress)
    out = Path(out).resolve()
    shape = (source.train_images.shape[1], *source.train_images.shape[2:])
    form = _format(layout, samples_per_shard, shape)
    if order not in ("auto", *ORDERS):
        raise UserError(f"unknown order {order!r}: use auto, {' or '.join(ORDERS)}")
    parts = split_source(source, labels_per_class, label_seed, validation)
    orders = {name: order_for(len(part.images), shape) for name, part in parts.items()}
    if order != "auto":
        orders["unlabeled"] = order
    request = (
        f"{source.name} (content {content_hash(source)[:12]}), "
        f"{labels_per_class} labels per class, label seed {label_seed}, "
        f"validation {len(parts['validation'].images)}, {form.layout}, "
        f"unlabeled order {orders['unlabeled']}, {form.samples_per_shard} samples per shard"
    )
    existing = _existing(out, request)
    if existing is not None:
        if progress:
            print(f"{out} already holds this dataset: nothing to do", file=sys.stderr)
        return existing
    try:
        with (
            _partial_folder(out) as partial,
            tqdm(
                total=sum(len(part.images) for part in parts.values()),
                unit=" images",
                disable=None if progress else True,
            ) as bar,
        ):
            splits = {
                name: _write_split(partial, name, part, form, orders[name], source, bar.update)
                for name, part in parts.items()
            }
            index = with_fingerprint(
                DatasetIndex(
                    **splits,
                    image_shape=shape,
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
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise UserError(
                f"no room left for {out} ({error.strerror}): free space or choose another --out; "
                "nothing half-written was kept"
            ) from None
        raise UserError(f"cannot write {out}: {error.strerror}; choose another --out") from None
    return index


def _format(
    layout: str | None, samples_per_shard: int | None, shape: tuple[int, int, int]
) -> _Format:
    height, width, channels = shape
    if layout is None:
        layout = "packed" if max(height, width) <= PACKED_PIXELS else "per-sample"
    if layout not in LAYOUTS:
        raise UserError(f"unknown layout {layout!r}: use {' or '.join(LAYOUTS)}")
    if layout == "per-sample" and channels not in (1, 3):
        raise UserError(f"images of {channels} channels can't be PNG files: use --layout packed")
    block = PACKED_BLOCK if layout == "packed" else 1
    if samples_per_shard is None:
        fitting = SHARD_BYTES // (height * width * channels) // PACKED_BLOCK * PACKED_BLOCK
        samples_per_shard = min(SHARD_SAMPLES, max(PACKED_BLOCK, fitting))
    if samples_per_shard < 1:
        raise UserError(f"samples per shard is {samples_per_shard}, and must be at least 1")
    return _Format(layout, block, samples_per_shard)


def _existing(out: Path, request: str) -> DatasetIndex | None:
    """The index of the same dataset, where `out` holds it; UserError where it holds another."""
    try:
        if not out.exists() or (out.is_dir() and not any(out.iterdir())):
            return None
    except OSError as error:
        raise UserError(f"cannot look into {out}: {error.strerror}; choose another --out") from None
    if not (out / INDEX_NAME).is_file():
        raise UserError(
            f"{out} exists and holds no dataset: choose another --out, or empty it yourself"
        )
    index = load_index(out)
    if index.request != request:
        raise UserError(
            f"{out} holds another dataset: there is [{index.request}], asked for is [{request}]; "
            "choose another --out, or remove that folder yourself"
        )
    return index


@contextlib.contextmanager
def _partial_folder(out: Path) -> Iterator[Path]:
    """An empty hidden sibling of `out` that takes its place at the end, and only if all went well.

    One fixed name under a lock: what a killed run left is removed, a live one is not disturbed.
    """
    partial = out.parent / f".{out.name}.partial"
    partial.mkdir(parents=True, exist_ok=True)
    lock = os.open(partial, os.O_RDONLY)
    try:
        _lock(lock, partial, out)
        try:
            for stale in partial.iterdir():
                shutil.rmtree(stale) if stale.is_dir() else stale.unlink()
            yield partial
            for folder in (*(partial / name for name in SPLITS), partial):
                _sync_folder(folder)
            partial.rename(out)
            _sync_folder(out.parent)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    finally:
        os.close(lock)


def _lock(descriptor: int, partial: Path, out: Path) -> None:
    busy = UserError(f"another run is preparing {out} right now: wait for it to end")
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise busy from None
    # the other run may have renamed the folder between our opening and our locking it
    if not partial.exists() or partial.stat().st_ino != os.fstat(descriptor).st_ino:
        raise busy


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_split(
    root: Path,
    name: str,
    part: Part,
    form: _Format,
    order: str,
    source: Source,
    written: Callable[[int], object],
) -> SplitIndex:
    (root / name).mkdir()
    total = len(part.images)
    shards: list[Shard] = []
    for start in range(0, total, form.samples_per_shard):
        stop = min(start + form.samples_per_shard, total)
        shard = f"{name}/{len(shards):06d}.tar"
        _write_shard(root / shard, part, form, start, stop, written)
        with open(root / shard, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        size = (root / shard).stat().st_size
        shards.append(Shard(shard, stop - start, size, digest))
    classes = len(source.class_names)
    histogram = () if part.labels is None else np.bincount(part.labels, minlength=classes).tolist()
    return SplitIndex(form.layout, order, form.block, total, tuple(histogram), tuple(shards))


def _write_shard(
    path: Path,
    part: Part,
    form: _Format,
    start: int,
    stop: int,
    written: Callable[[int], object],
) -> None:
    """Samples [start, stop) as one tar, and beside it a sidecar of its records' offsets."""
    encode = _packed if form.layout == "packed" else _per_sample
    records_a_shard = -(-form.samples_per_shard // form.block)
    offsets = []
    with open(path, "wb") as file:
        # without a time of its own the tar's bytes depend on the samples alone
        with TarWriter(file, encoder=False, mtime=0) as writer:
            for first in range(start, stop, form.block):
                last = min(first + form.block, stop)
                offsets.append(writer.tarstream.offset)
                number = start // form.samples_per_shard * records_a_shard + len(offsets) - 1
                labels = None if part.labels is None else part.labels[first:last]
                record = encode(part.images[first:last], labels)
                writer.write({"__key__": f"{number:06d}", **record})
                written(last - first)
            offsets.append(writer.tarstream.offset)
        file.flush()
        os.fsync(file.fileno())
    with open(f"{path}.offsets.npy", "wb") as file:
        np.save(file, np.asarray(offsets, np.int64))
        file.flush()
        os.fsync(file.fileno())


def _packed(images: NDArray[np.uint8], labels: Int64s | None) -> dict[str, bytes]:
    record = {"images.npy": _npy(images)}
    if labels is not None:
        record["labels.npy"] = _npy(labels)
    return record


def _npy(array: NDArray[np.uint8] | Int64s) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(array))
    return buffer.getvalue()


def _per_sample(images: NDArray[np.uint8], labels: Int64s | None) -> dict[str, bytes]:
    (image,) = images
    buffer = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(buffer, format="PNG")
    record = {"png": buffer.getvalue()}
    if labels is not None:
        record["cls"] = str(int(labels[0])).encode()
    return record


def main(argv: Sequence[str]) -> int:
    """The command line of launch/prepare_shards.py: an exit code.

    0 when prepared, 2 (an error) or 130 (Ctrl-C) with a line on stderr.
    """
    parser = argparse.ArgumentParser(
        prog="prepare_shards.py", description="Prepare a dataset as WebDataset shards."
    )

    def add(option: str, **rest: Any) -> None:
        # --labels_per_class is the same as --labels-per-class
        parser.add_argument(*dict.fromkeys((option, "--" + option[2:].replace("-", "_"))), **rest)

    sources = f"{', '.join(NAMED_SOURCES)}, or idx:FOLDER of the four IDX files"
    add("--source", required=True, help=sources)
    add("--out", required=True, help="the folder to make")
    add("--labels-per-class", type=int, default=10, help="labeled images a class (default 10)")
    add("--seed", type=int, default=0, help="decides which images are labeled (default 0)")
    add("--validation", type=int, help="images held out (default: 1/10 of digits, else 5000)")
    add("--layout", choices=LAYOUTS, help="default: packed for images of up to 64 pixels")
    add("--order", choices=("auto", *ORDERS), default="auto", help="of the unlabeled split")
    add("--samples-per-shard", type=int, help="default 8192, fewer for large images")
    args = parser.parse_args(argv)

    def make() -> DatasetIndex:
        return prepare(
            args.source,
            args.out,
            args.labels_per_class,
            args.seed,
            args.validation,
            args.layout,
            args.order,
            args.samples_per_shard,
        )

    return made_by(make, args.out, "nothing half-written was kept")
