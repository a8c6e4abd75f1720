"""Makes an index for WebDataset tars that others wrote; they stay where they are, unchanged.

The folder gets index.json and a sidecar for every shard, with the places of its images. Each shard is
scanned once: the results are stored in the folder until the index is complete, so that a run that was
stopped can continue.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from sgan_dist.config import RemoteConfig
from sgan_dist.data.images import DECODE_VERSION, Resize, describe_shape
from sgan_dist.data.index import (
    DEFAULT,
    ORDERS,
    SPLITS,
    DatasetIndex,
    load_index,
    save,
    with_fingerprint,
)
from sgan_dist.data.known_labels import write_known_labels
from sgan_dist.data.order import ORDER_VERSION
from sgan_dist.data.prepare.folder import (
    Skipped,
    dataset_folder,
    warn_of_absent_classes,
    write_skipped,
)
from sgan_dist.data.prepare.patterns import expand
from sgan_dist.data.prepare.scan import (
    SCANNED,
    ScanJob,
    Scans,
    describe_record,
    scan_all,
    scan_warnings,
)
from sgan_dist.data.prepare.selection import (
    classes_of,
    select,
    shard_names,
    split_index,
    write_sidecars,
)
from sgan_dist.data.remote.secret import write_secrets
from sgan_dist.data.remote.urls import is_remote, redact_url
from sgan_dist.errors import UserError, plural

log = logging.getLogger(__name__)


def index_shards(
    unlabeled: Sequence[str],
    labeled: Sequence[str],
    validation: Sequence[str],
    test: Sequence[str],
    out: str | os.PathLike[str],
    validation_fraction: float = 0.0,
    test_fraction: float = 0.0,
    image_size: tuple[int, int] | None = None,
    resize: Resize = "shorter",
    gray: bool = False,
    image: str | None = None,
    label: str = "cls",
    class_names: str | os.PathLike[str] | None = None,
    order: str = "auto",
    jobs: int | None = None,
    remote: RemoteConfig = DEFAULT,
    renew: bool = False,
    progress: bool = True,
) -> DatasetIndex:
    """Indexes the shards of four splits into the folder `out` and returns the index.

    Args:
        unlabeled, labeled, validation, test: the patterns of each split's shards, see
            `patterns.expand`. The unlabeled split is trained on without labels: give the labeled
            shards there too, if they are to be part of it. Of the other splits' shards, records
            without a label are left out: so one partly labeled set is `unlabeled` and `labeled`.
        out: the folder to make; absent, empty, or of an earlier run.
        validation_fraction, test_fraction: without patterns, this part of the labeled records is cut
            off, by a hash of their keys, and is neither in `labeled` nor in `unlabeled`.
        image_size: (height, width) that images get when they are read; None takes them as
            they are, all of one size.
        resize: how, `shorter` or `exact`: see `images.fit`.
        gray: take resized images as gray, not as RGB.
        image: the extension of images, where records hold several; None: that of an image format.
        label: the place of a record's label, see `records.label_of`.
        class_names: a text file with a name on each line, class 0 first; None takes the labels.
        order: of the unlabeled split: `full`, `windowed`, or `auto`, by size as in other splits.
        jobs: scanning processes, one per core by default.
        remote: attempts and timeout of downloads.
        renew: take new URLs of the same shards, such as those with new signatures.
        progress: show a progress bar.

    Raises:
        UserError: a shard is missing or broken, the shards do not fit together, or `out` holds
            something else. Shards that were scanned are not scanned again.
    """
    classes = None if class_names is None else _read_class_names(Path(class_names))
    _check_options(image_size, gray, label, order, jobs)
    fractions = {"validation": validation_fraction, "test": test_fraction}
    patterns = dict(zip(SPLITS, (labeled, unlabeled, validation, test), strict=True))
    for split, fraction in fractions.items():
        if bool(patterns[split]) == bool(fraction) or not 0 <= fraction < 1:
            raise UserError(
                f"give --{split} shards, or --{split}_fraction of the labeled records, below 1"
            )
    locations = {split: expand(patterns[split], split) for split in SPLITS if patterns[split]}
    out = Path(out).resolve()
    names = shard_names(out, (location for some in locations.values() for location in some))
    if renew:
        return _renew(out, locations, names)
    digest = hashlib.sha256("\n".join(classes or ()).encode()).hexdigest()[:12]
    request = "; ".join(
        (
            *(f"{split} {' '.join(map(redact_url, patterns[split]))}" for split in locations),
            *(f"{split} {part:g} of the labeled" for split, part in fractions.items() if part),
            f"label {label}",
            *([] if image is None else [f"image {image}"]),
            "images as they are"
            if image_size is None
            else f"images of {image_size[0]} x {image_size[1]} pixels by {resize}",
            *(["gray"] if gray else []),
            *([] if classes is None else [f"{len(classes)} named classes {digest}"]),
            f"unlabeled order {order}",
        )
    )
    outcome = "the shards that were scanned are kept"
    with dataset_folder(out, request, "indexing", outcome, SCANNED) as existing:
        if existing is not None:
            _check_shards(existing, locations, names, out)
            # a run may have been killed at its very end
            shutil.rmtree(out / SCANNED, ignore_errors=True)
            return existing
        out.mkdir(exist_ok=True)
        scans = scan_all(out, _jobs(names, label, image), jobs, remote, progress)
        by_location = {job.location: job for job in scans}
        split_jobs = {s: [by_location[at] for at in some] for s, some in locations.items()}
        image_hwc = _image_hwc(scans, split_jobs, image_size, gray)
        class_list, numbers = classes_of(scans, split_jobs, classes)
        selected = select(out, scans, split_jobs, numbers, fractions)
        shards = {
            split: write_sidecars(out, split, selected[split], scans, names) for split in SPLITS
        }
        splits = {
            s: split_index(s, selected[s], shards[s], class_list, image_hwc, order) for s in SPLITS
        }
        index = with_fingerprint(
            DatasetIndex(
                **splits,
                image_hwc=image_hwc,
                class_names=class_list,
                label=label,
                resize="none" if image_size is None else resize,
                source="tars",
                request=request,
                label_seed=0,
                labels_per_class=0,
                order_version=ORDER_VERSION,
                fingerprint="",
                decode_version=DECODE_VERSION,
            )
        )
        known = [some.samples[:, 2] for some in selected["unlabeled"]]
        write_known_labels(out, np.concatenate(known))
        skipped = [
            Skipped(job.shown, key, why) for job, scan in scans.items() for key, why in scan.skipped
        ]
        write_skipped(out, skipped)
        write_secrets(out, {name: location for location, name in names.items()})
        save(index, out)
        shutil.rmtree(out / SCANNED, ignore_errors=True)
    for line in (*scan_warnings(scans), *_index_warnings(index, fractions)):
        log.warning(line)
    warn_of_absent_classes(index)
    return index


def _renew(
    out: Path, locations: Mapping[str, Sequence[str]], names: Mapping[str, str]
) -> DatasetIndex:
    """Keeps new URLs of a dataset's shards."""
    index = load_index(out)
    _check_shards(index, locations, names, out)
    write_secrets(out, {name: location for location, name in names.items()})
    return index


def _check_options(
    image_size: tuple[int, int] | None, gray: bool, label: str, order: str, jobs: int | None
) -> None:
    if jobs is not None and jobs < 1:
        raise UserError(f"jobs is {jobs}, and must be at least 1")
    if gray and image_size is None:
        raise UserError("--gray needs --image_size: only resized images are converted to gray")
    if label in ("", "json", "json:"):
        raise UserError(
            f"unknown label {label!r}: use an extension such as cls, json:KEY or folder"
        )
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


def _check_shards(
    index: DatasetIndex,
    locations: Mapping[str, Sequence[str]],
    names: Mapping[str, str],
    out: Path,
) -> None:
    """Raises UserError unless an existing index holds the shards that the patterns match now."""
    for split, some in locations.items():
        named = {names[location] for location in some}
        indexed = {shard.name for shard in index.split(split).shards}
        # shards without a sample of the split are not in it
        if not indexed <= named or (split == "unlabeled" and indexed != named):
            raise UserError(
                f"{out} holds another dataset: it was made from [{index.request}], and the patterns"
                " match other shards now; choose another --out, or remove that folder yourself"
            )


def _jobs(names: Mapping[str, str], label: str, image: str | None) -> list[ScanJob]:
    jobs = []
    for location, name in names.items():
        stat = None if is_remote(location) else Path(location).stat()
        state = "" if stat is None else f"{stat.st_size} {stat.st_mtime_ns}"
        jobs.append(ScanJob(location, name, label, image, state))
    return jobs


def _image_hwc(
    scans: Scans,
    split_jobs: Mapping[str, Sequence[ScanJob]],
    image_size: tuple[int, int] | None,
    gray: bool,
) -> tuple[int, int, int]:
    """Returns the shape of all images. Raises UserError if they differ and are not resized."""
    for split, jobs in split_jobs.items():
        if not any(scans[job].images for job in jobs):
            raise UserError(f"no image of the {split} shards can be read: check these files")
    if image_size is not None:
        return (*image_size, 1 if gray else 3)
    images = [
        (image_hwc, describe_record(job, key))
        for job, scan in scans.items()
        for image_hwc, key in scan.images
    ]
    first_hwc, first = images[0]
    for image_hwc, record in images:
        if image_hwc != first_hwc:
            raise UserError(
                f"images differ: {describe_shape(first_hwc)} of {first}, {describe_shape(image_hwc)}"
                f" of {record}; --image_size N scales and crops them to one size (the shards that"
                " were scanned are kept)"
            )
    height, width, channels = first_hwc
    return height, width, channels


def _index_warnings(index: DatasetIndex, fractions: Mapping[str, float]) -> list[str]:
    """Returns what is odd about the splits but no error."""
    lines = []
    training = {shard.sha256 for split in SPLITS[:2] for shard in index.split(split).shards}
    for split in SPLITS[2:]:
        shared = sum(shard.sha256 in training for shard in index.split(split).shards)
        if shared and not fractions[split]:  # what is cut off shares shards, not records
            lines.append(
                f"training also uses {plural(shared, f'{split} shard')}: errors on this split will"
                " look too good"
            )
    return lines
