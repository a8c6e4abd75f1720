"""Which samples of which tars each split has: those with a label, and those that a cut holds out."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sgan_dist.data.index import SPLITS, Shard, SplitIndex, order_for, sidecar_name
from sgan_dist.data.order import Int64s
from sgan_dist.data.prepare.scan import KEY_BITS, ScanJob, Scans, describe_record, samples_file
from sgan_dist.data.prepare.sources.source import class_numbers
from sgan_dist.data.records import UNLABELED
from sgan_dist.data.remote.urls import is_remote, redact_url
from sgan_dist.errors import UserError
from sgan_dist.files import npy_bytes, write_whole


@dataclass(frozen=True)
class Selected:
    """The samples of one shard that belong to a split: int64 (n, 3), place and size of the image in
    bytes, and class number or -1."""

    job: ScanJob
    samples: Int64s


def shard_names(out: Path, locations: Iterable[str]) -> dict[str, str]:
    """Returns location -> name in the index: without secrets, and relative if it lies beside the index.

    So the folder that holds both can be moved, and served. URLs that differ in what may be secret, such
    as `get?file=1` and `get?file=2`, are numbered.
    """
    names: dict[str, str] = {}
    seen = Counter[str]()
    for location in dict.fromkeys(locations):
        name = location
        if is_remote(location):
            name = redact_url(location)
        elif Path(location).is_relative_to(out.parent):
            name = os.path.relpath(location, out)
        names[location] = f"{name}#{seen[name]}" if seen[name] else name
        seen[name] += 1
    return names


def classes_of(
    scans: Scans, split_jobs: Mapping[str, Sequence[ScanJob]], names: tuple[str, ...] | None
) -> tuple[tuple[str, ...], dict[str, int]]:
    """Returns the names of the classes, and the class number of each label."""
    firsts: dict[str, dict[str, str]] = {}
    for split, jobs in split_jobs.items():
        firsts[split] = {}
        for job in jobs:
            for label, key in zip(scans[job].labels, scans[job].label_keys, strict=True):
                firsts[split].setdefault(label, f"{split} {describe_record(job, key)}")
    for split, first in firsts.items():
        if not first and split != "unlabeled":
            job = split_jobs[split][0]
            raise UserError(
                f"no record of the {split} shards has a label, such as {job.shown}: labels are read"
                f" from {job.label}; --label names another place"
            )
    others = firsts.get("validation", {}) | firsts.get("test", {})
    classes, numbers = class_numbers(firsts["labeled"], others, names)
    return classes, dict.fromkeys(firsts["unlabeled"], UNLABELED) | numbers


def select(
    out: Path,
    scans: Scans,
    split_jobs: Mapping[str, Sequence[ScanJob]],
    numbers: Mapping[str, int],
    fractions: Mapping[str, float],
) -> dict[str, list[Selected]]:
    """Returns the samples of each split by shard; the cut ones are in no training split."""
    test, validation = fractions["test"], fractions["validation"]
    selected: dict[str, list[Selected]] = {split: [] for split in SPLITS}

    def add(split: str, job: ScanJob, rows: Int64s) -> None:
        if len(rows):
            selected[split].append(Selected(job, rows[:, :3]))

    labeled_jobs = set(split_jobs["labeled"])
    for split, jobs in split_jobs.items():
        for job in jobs:
            rows = np.load(samples_file(out, job))
            table = np.array(
                [*(numbers[label] for label in scans[job].labels), UNLABELED], np.int64
            )
            rows[:, 2] = table[rows[:, 2]]
            has_label = rows[:, 2] != UNLABELED
            place = rows[:, 3] / 2**KEY_BITS
            is_test = has_label & (place < test) & (job in labeled_jobs)
            is_valid = has_label & (place < test + validation) & (job in labeled_jobs) & ~is_test
            kept = ~(is_test | is_valid)
            add(split, job, rows[kept if split == "unlabeled" else kept & has_label])
            if split == "labeled":
                add("test", job, rows[is_test])
                add("validation", job, rows[is_valid])
    for split, some in selected.items():
        if not some:
            raise UserError(f"no record is left for the {split} split: give more labeled records")
    return selected


def write_sidecars(
    out: Path, split: str, selected: Sequence[Selected], scans: Scans, names: Mapping[str, str]
) -> tuple[Shard, ...]:
    """Writes the sidecars of a split, and returns its shards, which have these names by location."""
    shutil.rmtree(out / split, ignore_errors=True)  # of a run that was killed right here
    (out / split).mkdir()
    shards = []
    for number, some in enumerate(selected):
        sidecar = npy_bytes(some.samples)
        write_whole(out / sidecar_name(split, number), sidecar, fsync=True)
        scan = scans[some.job]
        shards.append(
            Shard(
                names[some.job.location],
                len(some.samples),
                scan.bytes,
                scan.sha256,
                len(sidecar),
                hashlib.sha256(sidecar).hexdigest(),
            )
        )
    return tuple(shards)


def split_index(
    split: str,
    selected: Sequence[Selected],
    shards: tuple[Shard, ...],
    classes: tuple[str, ...],
    image_hwc: tuple[int, int, int],
    order: str,
) -> SplitIndex:
    samples = sum(shard.samples for shard in shards)
    forced = split == "unlabeled" and order != "auto"
    split_order = order if forced else order_for(samples, image_hwc)
    histogram = np.zeros(len(classes), np.int64)
    if split != "unlabeled":
        for some in selected:
            histogram += np.bincount(some.samples[:, 2], minlength=len(classes))
    counts = () if split == "unlabeled" else tuple(histogram.tolist())
    return SplitIndex("per-sample", split_order, 1, samples, counts, shards)
