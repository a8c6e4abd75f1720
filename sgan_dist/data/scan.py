"""What an index has to know of tars, found in several processes and kept in a journal.

The journal has a line a shard: the task and what was found, as JSON. It lets a run that was
stopped go on, and other options use what they have in common.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import hashlib
import io
import json
import multiprocessing
import os
import shutil
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import IO

import numpy as np
from tqdm import tqdm

from sgan_dist.data.images import header
from sgan_dist.data.records import BLOCK, image_of, label_of, records
from sgan_dist.data.remote import Missing, Transport, fetch, is_remote
from sgan_dist.errors import UserError

JOURNAL = "index.journal"
SCANNED = ".scanned"  # below the index's folder, as is the journal
INCOMING = ".incoming"  # what is being brought or written
MOST_CLASSES = 10**6  # a larger label is no class number


@dataclass(frozen=True)
class Task:
    """A shard to scan, whatever its number will be. Equal tasks give equal facts.

    `label` is where the class number is, None in the unlabeled split; `state` the size and the
    time of change of a local file, which tell another file of the same name.
    """

    split: str
    location: str
    label: str | None
    state: str


@dataclass(frozen=True)
class Facts:
    """What a shard holds, whatever the options. `..._key` is a record's key, to name it.

    `ended` tells whether the file ends in zeros, as tars should, and not just after a record.
    `shape` is the first readable image's (H, W, C), `other` that of the first that differs;
    `histogram` maps labels (as JSON wants it, in text) to samples; `passed_over` counts records
    without an image, `unreadable` images whose header can't be read.
    """

    samples: int
    bytes: int
    sha256: str
    ended: bool
    passed_over: int
    unreadable: int
    unreadable_key: str
    shape: list[int]
    shape_key: str
    other: list[int]
    other_key: str
    histogram: dict[str, int]
    largest_label: int
    largest_key: str


def offsets_file(out: Path, task: Task) -> Path:
    """Where a scanned shard's offsets are until the index is made.

    int64 (samples + 1,): the bytes at which the samples' records begin, and the last one's end.
    """
    return out / SCANNED / f"{_name(task)}.npy"


def _name(task: Task) -> str:
    return hashlib.sha256(json.dumps(asdict(task)).encode()).hexdigest()


def scan_all(
    out: Path,
    tasks: list[Task],
    check: Callable[[Task, Facts], None],
    jobs: int | None,
    transport: Transport,
    progress: bool,
) -> dict[Task, Facts]:
    """What every shard holds, in the tasks' order; what an earlier run found is not scanned again.

    `check` sees each shard's facts as they are there. Raises what it raises, and UserError where
    shards are broken, once all others are done, or at once where something else is wrong.
    """
    known = _journal(out)
    found = {task: known[task] for task in tasks if task in known}
    for task, facts in found.items():
        check(task, facts)
    if found and progress:
        print(f"{len(found)} of {len(tasks)} shards were scanned before", file=sys.stderr)
    shutil.rmtree(out / INCOMING, ignore_errors=True)  # what a killed run left
    for folder in (INCOMING, SCANNED):
        (out / folder).mkdir(exist_ok=True)
    broken: dict[Task, str] = {}
    with (
        open(out / JOURNAL, "a", encoding="utf-8") as journal,
        tqdm(
            total=len(tasks), initial=len(found), unit=" shards", disable=None if progress else True
        ) as bar,
    ):
        journal.write("\n")  # after a line that a killed run may have left unfinished
        missing = [task for task in tasks if task not in found]
        with contextlib.closing(_in_processes(missing, out, transport, jobs)) as results:
            for task, result in results:
                bar.update(1)
                if isinstance(result, str):
                    broken[task] = result
                    continue
                # kept before it is checked: it may be right with other options
                _note(journal, task, result)
                check(task, result)
                found[task] = result
    if broken:
        several = [f"{task.location} ({broken[task]})" for task in tasks if task in broken]
        raise UserError(
            f"{len(several)} of {len(tasks)} shards cannot be indexed: {'; '.join(several)}; "
            "mend them or leave them out of the patterns, and run the same again: the others "
            "are not scanned anew"
        )
    return {task: found[task] for task in tasks}


def remarks(found: Mapping[Task, Facts]) -> list[str]:
    """What was met and is no error, but should not go unsaid."""
    lines = []
    passed_over = sum(facts.passed_over for facts in found.values())
    if passed_over:
        lines.append(f"{passed_over} records have no image: they don't count as samples")
    unreadable = sum(facts.unreadable for facts in found.values())
    if unreadable:
        task, facts = next(item for item in found.items() if item[1].unreadable)
        lines.append(
            f"{unreadable} images can't be read: training skips them, up to data.max_skips; "
            f"the first is in {place(task, facts.unreadable_key)}"
        )
    endless = [task for task, facts in found.items() if not facts.ended]
    if endless:
        lines.append(
            f"{len(endless)} shards lack the zeros that tars end with, the first is "
            f"{endless[0].location}: if they were cut short, bring them again and index anew"
        )
    return lines


def place(task: Task, key: str) -> str:
    """A record in words."""
    return f"{task.split} shard {task.location}, record {key}"


def _in_processes(
    tasks: list[Task], out: Path, transport: Transport, jobs: int | None
) -> Generator[tuple[Task, Facts | str]]:
    """Scan in several processes, which end when this one does, however it ends."""
    if not tasks:
        return
    count = min(jobs or len(os.sched_getaffinity(0)), len(tasks))
    context = multiprocessing.get_context("spawn")  # fsspec has threads, which no fork survives
    lifeline, ours = context.Pipe(duplex=False)
    executor = concurrent.futures.ProcessPoolExecutor(count, context, _die_with, (lifeline,))
    try:
        with executor:
            try:
                with _without_interrupts():
                    futures = {executor.submit(_scan, task, out, transport): task for task in tasks}
                for future in concurrent.futures.as_completed(futures):
                    yield futures.pop(future), future.result()
            except BaseException:
                ours.close()  # don't wait for shards that are being scanned
                raise
    except BrokenProcessPool:
        fewer = f" with fewer --jobs than {count}" if count > 1 else ""
        raise UserError(
            "a process that scans was killed, perhaps for want of memory: run the same again"
            f"{fewer}; what was scanned is kept"
        ) from None
    finally:
        ours.close()
        lifeline.close()


def _journal(out: Path) -> dict[Task, Facts]:
    """What earlier runs found; a line that was cut short is passed over."""
    known: dict[Task, Facts] = {}
    for line in (out / JOURNAL).read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            task, facts = json.loads(line)
            entry = Task(**task), Facts(**facts)
        except (ValueError, TypeError):
            continue
        if offsets_file(out, entry[0]).is_file():
            known[entry[0]] = entry[1]
    return known


def _note(journal: IO[str], task: Task, facts: Facts) -> None:
    journal.write(json.dumps([asdict(task), asdict(facts)]) + "\n")
    journal.flush()


@contextlib.contextmanager
def _without_interrupts() -> Iterator[None]:
    """Ctrl-C waits until the end, and the processes that are started here never get theirs.

    A terminal sends it to them too: one that is still importing would die of it with a traceback,
    and the pool with it. They inherit the mask; and a handler keeps what another thread receives.
    """
    if threading.current_thread() is not threading.main_thread():  # where no Ctrl-C is raised
        yield
        return
    received: list[int] = []
    handler = signal.signal(signal.SIGINT, lambda number, _frame: received.append(number))
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if received:
            signal.raise_signal(signal.SIGINT)


def _die_with(lifeline: Connection) -> None:
    """Let this process end as soon as the other end of the pipe is closed, by whatever death."""

    def watch() -> None:
        wait([lifeline])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _scan(task: Task, out: Path, transport: Transport) -> Facts | str:
    """Scan a shard and write its `offsets_file`, or tell why it is broken.

    Raises UserError for what is wrong with more than this shard: transport, and labels.
    """
    arrived = out / INCOMING / f"{_name(task)}.tar"
    path = Path(task.location)
    try:
        if is_remote(task.location):
            fetch(task.location, arrived, transport)
            path = arrived
        facts, offsets = _read(path, task)
    except Missing:
        return "it is not there"
    except ValueError as error:
        return str(error)
    except OSError as error:
        return error.strerror or str(error)
    finally:
        arrived.unlink(missing_ok=True)
    written = out / INCOMING / f"{_name(task)}.npy"
    with open(written, "wb") as file:
        np.save(file, np.asarray(offsets, np.int64))
        file.flush()
        os.fsync(file.fileno())
    written.replace(offsets_file(out, task))
    return facts


def _read(path: Path, task: Task) -> tuple[Facts, list[int]]:
    offsets: list[int] = []
    passed_over = unreadable = 0
    unreadable_key = shape_key = other_key = largest_key = ""
    shape: list[int] = []
    other: list[int] = []
    histogram: Counter[int] = Counter()
    largest = -1
    end = 0
    with open(path, "rb", buffering=0) as raw, io.BufferedReader(raw, 2**20) as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        size = file.tell()
        file.seek(max(size - BLOCK, 0))
        ended = not any(file.read())
        for record in records(file):
            image = image_of(record.files)
            if image is None:  # as `records.samples` has it, which readers use
                passed_over += 1
                continue
            offsets.append(record.offset)
            end = record.end
            try:
                found = list(header(image[1]))
            except ValueError:
                unreadable += 1
                unreadable_key = unreadable_key or record.key
            else:
                if not shape:
                    shape, shape_key = found, record.key
                elif found != shape and not other:
                    other, other_key = found, record.key
            if task.label is not None:
                label = _label(record.files, task, record.key)
                histogram[label] += 1
                if label > largest:
                    largest, largest_key = label, record.key
    if not offsets:
        raise ValueError("it holds no image")
    facts = Facts(
        samples=len(offsets),
        bytes=size,
        sha256=sha256,
        ended=ended,
        passed_over=passed_over,
        unreadable=unreadable,
        unreadable_key=unreadable_key,
        shape=shape,
        shape_key=shape_key,
        other=other,
        other_key=other_key,
        histogram={str(label): count for label, count in sorted(histogram.items())},
        largest_label=largest,
        largest_key=largest_key,
    )
    return facts, [*offsets, end]


def _label(files: Mapping[str, bytes], task: Task, key: str) -> int:
    assert task.label is not None
    try:
        label = label_of(files, task.label)
        if label >= MOST_CLASSES:
            raise ValueError(f"the label {label} is no class number")
        return label
    except ValueError as error:
        raise UserError(
            f"{place(task, key)}: {error}; labels are numbers from "
            f"0 on, taken from {task.label} here: --label names another place"
        ) from None
