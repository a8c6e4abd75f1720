"""An index for WebDataset tars that others wrote, which are read where they lie and never changed.

DIR gets index.json and a sidecar of record offsets for every shard. Each shard is scanned once:
what was found is kept in a journal in DIR until the index is there, so a run that was stopped
goes on.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import errno
import fcntl
import hashlib
import json
import multiprocessing
import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from tqdm import tqdm

from sgan_dist.data.index import (
    DEFAULT,
    INDEX_NAME,
    ORDERS,
    SPLITS,
    DatasetIndex,
    Shard,
    SplitIndex,
    load_index,
    order_for,
    save,
    sidecar_name,
    with_fingerprint,
)
from sgan_dist.data.order import ORDER_VERSION
from sgan_dist.data.patterns import expand
from sgan_dist.data.remote import Transport, is_remote
from sgan_dist.data.scan import INCOMING, Facts, Task, die_with, scan
from sgan_dist.errors import UserError

JOURNAL = "index.journal"

Found = dict[Task, Facts]


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
    transport: Transport = DEFAULT,
    progress: bool = True,
) -> DatasetIndex:
    """Index the shards of four splits into the folder `out` and return the index.

    Args:
        unlabeled, labeled, validation, test: the patterns of each split's shards, see
            `patterns.expand`. The unlabeled split is what trains without labels: name the
            labeled shards there too, if they are to be among it.
        out: the folder to make; absent, empty, or of an earlier run.
        image_size: side in pixels to which images are scaled and cropped as they are read; None
            takes them as they are, which must be of one size.
        gray: take resized images as gray, not as RGB.
        label: where a record's class number is: `cls` or `json:KEY`.
        class_names: a text file of a name a line, class 0 first; None calls them by number.
        order: of the unlabeled split: `full`, `windowed`, or `auto`, by size as in other splits.
        jobs: processes that scan, one a core by default.
        transport: how patiently remote shards are brought.
        progress: a progress bar, and lines of what was passed over.

    Raises:
        UserError: there is no such shard, one is broken, what they hold does not go together, or
            `out` holds something else. Shards that were scanned are not scanned again.
    """
    names = None if class_names is None else _class_names(Path(class_names))
    _check_options(image_size, gray, label, order, jobs)
    patterns = dict(zip(SPLITS, (labeled, unlabeled, validation, test), strict=True))
    locations = {split: expand(patterns[split], split) for split in SPLITS}
    request = "; ".join(
        (
            *(f"{split} {' '.join(patterns[split])}" for split in SPLITS),
            f"label {label}",
            "images as they are" if image_size is None else f"images of {image_size} pixels",
            *(["gray"] if gray else []),
            *([] if names is None else [f"{len(names)} named classes {_digest(names)}"]),
            f"unlabeled order {order}",
        )
    )
    out = Path(out).resolve()
    try:
        with _locked(out):
            existing = _existing(out, request, locations)
            if existing is not None:
                (out / JOURNAL).unlink(missing_ok=True)
                if progress:
                    print(f"{out} already holds this dataset: nothing to do", file=sys.stderr)
                return existing
            (out / JOURNAL).touch()
            found = _scan_all(out, _tasks(locations, label), names, image_size, jobs,
                              transport, progress)
            shape = _image_shape(found, image_size, gray)
            histograms = _histograms(found, names)
            index = with_fingerprint(
                DatasetIndex(
                    **{split: _split(found, split, shape, histograms, order) for split in SPLITS},
                    image_shape=shape,
                    class_names=names or tuple(map(str, range(len(histograms["labeled"])))),
                    label=label,
                    resize=image_size is not None,
                    source="tars",
                    request=request,
                    label_seed=0,
                    labels_per_class=0,
                    order_version=ORDER_VERSION,
                    fingerprint="",
                )
            )
            _finish(out, index)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        advice = "free space" if full else "choose another --out"
        raise UserError(f"cannot write {out}: {error.strerror}; {advice}") from None
    if progress:
        for line in _remarks(found, index):
            print(line, file=sys.stderr)
    return index


def _check_options(
    image_size: int | None, gray: bool, label: str, order: str, jobs: int | None
) -> None:
    if image_size is not None and image_size < 1:
        raise UserError(f"image size is {image_size}, and must be at least 1")
    if gray and image_size is None:
        raise UserError("gray images are made with a size: give --image-size as well as --gray")
    if label != "cls" and not (label.startswith("json:") and label != "json:"):
        raise UserError(f"unknown label {label!r}: use cls or json:KEY")
    if order not in ("auto", *ORDERS):
        raise UserError(f"unknown order {order!r}: use auto, {' or '.join(ORDERS)}")
    if jobs is not None and jobs < 1:
        raise UserError(f"jobs is {jobs}, and must be at least 1")


def _class_names(path: Path) -> tuple[str, ...]:
    try:
        names = tuple(line.strip() for line in path.read_text(encoding="utf-8").splitlines())
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "not UTF-8 text"
        raise UserError(f"cannot read class names from {path}: {why}") from None
    if not names or "" in names or len(set(names)) < len(names):
        raise UserError(f"{path} must hold a name a line, none empty and none twice")
    return names


def _digest(names: tuple[str, ...]) -> str:
    return hashlib.sha256("\n".join(names).encode()).hexdigest()[:12]


@contextlib.contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Make the folder, and hold it against other runs."""
    out.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(out, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise UserError(f"another run is indexing {out} right now: wait for it to end") from None
    finally:
        os.close(descriptor)


def _existing(
    out: Path, request: str, locations: Mapping[str, Sequence[str]]
) -> DatasetIndex | None:
    """The index that was made of the same shards and options; UserError where `out` is another's.

    The journal of an unfinished run is of whatever patterns: each of its shards is looked up.
    """
    if not (out / INDEX_NAME).is_file():
        if (out / JOURNAL).is_file() or not any(out.iterdir()):
            return None
        raise UserError(
            f"{out} exists and holds no index: choose another --out, or empty it yourself"
        )
    index = load_index(out)
    shards = {split: [shard.name for shard in index.split(split).shards] for split in SPLITS}
    if index.request != request or shards != locations:
        again = "" if index.request != request else ", and the patterns match other shards now"
        raise UserError(
            f"{out} holds another dataset: there is [{index.request}], asked for is [{request}]"
            f"{again}; choose another --out, or remove that folder yourself"
        )
    return index


def _tasks(locations: Mapping[str, Sequence[str]], label: str) -> list[Task]:
    tasks = []
    for split in SPLITS:
        for number, location in enumerate(locations[split]):
            stat = None if is_remote(location) else Path(location).stat()
            identity = "" if stat is None else f"{stat.st_size} {stat.st_mtime_ns}"
            needed = None if split == "unlabeled" else label
            tasks.append(Task(split, number, location, needed, identity))
    return tasks


def _scan_all(
    out: Path,
    tasks: list[Task],
    names: tuple[str, ...] | None,
    image_size: int | None,
    jobs: int | None,
    transport: Transport,
    progress: bool,
) -> Found:
    """What every shard holds, in order; what an earlier run found is taken from the journal."""
    known = _journal(out)
    found = {task: known[task] for task in tasks if task in known}
    agreement = _Agreement(names, image_size)
    for task, facts in found.items():
        agreement.check(task, facts)
    if found and progress:
        print(f"{len(found)} of {len(tasks)} shards were scanned before", file=sys.stderr)
    shutil.rmtree(out / INCOMING, ignore_errors=True)  # what a killed run left
    for folder in (INCOMING, *SPLITS):
        (out / folder).mkdir(exist_ok=True)
    broken: dict[Task, str] = {}
    with (
        open(out / JOURNAL, "a", encoding="utf-8") as journal,
        tqdm(
            total=len(tasks), initial=len(found), unit=" shards", disable=None if progress else True
        ) as bar,
    ):
        journal.write("\n")  # a killed run may have left half a line
        missing = [task for task in tasks if task not in found]
        for task, result in _in_processes(missing, out, transport, jobs):
            bar.update(1)
            if isinstance(result, str):
                broken[task] = result
                continue
            # kept before it is checked: other options may agree with it
            _note(journal, task, result)
            agreement.check(task, result)
            found[task] = result
    if broken:
        several = [f"{task.location} ({broken[task]})" for task in tasks if task in broken]
        raise UserError(
            f"{len(several)} of {len(tasks)} shards cannot be indexed: {'; '.join(several)}; "
            "mend them or leave them out of the patterns, and run the same again: the others "
            "are not scanned anew"
        )
    return {task: found[task] for task in tasks}


def _in_processes(
    tasks: list[Task], out: Path, transport: Transport, jobs: int | None
) -> Iterator[tuple[Task, Facts | str]]:
    """Scan in several processes, which end when this one does, however it ends."""
    if not tasks:
        return
    count = min(jobs or len(os.sched_getaffinity(0)), len(tasks))
    context = multiprocessing.get_context("forkserver")
    lifeline, ours = context.Pipe(duplex=False)
    executor = concurrent.futures.ProcessPoolExecutor(count, context, die_with, (lifeline,))
    try:
        with executor:
            try:
                futures = {executor.submit(scan, task, out, transport): task for task in tasks}
                for future in concurrent.futures.as_completed(futures):
                    yield futures.pop(future), future.result()
            except BaseException:
                ours.close()  # don't wait for shards that are being scanned
                raise
    except BrokenProcessPool:
        raise UserError(
            "a process that scans was killed, perhaps for want of memory: run the same again "
            f"with fewer --jobs than {count}; what was scanned is kept"
        ) from None
    finally:
        ours.close()
        lifeline.close()


def _journal(out: Path) -> Found:
    """What earlier runs found; a line that was cut short is passed over."""
    known: Found = {}
    for line in (out / JOURNAL).read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            task, facts = json.loads(line)
            entry = Task(**task), Facts(**facts)
        except (ValueError, TypeError):
            continue
        if (out / sidecar_name(entry[0].split, entry[0].number)).is_file():
            known[entry[0]] = entry[1]
    return known


def _note(journal: IO[str], task: Task, facts: Facts) -> None:
    journal.write(json.dumps([asdict(task), asdict(facts)]) + "\n")
    journal.flush()
    os.fsync(journal.fileno())
