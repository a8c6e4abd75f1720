"""Scans tars in several processes, and stores the result of each.

A run that was stopped continues from the stored results, and a run with other options reuses
those that do not depend on them.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import json
import logging
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np
from tqdm import tqdm

from sgan_dist.config import RemoteConfig
from sgan_dist.data.images import check
from sgan_dist.data.order import Int64s
from sgan_dist.data.prepare.processes import map_in_processes
from sgan_dist.data.records import (
    BLOCK,
    UNLABELED,
    Listing,
    Record,
    image_of,
    label_of,
    list_records,
    plain_label,
)
from sgan_dist.data.remote.transfer import Missing, fetch
from sgan_dist.data.remote.urls import is_remote, redact_url
from sgan_dist.errors import UserError, plural
from sgan_dist.files import npy_bytes, write_whole

# in the folder of the index, until it is complete: of each shard the result (.json), the samples
# (.npy), and meanwhile its download (.tar)
SCANNED = ".scanned"
KEY_BITS = 53  # of a key's hash

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ScanJob:
    """A shard to scan. Equal jobs give equal results.

    `name` is that of the shard in the index. `label` is where labels are, see `records.label_of`, and
    `image` the extension of images, None for that of any image format. `state` holds the size and the
    modification time of a local file: with another state it is another file.
    """

    location: str
    name: str
    label: str
    image: str | None
    state: str

    @property
    def shown(self) -> str:
        """The location without what may be secret in it, for messages."""
        return redact_url(self.location)


@dataclass
class ShardScan:
    """What a shard holds, whatever the options."""

    bytes: int = 0
    sha256: str = ""
    has_end: bool = False
    """whether the file ends in zeros, as tars should, and not just after a record"""
    without_image: int = 0
    """records without an image, which are not samples"""
    example: str = ""
    """of a record without an image, or with one that webdataset's key rule hides"""
    skipped: list[tuple[str, str]] = field(default_factory=list)
    """key and reason of each image that cannot be decoded"""
    images: list[tuple[list[int], str]] = field(default_factory=list)
    """(H, W, C) and key of the first image, and of the first one of another shape"""
    labels: list[str] = field(default_factory=list)
    """the labels, as text"""
    label_keys: list[str] = field(default_factory=list)
    """of each the key of the first record that has it"""
    ignored: dict[str, int] = field(default_factory=dict)
    """files that are passed over: reason -> number"""
    examples: dict[str, str] = field(default_factory=dict)
    """reason -> the first one"""


Scans = dict[ScanJob, ShardScan]


def samples_file(out: Path, job: ScanJob) -> Path:
    """Returns where the samples of a scanned shard are stored until the index is complete.

    int64 (samples, 4): place and size of the image in bytes, the number of its label in
    `ShardScan.labels` or -1, and a hash of its key.
    """
    stated = [job.name, job.label, job.image, job.state]
    return out / SCANNED / f"{hashlib.sha256(json.dumps(stated).encode()).hexdigest()}.npy"


def scan_all(
    out: Path, jobs: list[ScanJob], processes: int | None, remote: RemoteConfig, progress: bool
) -> Scans:
    """Returns the result of every job, in their order; stored results are reused.

    Raises:
        UserError: some shards are broken, once all others are scanned; or at once, something else
            is wrong.
    """
    (out / SCANNED).mkdir(exist_ok=True)
    for download in (out / SCANNED).glob("*.tar*"):
        download.unlink()  # of a run that was killed
    scans = {job: scan for job in jobs if (scan := _load(out, job)) is not None}
    if scans:
        log.info(f"{len(scans)} of {len(jobs)} shards were scanned before")
    missing = [job for job in jobs if job not in scans]
    broken: dict[ScanJob, str] = {}
    work = functools.partial(_scan, out=out, remote=remote)
    with (
        tqdm(
            total=len(jobs), initial=len(scans), unit=" shards", disable=None if progress else True
        ) as bar,
        contextlib.closing(map_in_processes(work, missing, processes)) as results,
    ):
        for job, result in results:
            bar.update(1)
            if isinstance(result, str):
                broken[job] = result
            else:
                scans[job] = result
    if broken:
        reasons = [f"{job.shown} ({broken[job]})" for job in jobs if job in broken]
        raise UserError(
            f"{len(reasons)} of {len(jobs)} shards cannot be indexed: {'; '.join(reasons)}; repair"
            " them or leave them out of the patterns, and run the same command again: the other"
            " shards are not scanned again"
        )
    return {job: scans[job] for job in jobs}


def scan_warnings(scans: Scans) -> list[str]:
    """Returns what is odd about the shards but no error."""
    lines = []
    without_image = sum(scan.without_image for scan in scans.values())
    if without_image:
        job, scan = next(item for item in scans.items() if item[1].without_image)
        lines.append(
            f"{plural(without_image, 'record')} have no image: they do not count as samples; the first"
            f" is in {describe_record(job, scan.example)}"
        )
    skipped = [(job, *skip) for job, scan in scans.items() for skip in scan.skipped]
    if skipped:
        job, key, why = skipped[0]
        lines.append(
            f"{plural(len(skipped), 'image')} cannot be decoded and are left out: the first is in"
            f" {describe_record(job, key)} ({why}); skipped.tsv names all"
        )
    ignored = Counter[str]()
    for scan in scans.values():
        ignored.update(scan.ignored)
    for reason, count in ignored.items():
        job, scan = next(item for item in scans.items() if reason in item[1].examples)
        lines.append(
            f"{count} {reason} are passed over: the first is {scan.examples[reason]} of {job.shown}"
        )
    endless = [job for job, scan in scans.items() if not scan.has_end]
    if endless:
        lines.append(
            f"{len(endless)} shards lack the zeros at the end of a tar, the first is"
            f" {endless[0].shown}: if they were cut off, copy them again and index them again"
        )
    return lines


def describe_record(job: ScanJob, key: str) -> str:
    """Returns a record's name for messages."""
    return f"shard {job.shown}, record {key}"


def _scan(job: ScanJob, out: Path, remote: RemoteConfig) -> ShardScan | str:
    """Scans a shard and stores the result; returns the reason if the shard is broken.

    Raises UserError for a label that cannot be read, and for a failed download.
    """
    samples_path = samples_file(out, job)
    path, download = Path(job.location), samples_path.with_suffix(".tar")
    try:
        if is_remote(job.location):
            path = download
            fetch(job.location, path, remote)
        scan, samples = _scan_tar(path, job)
    except Missing:
        return "it does not exist"
    except ValueError as error:
        return str(error)
    except OSError as error:
        return error.strerror or str(error)
    finally:
        download.unlink(missing_ok=True)
    write_whole(samples_path, npy_bytes(samples), fsync=True)
    write_whole(samples_path.with_suffix(".json"), json.dumps([job.shown, asdict(scan)]))
    return scan


def _load(out: Path, job: ScanJob) -> ShardScan | None:
    """Returns the stored result of an earlier run, if it has one."""
    path = samples_file(out, job)
    try:
        _, scan = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        return ShardScan(**scan) if path.exists() else None
    except (FileNotFoundError, ValueError, TypeError):  # none; cut off; of another version
        return None


def _scan_tar(path: Path, job: ScanJob) -> tuple[ShardScan, Int64s]:
    scan = ShardScan()
    rows: list[tuple[int, int, int, int]] = []
    numbers: dict[str, int] = {}
    with open(path, "rb", buffering=0) as raw, io.BufferedReader(raw, 2**20) as file:
        scan.sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        scan.bytes = file.tell()
        file.seek(max(scan.bytes - BLOCK, 0))
        scan.has_end = not any(file.read())
        listing = list_records(file)
        for record in listing.records:
            place = _image(record, job, scan, file)
            if place is None:
                continue
            label = _label(record, job, file)
            if label is not None and label not in numbers:
                numbers[label] = len(numbers)
                scan.label_keys.append(record.key)
            number = UNLABELED if label is None else numbers[label]
            rows.append((*place, number, _key_hash(record.key)))
    scan.ignored, scan.examples = dict(listing.ignored), listing.examples
    scan.labels = list(numbers)
    if not rows and not scan.skipped:
        raise ValueError(_no_image(listing))
    return scan, np.array(rows, np.int64).reshape(-1, 4)


def _image(record: Record, job: ScanJob, scan: ShardScan, file: BinaryIO) -> tuple[int, int] | None:
    """Returns place and size of a record's image, None if it has none that can be decoded."""
    try:
        extension = image_of(record.files, job.image)
    except ValueError as error:
        raise ValueError(f"record {record.key}: {error}") from None
    if extension is None:
        scan.without_image += 1
        scan.example = scan.example or record.key
        return None
    place = record.files[extension]
    file.seek(place.offset)
    try:
        image_hwc = list(check(file.read(place.size)))
    except ValueError as error:
        scan.skipped.append((record.key, str(error)))
        return None
    if len(scan.images) < 2 and image_hwc not in (seen for seen, _ in scan.images):
        scan.images.append((image_hwc, record.key))
    return place


def _label(record: Record, job: ScanJob, file: BinaryIO) -> str | None:
    try:
        return plain_label(label_of(record.key, record.files, job.label, file))
    except ValueError as error:
        raise UserError(
            f"{describe_record(job, record.key)}: {error}; labels are read from {job.label}: --label"
            " names another place"
        ) from None


def _key_hash(key: str) -> int:
    digest = hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") >> (64 - KEY_BITS)


def _no_image(listing: Listing) -> str:
    for record in listing.records:
        for extension in record.files:
            if image_of({extension.rpartition(".")[2]: None}) is not None:
                return (
                    f"it holds no image: {record.key}.{extension} has the extension {extension}, since"
                    " a key ends at the first dot: rename the files, or give one by --image"
                )
    return "it holds no image"
