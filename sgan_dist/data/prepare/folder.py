"""Makes a dataset folder: one process at a time, and never over another dataset."""

from __future__ import annotations

import contextlib
import csv
import errno
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from filelock import Timeout

from sgan_dist.data.index import INDEX_NAME, DatasetIndex, load_index
from sgan_dist.errors import UserError, plural
from sgan_dist.files import locked

SKIPPED = "skipped.tsv"

log = logging.getLogger(__name__)


class Skipped(NamedTuple):
    """An image that could not be decoded: the part or tar that it is in, its name, the reason."""

    place: str
    name: str
    why: str


def write_skipped(root: Path, skipped: Sequence[Skipped]) -> None:
    """Writes skipped.tsv, if any image was skipped."""
    if skipped:
        with open(
            root / SKIPPED, "w", encoding="utf-8", errors="surrogateescape", newline=""
        ) as file:
            csv.writer(file, "excel-tab").writerows(skipped)


def read_skipped(root: Path) -> list[Skipped]:
    """Returns the images that a dataset's preparation has skipped."""
    path = root / SKIPPED
    if not path.exists():
        return []
    with open(path, encoding="utf-8", errors="surrogateescape", newline="") as file:
        return [Skipped(*row) for row in csv.reader(file, "excel-tab")]


@contextlib.contextmanager
def dataset_folder(
    out: Path, request: str, work: str, outcome: str, unfinished: str | None = None
) -> Iterator[DatasetIndex | None]:
    """Yields the index if `out` already holds the dataset of this request, else None.

    With None, no other process makes a dataset there inside the `with` block.

    Args:
        out: the folder to make; absent, empty, or with the dataset of the same request.
        request: describes in words what the dataset is made from.
        work: what the process does, for the message to another one: `preparing`.
        outcome: what a full disk leaves, for the message: `nothing half-written was kept`.
        unfinished: a name in `out` that marks it as the folder of an unfinished run, to continue.

    Raises:
        UserError: `out` holds something else or cannot be written, or another process makes it.
    """
    try:
        existing = _existing(out, request, unfinished)
        if existing is None:
            with _exclusive(out, work):
                existing = _existing(out, request, unfinished)  # another run may have just finished
                if existing is None:
                    yield None
                    return
        log.info(f"{out} already holds this dataset: nothing to do")
        yield existing
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise UserError(
                f"no room left for {out} ({error.strerror}): free space or choose another --out;"
                f" {outcome}"
            ) from None
        raise UserError(
            f"cannot use {error.filename or out}: {error.strerror}; choose another --out"
        ) from None


def warn_of_absent_classes(index: DatasetIndex) -> None:
    """Logs which classes no labeled image shows."""
    counts = zip(index.class_names, index.labeled.label_histogram, strict=True)
    absent = [name for name, count in counts if not count]
    if absent:
        first = ", ".join(absent[:10]) + (", ..." if len(absent) > 10 else "")
        log.warning(f"{plural(len(absent), 'class')} without a labeled sample: {first}")


def _existing(out: Path, request: str, unfinished: str | None) -> DatasetIndex | None:
    if not (out / INDEX_NAME).is_file():
        try:
            names = {path.name for path in out.iterdir()}
        except FileNotFoundError:
            return None
        if not names or unfinished in names:
            return None
        raise UserError(
            f"{out} exists and holds no dataset: choose another --out, or empty it yourself"
        )
    index = load_index(out)
    if index.request != request:
        raise UserError(
            f"{out} holds another dataset: it was made from [{index.request}], the request is"
            f" [{request}]; choose another --out, or remove that folder yourself"
        )
    return index


@contextlib.contextmanager
def _exclusive(out: Path, work: str) -> Iterator[None]:
    path = out.with_name(f".{out.name}.lock")
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locked(path, timeout=0))
        except Timeout:
            raise UserError(f"another run is {work} {out} right now: wait for it to end") from None
        stack.callback(path.unlink, missing_ok=True)
        yield
