"""Decodes a source's images to one shape, in several processes; a stopped run continues.

Each part of the source becomes one file of pixels, in the source's order. So memory does not grow with
the number of images, and the splits are drawn among images that are known to be good.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from sgan_dist.data.images import Resize, decode, describe_shape, fit, header
from sgan_dist.data.order import Int64s
from sgan_dist.data.prepare.folder import SKIPPED, Skipped
from sgan_dist.data.prepare.processes import map_in_processes
from sgan_dist.data.prepare.sources.source import CHUNK, Bytes, Chunk, Encoded, Part, Source
from sgan_dist.data.records import UNLABELED
from sgan_dist.errors import UserError, plural
from sgan_dist.files import write_whole

FEW = 2000  # images that one process decodes before others would have started
SKIPS_SHOWN = 5

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pool:
    """Decoded images of a part: uint8 (n, H, W, C); labels, known labels: int64 (n,), -1 for none.

    `good` has the rows that could be decoded, ascending.
    """

    images: Bytes
    labels: Int64s
    known: Int64s
    good: Int64s


@dataclass(frozen=True)
class PixelRules:
    """How images become uint8 `image_hwc`."""

    image_hwc: tuple[int, int, int]
    resize: Resize


def pixel_rules(
    source: Source, size: tuple[int, int] | None, resize: Resize, gray: bool
) -> PixelRules:
    """Returns the rules for a source; without a size, the shape is that of its first good image.

    Raises:
        UserError: no image can be read.
    """
    images = source.train.images
    if isinstance(images, Encoded):
        if size is not None:
            return PixelRules((*size, 1 if gray else 3), resize)
        return PixelRules(_first_shape(source.train), "none")
    height, width, channels = images.shape[1:]
    if size is None:
        return PixelRules((height, width, channels), "none")
    if channels not in (1, 3):
        raise UserError(f"{source.name} has images of {channels} channels: they cannot be resized")
    return PixelRules((*size, 1 if gray else channels), resize)


def pools_of_arrays(source: Source) -> dict[str, Pool]:
    """Returns the parts of a source whose images are arrays of one shape already."""
    pools = {}
    for name in ("train", "validation", "test"):
        part: Part | None = getattr(source, name)
        if part is not None:
            rows = np.arange(len(part.array))
            pools[name] = Pool(part.array, part.labels, part.known, rows)
    return pools


def must_decode(source: Source, rules: PixelRules) -> bool:
    """Returns whether the source's parts are not yet arrays of the right shape."""
    parts = (source.train, source.validation, source.test)
    return source.unlabeled is not None or any(
        part is not None
        and (isinstance(part.images, Encoded) or part.images.shape[1:] != rules.image_hwc)
        for part in parts
    )


@contextlib.contextmanager
def decoded(
    source: Source, rules: PixelRules, folder: Path, work: str, jobs: int | None, progress: bool
) -> Iterator[tuple[dict[str, Pool], list[Skipped]]]:
    """Yields the decoded parts, and the images that could not be decoded.

    `train` includes the source's further unlabeled images. What is decoded stays in `folder` until the
    block has ended without an error; the same `work`, in words, continues with it.

    Raises:
        UserError: images have several shapes and are not to be resized, or a part has no good image.
    """
    note = folder / "work"
    if not note.exists() or note.read_text() != work:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        write_whole(note, work)
    parts = {
        "train": [part for part in (source.train, source.unlabeled) if part is not None],
        "validation": [source.validation] if source.validation is not None else [],
        "test": [source.test] if source.test is not None else [],
    }
    all_jobs = {name: _jobs(folder, name, some, rules) for name, some in parts.items() if some}
    total = sum(len(part.labels) for some in parts.values() for part in some)
    skips = _run([job for some in all_jobs.values() for job in some], total, jobs, progress)
    pools: dict[str, Pool] = {}
    skipped: list[Skipped] = []
    for name, some in parts.items():
        if not some:
            continue
        names = [part.name(row) for part in some for row in range(len(part.labels))]
        bad = {job.first + row: why for job in all_jobs[name] for row, why in skips[job.done]}
        skipped += [Skipped(name, names[row], why) for row, why in bad.items()]
        if len(bad) == len(names):
            last = skipped[-1]
            raise UserError(
                f"none of the {len(names)} {name} images of {source.name} can be decoded; the last is"
                f" {last.name} ({last.why}): check these files"
            )
        shape = (len(names), *rules.image_hwc)
        known = np.concatenate([part.known for part in some])
        labels, own = np.full_like(known, UNLABELED), some[0].labels
        labels[: len(own)] = own  # further unlabeled images have none
        pools[name] = Pool(
            images=np.memmap(folder / f"{name}.u8", np.uint8, "r", shape=shape),
            labels=labels,
            known=known,
            good=np.setdiff1d(np.arange(len(names)), list(bad)),
        )
    if skipped:
        shown = "; ".join(f"{skip.name} ({skip.why})" for skip in skipped[:SKIPS_SHOWN])
        log.warning(
            f"{plural(len(skipped), 'image')} of {total} cannot be decoded and are left out: {shown}"
            f"{', ...' if len(skipped) > SKIPS_SHOWN else ''}; {SKIPPED} names all"
        )
    yield pools, skipped
    shutil.rmtree(folder)


@dataclass(frozen=True)
class _Job:
    """A chunk to decode into the rows of a file from `first` on; `done` notes its skips."""

    chunk: Chunk
    file: Path
    first: int
    done: Path
    rules: PixelRules


def _jobs(folder: Path, name: str, parts: Sequence[Part], rules: PixelRules) -> list[_Job]:
    jobs: list[_Job] = []
    first = 0
    for part in parts:
        for chunk in _chunks(part.images):
            done = folder / f"{name}-{len(jobs):06d}.json"
            jobs.append(_Job(chunk, folder / f"{name}.u8", first, done, rules))
            first += chunk.rows
    size = first * math.prod(rules.image_hwc)
    with open(folder / f"{name}.u8", "ab") as file:
        os.truncate(file.fileno(), size)
    return jobs


def _chunks(images: Bytes | Encoded) -> Sequence[Chunk]:
    if isinstance(images, Encoded):
        return images.chunks
    parts = (images[start : start + CHUNK] for start in range(0, len(images), CHUNK))
    return [Chunk(len(part), _Array(part)) for part in parts]


@dataclass(frozen=True)
class _Array:
    images: Bytes

    def __call__(self) -> Iterator[Bytes]:
        return iter(self.images)


def _run(
    jobs: Sequence[_Job], total: int, processes: int | None, progress: bool
) -> dict[Path, list[tuple[int, str]]]:
    """Decodes what is missing; returns the skips of every job, by its note."""
    skips: dict[Path, list[tuple[int, str]]] = {}
    for job in jobs:
        if job.done.exists():
            skips[job.done] = [(row, why) for row, why in json.loads(job.done.read_text())]
    missing = [job for job in jobs if job.done not in skips]
    before = sum(job.chunk.rows for job in jobs if job.done in skips)
    if before:
        log.info(f"{before} of {total} images were decoded before")
    with tqdm(
        total=total, initial=before, unit=" images", disable=None if progress else True
    ) as bar:
        for job, found in map_in_processes(_decode, missing, processes, total > FEW):
            skips[job.done] = found
            bar.update(job.chunk.rows)
    return skips


def _decode(job: _Job) -> list[tuple[int, str]]:
    """Writes a chunk's pixels; returns (row in the chunk, reason) of each image without any."""
    block = np.zeros((job.chunk.rows, *job.rules.image_hwc), np.uint8)
    skips: list[tuple[int, str]] = []
    row = -1
    for row, item in enumerate(job.chunk.read()):
        if isinstance(item, str):
            skips.append((row, item))
            continue
        try:
            block[row] = _pixels(item, job.rules)
        except ValueError as error:
            skips.append((row, str(error)))
    if row + 1 != job.chunk.rows:
        raise UserError(
            f"a file has {row + 1} images where it had {job.chunk.rows}: it has changed meanwhile; run"
            " the same command again"
        )
    with open(job.file, "r+b") as file:
        file.seek(job.first * block[0].nbytes)
        file.write(block.data)
        file.flush()
        os.fsync(file.fileno())
    write_whole(job.done, json.dumps(skips))
    return skips


def _pixels(item: bytes | Bytes, rules: PixelRules) -> Bytes:
    if isinstance(item, np.ndarray):
        return fit(item, rules.image_hwc, rules.resize)
    if rules.resize == "none" and (shape := header(item)) != rules.image_hwc:
        raise UserError(
            f"images differ: the first is {describe_shape(rules.image_hwc)}, another"
            f" {describe_shape(shape)}; --image_size N scales and crops them to one size"
        )
    return decode(item, rules.image_hwc, rules.resize)


def _first_shape(part: Part) -> tuple[int, int, int]:
    reason = "there are none"
    for chunk in _chunks(part.images):
        for item in chunk.read():
            if isinstance(item, str):
                reason = item
                continue
            if isinstance(item, np.ndarray):
                height, width, channels = item.shape
                return height, width, channels
            try:
                return header(item)
            except ValueError as error:
                reason = str(error)
    raise UserError(f"none of {len(part.labels)} images can be read ({reason}): check these files")
