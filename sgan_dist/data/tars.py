"""An index for WebDataset tars that others wrote, which are read where they lie and never changed.

DIR gets index.json and a sidecar of record offsets for every shard. Each shard is scanned once:
what was found is kept in a journal in DIR until the index is there, so a run that was stopped
goes on.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sgan_dist.data.index import (
    DEFAULT,
    INDEX_NAME,
    ORDERS,
    SPLITS,
    DatasetIndex,
    Shard,
    SplitIndex,
    load_index,
    made_by,
    order_for,
    save,
    sidecar_name,
    with_fingerprint,
)
from sgan_dist.data.order import ORDER_VERSION
from sgan_dist.data.patterns import expand
from sgan_dist.data.remote import Transport, is_remote
from sgan_dist.data.scan import (
    INCOMING,
    JOURNAL,
    SCANNED,
    Facts,
    Task,
    offsets_file,
    place,
    remarks,
    scan_all,
)
from sgan_dist.errors import UserError

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
                _clear(out)  # a run may have been killed at its very end
                if progress:
                    print(f"{out} already holds this dataset: nothing to do", file=sys.stderr)
                return existing
            (out / JOURNAL).touch()
            tasks = _tasks(locations, label)
            agreement = _Agreement(names, image_size)
            found = scan_all(out, tasks, agreement.check, jobs, transport, progress)
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
            _finish(out, index, found)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        advice = "free space there and run the same again" if full else "choose another --out"
        raise UserError(f"cannot use {error.filename or out}: {error.strerror}; {advice}") from None
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
    shards = {split: tuple(shard.name for shard in index.split(split).shards) for split in SPLITS}
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
        for location in locations[split]:
            stat = None if is_remote(location) else Path(location).stat()
            state = "" if stat is None else f"{stat.st_size} {stat.st_mtime_ns}"
            needed = None if split == "unlabeled" else label
            tasks.append(Task(split, location, needed, state))
    return tasks


class _Agreement:
    """Whether shards go together, told as soon as one doesn't."""

    def __init__(self, names: tuple[str, ...] | None, image_size: int | None) -> None:
        self._names = names
        self._any_shape = image_size is not None
        self._first: tuple[list[int], str] | None = None

    def check(self, task: Task, facts: Facts) -> None:
        """Raise UserError where a label has no name, or images differ that should be alike."""
        if self._names is not None and facts.largest_label >= len(self._names):
            raise UserError(
                f"{_largest(task, facts)}, the class names are {len(self._names)}: they begin "
                "with that of class 0, and every label takes one"
            )
        if self._any_shape or not facts.shape:
            return
        self._first = self._first or (facts.shape, place(task, facts.shape_key))
        candidates = ((facts.shape, facts.shape_key), (facts.other, facts.other_key))
        for shape, key in candidates:
            if shape and shape != self._first[0]:
                raise UserError(
                    f"images differ: {_shown(self._first[0])} of {self._first[1]}, "
                    f"{_shown(shape)} of {place(task, key)}; --image-size N scales and crops "
                    "them to one size (what was scanned is kept)"
                )


def _largest(task: Task, facts: Facts) -> str:
    return f"{place(task, facts.largest_key)} has the label {facts.largest_label}"


def _shown(shape: list[int]) -> str:
    height, width, channels = shape
    return f"{height} x {width} ({'gray' if channels == 1 else 'color'})"


def _image_shape(found: Found, image_size: int | None, gray: bool) -> tuple[int, int, int]:
    for split in SPLITS:
        if not any(facts.shape for task, facts in found.items() if task.split == split):
            raise UserError(f"no image of the {split} shards can be read: are they whole?")
    if image_size is not None:
        return image_size, image_size, 1 if gray else 3
    height, width, channels = next(facts.shape for facts in found.values() if facts.shape)
    return height, width, channels


def _histograms(found: Found, names: tuple[str, ...] | None) -> dict[str, tuple[int, ...]]:
    """Samples of each class by split. Unless they are named, the labeled samples tell the classes.

    Raises UserError where other splits have further classes.
    """
    counts = {split: Counter[int]() for split in SPLITS}
    for task, facts in found.items():
        counts[task.split].update({int(label): n for label, n in facts.histogram.items()})
    classes = len(names) if names is not None else max(counts["labeled"]) + 1
    for task, facts in found.items():
        if facts.largest_label >= classes:
            raise UserError(
                f"{_largest(task, facts)}, labeled samples end at class {classes - 1}: give "
                "labeled samples of all classes, or their names with --class-names"
            )
    if classes > counts["labeled"].total():
        raise UserError(
            f"{counts['labeled'].total()} labeled samples cannot show {classes} classes: labels "
            "must count from 0 on without large gaps"
        )
    return {
        split: () if split == "unlabeled" else tuple(count[label] for label in range(classes))
        for split, count in counts.items()
    }


def _split(
    found: Found,
    split: str,
    shape: tuple[int, int, int],
    histograms: Mapping[str, tuple[int, ...]],
    order: str,
) -> SplitIndex:
    shards = tuple(
        Shard(task.location, facts.samples, facts.bytes, facts.sha256)
        for task, facts in found.items()
        if task.split == split
    )
    samples = sum(shard.samples for shard in shards)
    forced = split == "unlabeled" and order != "auto"
    chosen = order if forced else order_for(samples, shape)
    return SplitIndex("per-sample", chosen, 1, samples, histograms[split], shards)


def _finish(out: Path, index: DatasetIndex, found: Found) -> None:
    """Put the sidecars and the index in their places; then what led to them is not needed."""
    for split in SPLITS:
        shutil.rmtree(out / split, ignore_errors=True)  # a run that was killed right here
        (out / split).mkdir()
        for number, task in enumerate(task for task in found if task.split == split):
            offsets_file(out, task).replace(out / sidecar_name(split, number))
    save(index, out / INCOMING)
    (out / INCOMING / INDEX_NAME).replace(out / INDEX_NAME)
    _clear(out)


def _clear(out: Path) -> None:
    for folder in (INCOMING, SCANNED):
        shutil.rmtree(out / folder, ignore_errors=True)
    (out / JOURNAL).unlink(missing_ok=True)


def _remarks(found: Found, index: DatasetIndex) -> list[str]:
    """What the index does not tell, and should not go unsaid."""
    lines = remarks(found)
    absent = [str(label) for label, n in enumerate(index.labeled.label_histogram) if not n]
    if absent:
        shown = ", ".join(absent[:10]) + (", ..." if len(absent) > 10 else "")
        lines.append(f"classes without a labeled sample: {shown}")
    training = {shard.sha256 for split in SPLITS[:2] for shard in index.split(split).shards}
    for split in SPLITS[2:]:
        shared = sum(shard.sha256 in training for shard in index.split(split).shards)
        if shared:
            lines.append(
                f"{shared} {split} shard(s) are trained on too: errors on them will look too good"
            )
    return lines


def main(argv: Sequence[str]) -> int:
    """The command line of launch/index_shards.py: an exit code.

    0 when indexed, 2 (an error) or 130 (Ctrl-C) with a line on stderr.
    """
    parser = argparse.ArgumentParser(
        prog="index_shards.py",
        description="Index WebDataset tars that are there already, for training on them.",
    )

    def add(*options: str, **rest: Any) -> None:
        # --image_size is the same as --image-size
        lines = ("--" + option[2:].replace("-", "_") for option in options if option[0] == "-")
        parser.add_argument(*dict.fromkeys((*options, *lines)), **rest)

    shards = "PATTERN"
    add("unlabeled", nargs="+", metavar=shards, help="shards with brace ranges, *, or :: between")
    add("--labeled", nargs="+", required=True, metavar=shards, help="the same, with labels")
    add("--validation", nargs="+", required=True, metavar=shards, help="labeled, held out")
    add("--test", nargs="+", required=True, metavar=shards, help="labeled, held out")
    add("--out", required=True, help="the folder to make")
    add("--image-size", type=int, help="scale and crop to N x N (default: as they are)")
    add("--gray", action="store_true", help="with --image-size: one channel instead of three")
    add("--label", default="cls", help="cls (default) or json:KEY, where the class number is")
    add("--class-names", metavar="FILE", help="a name a line, class 0 first")
    add("--order", choices=("auto", *ORDERS), default="auto", help="of the unlabeled split")
    add("--jobs", type=int, help="processes (default: one a core)")
    add("--tries", type=int, default=DEFAULT.tries, help="attempts a remote shard")
    add("--timeout", type=float, default=DEFAULT.timeout, help="seconds without a byte")
    args = vars(parser.parse_args(argv))

    def make() -> DatasetIndex:
        transport = Transport(args.pop("tries"), args.pop("timeout"))
        return index_shards(**args, transport=transport)

    return made_by(make, args["out"], "the same command goes on where this one ended")
