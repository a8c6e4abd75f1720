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
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

from sgan_dist.config import RemoteConfig
from sgan_dist.data.images import header
from sgan_dist.data.order import Int64s
from sgan_dist.data.prepare.folder import npy_bytes
from sgan_dist.data.prepare.processes import map_in_processes
from sgan_dist.data.records import BLOCK, image_of, label_of, records
from sgan_dist.data.remote.transfer import Missing, fetch
from sgan_dist.data.remote.urls import is_remote
from sgan_dist.errors import UserError
from sgan_dist.files import write_whole

# in the folder of the index, until it is complete: of each shard the result (.json), the record
# offsets (.npy), and meanwhile its download (.tar)
SCANNED = ".scanned"
MAX_CLASSES = 10**6  # a larger label is an error

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ScanJob:
    """A shard to scan. Equal jobs give equal results.

    `label` is the place of the class number, None in the unlabeled split. `state` holds the size
    and the modification time of a local file: with another state it is another file.
    """

    split: str
    location: str
    label: str | None
    state: str


@dataclass
class ShardScan:
    """What a shard holds, whatever the options. `..._key` is the key of a record, to name it."""

    samples: int = 0
    bytes: int = 0
    sha256: str = ""
    has_end: bool = False
    """whether the file ends in zeros, as tars should, and not just after a record"""
    without_image: int = 0
    """records without an image, which are not samples"""
    unreadable: int = 0
    """images with an unreadable header"""
    unreadable_key: str = ""
    images: list[tuple[list[int], str]] = field(default_factory=list)
    """(H, W, C) and key of the first readable image, and of the first one of another shape"""
    histogram: dict[str, int] = field(default_factory=dict)
    """label (as text, for JSON) -> samples"""
    largest_label: int = -1
    largest_key: str = ""


Scans = dict[ScanJob, ShardScan]


def offsets_file(out: Path, job: ScanJob) -> Path:
    """Returns where a scanned shard's offsets are stored until the index is complete.

    int64 (samples + 1,): the bytes at which the samples' records begin, and the end of the last.
    """
    name = hashlib.sha256(json.dumps(asdict(job)).encode()).hexdigest()
    return out / SCANNED / f"{name}.npy"


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
        reasons = [f"{job.location} ({broken[job]})" for job in jobs if job in broken]
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
        lines.append(f"{without_image} records have no image: they do not count as samples")
    unreadable = sum(scan.unreadable for scan in scans.values())
    if unreadable:
        job, scan = next(item for item in scans.items() if item[1].unreadable)
        lines.append(
            f"{unreadable} images cannot be read: training skips them, up to data.max_skips; the"
            f" first is in {describe_record(job, scan.unreadable_key)}"
        )
    endless = [job for job, scan in scans.items() if not scan.has_end]
    if endless:
        lines.append(
            f"{len(endless)} shards lack the zeros at the end of a tar, the first is"
            f" {endless[0].location}: if they were cut off, copy them again and index them again"
        )
    return lines


def describe_record(job: ScanJob, key: str) -> str:
    """Returns a record's name for messages."""
    return f"{job.split} shard {job.location}, record {key}"


def _scan(job: ScanJob, out: Path, remote: RemoteConfig) -> ShardScan | str:
    """Scans a shard and stores the result; returns the reason if the shard is broken.

    Raises UserError for a wrong label, and for a failed download.
    """
    offsets_path = offsets_file(out, job)
    path, download = Path(job.location), offsets_path.with_suffix(".tar")
    try:
        if is_remote(job.location):
            path = download
            fetch(job.location, path, remote)
        scan, offsets = _scan_tar(path, job)
    except Missing:
        return "it does not exist"
    except ValueError as error:
        return str(error)
    except OSError as error:
        return error.strerror or str(error)
    finally:
        download.unlink(missing_ok=True)
    write_whole(offsets_path, npy_bytes(offsets), fsync=True)
    write_whole(offsets_path.with_suffix(".json"), json.dumps([asdict(job), asdict(scan)]))
    return scan


def _load(out: Path, job: ScanJob) -> ShardScan | None:
    """Returns the stored result of an earlier run, if it has one."""
    path = offsets_file(out, job)
    try:
        _, scan = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        return ShardScan(**scan) if path.exists() else None
    except (FileNotFoundError, ValueError, TypeError):  # none; cut off; of another version
        return None


def _scan_tar(path: Path, job: ScanJob) -> tuple[ShardScan, Int64s]:
    scan = ShardScan()
    offsets: list[int] = []
    histogram: Counter[int] = Counter()
    end = 0
    with open(path, "rb", buffering=0) as raw, io.BufferedReader(raw, 2**20) as file:
        scan.sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        scan.bytes = file.tell()
        file.seek(max(scan.bytes - BLOCK, 0))
        scan.has_end = not any(file.read())
        for record in records(file):
            image = image_of(record.files)
            if image is None:  # not a sample, as in `records.samples`
                scan.without_image += 1
                continue
            offsets.append(record.offset)
            end = record.end
            try:
                image_hwc = list(header(image[1]))
            except ValueError:
                scan.unreadable += 1
                scan.unreadable_key = scan.unreadable_key or record.key
            else:
                if len(scan.images) < 2 and image_hwc not in (seen for seen, _ in scan.images):
                    scan.images.append((image_hwc, record.key))
            if job.label is not None:
                label = _label(record.files, job, record.key)
                histogram[label] += 1
                if label > scan.largest_label:
                    scan.largest_label, scan.largest_key = label, record.key
    if not offsets:
        raise ValueError("it holds no image")
    scan.samples = len(offsets)
    scan.histogram = {str(label): count for label, count in sorted(histogram.items())}
    return scan, np.array([*offsets, end], np.int64)


def _label(files: Mapping[str, bytes], job: ScanJob, key: str) -> int:
    assert job.label is not None
    try:
        label = label_of(files, job.label)
        if label >= MAX_CLASSES:
            raise ValueError(f"the label {label} is too large for a class number")
        return label
    except ValueError as error:
        raise UserError(
            f"{describe_record(job, key)}: {error}; labels are numbers from 0 on, read from"
            f" {job.label}: --label names another place"
        ) from None
