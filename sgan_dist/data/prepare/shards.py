"""Prepares a source dataset: a folder of labeled/ unlabeled/ validation/ test/ and index.json.

The validation and test splits are the same for every choice of labels. The unlabeled split is the
whole training part, including the labeled images, without labels. Same request, same bytes.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import math
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image
from tqdm import tqdm
from webdataset.writer import TarWriter

from sgan_dist.data.images import DECODE_VERSION, Resize
from sgan_dist.data.index import (
    LAYOUTS,
    ORDERS,
    SPLITS,
    DatasetIndex,
    Shard,
    SplitIndex,
    order_for,
    save,
    sidecar_name,
    with_fingerprint,
)
from sgan_dist.data.known_labels import write_known_labels
from sgan_dist.data.order import ORDER_VERSION, Int64s
from sgan_dist.data.prepare.decoding import (
    PixelRules,
    Pool,
    decoded,
    must_decode,
    pixel_rules,
    pools_of_arrays,
)
from sgan_dist.data.prepare.folder import (
    Skipped,
    dataset_folder,
    warn_of_absent_classes,
    write_skipped,
)
from sgan_dist.data.prepare.processes import map_in_processes
from sgan_dist.data.prepare.sources import content_hash, load_source, with_parts
from sgan_dist.data.prepare.sources.source import Bytes, Columns
from sgan_dist.data.prepare.splits import Labels, Rows, held_out, split
from sgan_dist.data.records import UNLABELED, list_records
from sgan_dist.errors import UserError
from sgan_dist.files import flush_folder, npy_bytes, write_whole

PACKED_BLOCK = 256  # samples in a packed record
PACKED_PIXELS = 64  # images up to this side are packed by default
SHARD_SAMPLES = 8192
SHARD_BYTES = 64 * 2**20  # default maximum of a shard's decoded size, for large images

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Format:
    layout: str
    block: int
    samples_per_shard: int


def prepare(
    source_spec: str,
    out: str | os.PathLike[str],
    labels: Labels = Labels(),  # noqa: B008 - frozen
    validation: int | None = None,
    test: str | None = None,
    unlabeled: str | None = None,
    image_size: tuple[int, int] | None = None,
    resize: Resize = "shorter",
    gray: bool = False,
    columns: Columns = Columns(),  # noqa: B008 - frozen
    layout: str | None = None,
    order: str = "auto",
    samples_per_shard: int | None = None,
    jobs: int | None = None,
    progress: bool = True,
) -> DatasetIndex:
    """Prepares the source into the folder `out` and returns the index.

    Args:
        source_spec: one of `sources.CHOICES`.
        out: the folder to make; absent, empty, or with the same dataset.
        labels: which images are labeled ones.
        validation: images held out of training, at least one, stratified by class; see
            `splits.held_out` for None.
        test: a source of test images, if `source_spec` has none; else a fifth of the labeled images.
        unlabeled: a source of further images to train on; its labels are not used.
        image_size: (height, width) that all images get; None takes them as they are.
        resize: how they get it, `shorter` or `exact`: see `images.fit`.
        gray: one channel; only with `image_size`.
        columns: where tables have images and labels.
        layout: `packed`, `per-sample`, or None: packed for images of up to 64 pixels.
        order: of the unlabeled split: `full`, `windowed`, or `auto`, by size as in other splits.
        samples_per_shard: None takes 8,192, fewer for large images.
        jobs: processes; None takes one per core for large sources.
        progress: show a progress bar.

    Raises:
        UserError: the request cannot be met, or `out` holds something else.
    """
    if order not in ("auto", *ORDERS):
        raise UserError(f"unknown order {order!r}: use auto, {' or '.join(ORDERS)}")
    if gray and image_size is None:
        raise UserError("--gray needs --image_size: only resized images are converted to gray")
    source = with_parts(
        load_source(source_spec, columns),
        None if test is None else load_source(test, columns),
        None if unlabeled is None else load_source(unlabeled, columns),
    )
    out = Path(out).resolve()
    validation = held_out(source, validation)
    rules = pixel_rules(source, image_size, resize, gray)
    form = _format(layout, samples_per_shard, rules.image_hwc)
    decode, splits = must_decode(source, rules), None
    unlabeled_order = order
    if not decode:
        splits = split(source, pools_of_arrays(source), labels, validation)
        if order == "auto":
            unlabeled_order = order_for(len(splits["unlabeled"].rows), rules.image_hwc)
    content = content_hash(source)
    request = (
        f"{source.name} (content {content[:12]}), {labels.describe(source)},"
        f" validation {'as it is' if validation is None else validation}, {form.layout},"
        f" unlabeled order {unlabeled_order}, {form.samples_per_shard} samples per shard"
    )
    pixels = (
        f"images {'x'.join(map(str, rules.image_hwc))} by {rules.resize}, decoded by version"
        f" {DECODE_VERSION}"
    )
    if decode:
        request += f", {pixels}"
    with dataset_folder(out, request, "preparing", "nothing half-written was kept") as existing:
        if existing is not None:
            return existing
        with contextlib.ExitStack() as stack:
            skipped: list[Skipped] = []
            if splits is None:
                folder = out.with_name(f".{out.name}.decoded")
                images = decoded(source, rules, folder, f"{content} {pixels}", jobs, progress)
                pools, skipped = stack.enter_context(images)
                splits = split(source, pools, labels, validation)
            partial = stack.enter_context(_partial_folder(out))
            orders = {n: order_for(len(rows.rows), rules.image_hwc) for n, rows in splits.items()}
            if order != "auto":
                orders["unlabeled"] = order
            classes = len(source.class_names)
            written = _write(partial, splits, form, orders, classes, rules, jobs, progress)
            index = with_fingerprint(
                DatasetIndex(
                    **written,
                    image_hwc=rules.image_hwc,
                    class_names=source.class_names,
                    label="cls",
                    resize="none",
                    source=source.name,
                    request=request,
                    label_seed=labels.seed,
                    labels_per_class=labels.resolved(source) or 0,
                    order_version=ORDER_VERSION,
                    fingerprint="",
                    decode_version=1,  # none of these images is turned, scaled or converted
                )
            )
            write_skipped(partial, skipped)
            save(index, partial)
    warn_of_absent_classes(index)
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


@dataclass(frozen=True)
class _ShardJob:
    """A shard to write: some images uint8 (n, H, W, C), and labels, of a split."""

    split: str
    path: Path
    number: int
    images: Bytes
    labels: Int64s | None
    form: _Format


def _write(
    root: Path,
    splits: dict[str, Rows],
    form: _Format,
    orders: dict[str, str],
    classes: int,
    rules: PixelRules,
    jobs: int | None,
    progress: bool,
) -> dict[str, SplitIndex]:
    """Writes the shards of all splits, and the known labels of the unlabeled one."""
    for name in splits:
        (root / name).mkdir()
    total = sum(len(rows.rows) for rows in splits.values())
    large = total * math.prod(rules.image_hwc) > 4 * SHARD_BYTES
    shards: dict[str, dict[int, Shard]] = {name: {} for name in SPLITS}
    work = _shard_jobs(root, splits, form)
    with tqdm(total=total, unit=" images", disable=None if progress else True) as bar:
        for job, shard in map_in_processes(_write_shard, work, jobs, large):
            shards[job.split][job.number] = shard
            bar.update(shard.samples)
    known = splits["unlabeled"].pool.known[splits["unlabeled"].rows]
    write_known_labels(root, known)
    return {
        name: SplitIndex(
            form.layout,
            orders[name],
            form.block,
            len(rows.rows),
            () if rows.labels is None else _histogram(rows.labels, classes),
            tuple(shards[name][number] for number in sorted(shards[name])),
        )
        for name, rows in splits.items()
    }


def _histogram(labels: Int64s, classes: int) -> tuple[int, ...]:
    return tuple(np.bincount(labels, minlength=classes).tolist())


def _shard_jobs(root: Path, splits: dict[str, Rows], form: _Format) -> Iterator[_ShardJob]:
    for name, rows in splits.items():
        for number, start in enumerate(range(0, len(rows.rows), form.samples_per_shard)):
            some = slice(start, start + form.samples_per_shard)
            labels = None if rows.labels is None else rows.labels[some]
            images = _gather(rows.pool, rows.rows[some])
            yield _ShardJob(name, root / name / f"{number:06d}.tar", number, images, labels, form)


def _gather(pool: Pool, rows: Int64s) -> Bytes:
    """Returns images of a pool, which is read in its own order, since it may lie on a disk."""
    source, order = pool.images, np.argsort(rows)
    images = np.empty((len(rows), *source.shape[1:]), np.uint8)
    if not isinstance(source, np.memmap) or source.filename is None:
        images[order] = source[rows[order]]
        return images
    with open(source.filename, "rb") as file:  # by the map, all of the file would become resident
        for place in order.tolist():
            start = source.offset + int(rows[place]) * images[place].nbytes
            if os.preadv(file.fileno(), [images[place].data], start) != images[place].nbytes:
                raise UserError(f"{source.filename} was cut short meanwhile: run the command again")
    return images


def _write_shard(job: _ShardJob) -> Shard:
    """Writes a tar, and the sidecar of a per-sample one."""
    form, total = job.form, len(job.images)
    encode = _packed if form.layout == "packed" else _per_sample
    first_record = job.number * -(-form.samples_per_shard // form.block)
    with open(job.path, "w+b") as file:
        # with a fixed time the tar's bytes depend on the samples alone
        with TarWriter(file, encoder=False, mtime=0) as writer:
            for record, first in enumerate(range(0, total, form.block), first_record):
                last = min(first + form.block, total)
                labels = None if job.labels is None else job.labels[first:last]
                files = encode(job.images[first:last], labels)
                writer.write({"__key__": f"{record:06d}", **files})
        file.flush()
        os.fsync(file.fileno())
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        size = file.tell()
        sidecar = _sidecar(job, file) if form.layout == "per-sample" else b""
    if not sidecar:
        return Shard(f"{job.split}/{job.path.name}", total, size, digest)
    write_whole(job.path.with_name(Path(sidecar_name("", job.number)).name), sidecar, fsync=True)
    sums = len(sidecar), hashlib.sha256(sidecar).hexdigest()
    return Shard(f"{job.split}/{job.path.name}", total, size, digest, *sums)


def _sidecar(job: _ShardJob, file: BinaryIO) -> bytes:
    labels = np.full(len(job.images), UNLABELED) if job.labels is None else job.labels
    places = [record.files["png"] for record in list_records(file).records]
    return npy_bytes(np.column_stack([np.array(places, np.int64), labels]))


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
