"""Makes an index for WebDataset tars that others wrote; they stay where they are, unchanged.

The folder gets index.json and a sidecar of record offsets for every shard. Each shard is scanned
once: the results are stored in the folder until the index is complete, so that a run that was
stopped can continue.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from sgan_dist.config import RemoteConfig
from sgan_dist.data.images import DECODE_VERSION
from sgan_dist.data.index import (
    DEFAULT,
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
from sgan_dist.data.order import ORDER_VERSION
from sgan_dist.data.prepare.folder import dataset_folder
from sgan_dist.data.prepare.patterns import expand
from sgan_dist.data.prepare.scan import (
    SCANNED,
    ScanJob,
    Scans,
    describe_record,
    offsets_file,
    scan_all,
    scan_warnings,
)
from sgan_dist.data.remote.urls import is_remote
from sgan_dist.errors import UserError, plural

log = logging.getLogger(__name__)


def index_shards(
    unlabeled: Sequence[str],
    labeled: Sequence[str],
    validation: Sequence[str],
    test: Sequence[str],
    out: str | os.PathLike[str],
    image_size: int | None = None,
    gray: bool = False,
    label: str = "cls",
    class_names: str | os.PathLike[str] | None = None,
    order: str = "auto",
    jobs: int | None = None,
    remote: RemoteConfig = DEFAULT,
    progress: bool = True,
) -> DatasetIndex:
    """Indexes the shards of four splits into the folder `out` and returns the index.

    Args:
        unlabeled, labeled, validation, test: the patterns of each split's shards, see
            `patterns.expand`. The unlabeled split is trained on without labels: give the labeled
            shards there too, if they are to be part of it.
        out: the folder to make; absent, empty, or of an earlier run.
        image_size: side in pixels to which images are scaled and cropped when they are read; None
            takes them as they are, all of one size.
        gray: take resized images as gray, not as RGB.
        label: the place of a record's class number: `cls` or `json:KEY`.
        class_names: a text file with a name on each line, class 0 first; None takes the numbers.
        order: of the unlabeled split: `full`, `windowed`, or `auto`, by size as in other splits.
        jobs: scanning processes, one per core by default.
        remote: attempts and timeout of downloads.
        progress: show a progress bar.

    Raises:
        UserError: a shard is missing or broken, the shards do not fit together, or `out` holds
            something else. Shards that were scanned are not scanned again.
    """
    names = None if class_names is None else _read_class_names(Path(class_names))
    _check_options(image_size, gray, label, order, jobs)
    patterns = dict(zip(SPLITS, (labeled, unlabeled, validation, test), strict=True))
    locations = {split: expand(patterns[split], split) for split in SPLITS}
    digest = hashlib.sha256("\n".join(names or ()).encode()).hexdigest()[:12]
    request = "; ".join(
        (
            *(f"{split} {' '.join(patterns[split])}" for split in SPLITS),
            f"label {label}",
            "images as they are" if image_size is None else f"images of {image_size} pixels",
            *(["gray"] if gray else []),
            *([] if names is None else [f"{len(names)} named classes {digest}"]),
            f"unlabeled order {order}",
        )
    )
    out = Path(out).resolve()
    outcome = "the shards that were scanned are kept"
    with dataset_folder(out, request, "indexing", outcome, SCANNED) as existing:
        if existing is not None:
            _check_shards(existing, locations, out)
            # a run may have been killed at its very end
            shutil.rmtree(out / SCANNED, ignore_errors=True)
            return existing
        out.mkdir(exist_ok=True)
        scans = scan_all(out, _jobs(locations, label), jobs, remote, progress)
        image_hwc = _image_hwc(scans, image_size, gray)
        histograms = _histograms(scans, names)
        index = with_fingerprint(
            DatasetIndex(
                **{split: _split(scans, split, image_hwc, histograms, order) for split in SPLITS},
                image_hwc=image_hwc,
                class_names=names or tuple(map(str, range(len(histograms["labeled"])))),
                label=label,
                resize="none" if image_size is None else "shorter",
                source="tars",
                request=request,
                label_seed=0,
                labels_per_class=0,
                order_version=ORDER_VERSION,
                fingerprint="",
                decode_version=DECODE_VERSION,
            )
        )
        _finish(out, index, scans)
    for line in (*scan_warnings(scans), *_index_warnings(index)):
        log.warning(line)
    return index


def _check_options(
    image_size: int | None, gray: bool, label: str, order: str, jobs: int | None
) -> None:
    for name, value in (("image size", image_size), ("jobs", jobs)):
        if value is not None and value < 1:
            raise UserError(f"{name} is {value}, and must be at least 1")
    if gray and image_size is None:
        raise UserError("--gray needs --image_size: only resized images are converted to gray")
    if label != "cls" and not (label.startswith("json:") and label != "json:"):
        raise UserError(f"unknown label {label!r}: use cls or json:KEY")
    if order not in ("auto", *ORDERS):
        raise UserError(f"unknown order {order!r}: use auto, {' or '.join(ORDERS)}")


def _read_class_names(path: Path) -> tuple[str, ...]:
    try:
        names = tuple(line.strip() for line in path.read_text(encoding="utf-8").splitlines())
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise UserError(f"cannot read class names from {path}: {reason}") from None
    if not names or "" in names or len(set(names)) < len(names):
        raise UserError(f"{path} must hold a name on each line, none empty and none twice")
    return names


def _check_shards(index: DatasetIndex, locations: Mapping[str, Sequence[str]], out: Path) -> None:
    """Raises UserError unless an existing index holds the shards that the patterns match now."""
    shards = {split: tuple(shard.name for shard in index.split(split).shards) for split in SPLITS}
    if shards != locations:
        raise UserError(
            f"{out} holds another dataset: it was made from [{index.request}], and the patterns"
            " match other shards now; choose another --out, or remove that folder yourself"
        )


def _jobs(locations: Mapping[str, Sequence[str]], label: str) -> list[ScanJob]:
    jobs = []
    for split in SPLITS:
        for location in locations[split]:
            stat = None if is_remote(location) else Path(location).stat()
            state = "" if stat is None else f"{stat.st_size} {stat.st_mtime_ns}"
            jobs.append(ScanJob(split, location, None if split == "unlabeled" else label, state))
    return jobs


def _image_hwc(scans: Scans, image_size: int | None, gray: bool) -> tuple[int, int, int]:
    """Returns the shape of all images. Raises UserError if they differ and are not resized."""
    for split in SPLITS:
        if not any(scan.images for job, scan in scans.items() if job.split == split):
            raise UserError(f"no image of the {split} shards can be read: check these files")
    if image_size is not None:
        return image_size, image_size, 1 if gray else 3
    images = [
        (image_hwc, describe_record(job, key))
        for job, scan in scans.items()
        for image_hwc, key in scan.images
    ]
    first_hwc, first = images[0]
    for image_hwc, record in images:
        if image_hwc != first_hwc:
            raise UserError(
                f"images differ: {_describe_shape(first_hwc)} of {first}, {_describe_shape(image_hwc)}"
                f" of {record}; --image_size N scales and crops them to one size (the shards that"
                " were scanned are kept)"
            )
    height, width, channels = first_hwc
    return height, width, channels


def _describe_shape(image_hwc: list[int]) -> str:
    height, width, channels = image_hwc
    return f"{height} x {width} ({'gray' if channels == 1 else 'color'})"


def _histograms(scans: Scans, names: tuple[str, ...] | None) -> dict[str, tuple[int, ...]]:
    """Returns samples of each class by split. Without `names`, the labeled split sets the classes.

    Raises UserError if another split has further classes.
    """
    counts = {split: Counter[int]() for split in SPLITS}
    for job, scan in scans.items():
        counts[job.split].update({int(label): n for label, n in scan.histogram.items()})
    classes = len(names) if names is not None else max(counts["labeled"]) + 1
    for job, scan in scans.items():
        if scan.largest_label >= classes:
            raise UserError(
                f"{describe_record(job, scan.largest_key)} has the label {scan.largest_label}, but"
                f" there are only {classes} classes, up to class {classes - 1}: give labeled"
                " samples of all classes, or names with --class_names"
            )
    if classes > counts["labeled"].total():
        raise UserError(
            f"{counts['labeled'].total()} labeled samples are too few for {classes} classes: labels"
            " must count from 0 without large gaps"
        )
    return {
        split: () if split == "unlabeled" else tuple(count[label] for label in range(classes))
        for split, count in counts.items()
    }


def _split(
    scans: Scans,
    split: str,
    image_hwc: tuple[int, int, int],
    histograms: Mapping[str, tuple[int, ...]],
    order: str,
) -> SplitIndex:
    shards = tuple(
        Shard(job.location, scan.samples, scan.bytes, scan.sha256)
        for job, scan in scans.items()
        if job.split == split
    )
    samples = sum(shard.samples for shard in shards)
    forced = split == "unlabeled" and order != "auto"
    split_order = order if forced else order_for(samples, image_hwc)
    return SplitIndex("per-sample", split_order, 1, samples, histograms[split], shards)


def _finish(out: Path, index: DatasetIndex, scans: Scans) -> None:
    """Moves the sidecars to their places, writes the index, and removes what is not needed."""
    for split in SPLITS:
        shutil.rmtree(out / split, ignore_errors=True)  # of a run that was killed right here
        (out / split).mkdir()
        for number, job in enumerate(job for job in scans if job.split == split):
            offsets_file(out, job).replace(out / sidecar_name(split, number))
    save(index, out)
    shutil.rmtree(out / SCANNED, ignore_errors=True)


def _index_warnings(index: DatasetIndex) -> list[str]:
    """Returns what is odd about the splits but no error."""
    lines = []
    absent = [str(label) for label, n in enumerate(index.labeled.label_histogram) if not n]
    if absent:
        first = ", ".join(absent[:10]) + (", ..." if len(absent) > 10 else "")
        lines.append(f"classes without a labeled sample: {first}")
    training = {shard.sha256 for split in SPLITS[:2] for shard in index.split(split).shards}
    for split in SPLITS[2:]:
        shared = sum(shard.sha256 in training for shard in index.split(split).shards)
        if shared:
            lines.append(
                f"training also uses {plural(shared, f'{split} shard')}: errors on this split will"
                " look too good"
            )
    return lines
