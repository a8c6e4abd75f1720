"""Files that are written whole or not at all, and locks."""

from __future__ import annotations

import contextlib
import errno
import io
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from filelock import BaseFileLock, FileLock, SoftFileLock
from numpy.typing import NDArray

# of file systems without locks, such as Lustre without its flock option
_NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP}

log = logging.getLogger(__name__)


def write_whole(path: Path, content: str | bytes, fsync: bool = False) -> None:
    """Replaces the file at `path` by `content`; a reader, or a crash, never sees a part of it.

    With `fsync`, file and folder are flushed to disk, so that it survives a loss of power.

    Raises:
        OSError: it cannot be written; what was there before is unchanged.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            if fsync:
                file.flush()
                os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    if fsync:
        flush_folder(path.parent)


def npy_bytes(array: NDArray[Any]) -> bytes:
    """Returns the bytes of a .npy file that holds the array."""
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(array))
    return buffer.getvalue()


def flush_folder(folder: Path) -> None:
    """Flushes the names in a folder to disk: what was created in it or renamed into it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def locked(
    path: Path, timeout: float = -1, cancel: Callable[[], bool] | None = None
) -> Iterator[None]:
    """Holds the lock of the file at `path`, which is created; a negative timeout waits forever.

    The kernel frees the lock of a killed process. Where a file system has no such locks, the existence
    of a file with the ending `.held` is the lock, and that of a killed process of this host is taken
    over.

    Raises:
        filelock.Timeout: another process holds it, or `cancel` returned True.
        OSError: the file cannot be written.
    """
    lock: BaseFileLock = FileLock(path, fallback_to_soft=False)
    try:
        lock.acquire(timeout, cancel_check=cancel)
    except (OSError, NotImplementedError) as error:
        if isinstance(error, OSError) and error.errno not in _NO_LOCKS:
            raise
        held = path.with_name(f"{path.name}.held")
        log.warning(f"{path.parent} is on a file system without locks: {held.name} is used instead")
        lock = SoftFileLock(held)
        lock.acquire(timeout, cancel_check=cancel)
    try:
        yield
    finally:
        lock.release()
