"""A lock file for what one of many processes is to make while the others wait for it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from sgan_dist.data.remote import Stopped
from sgan_dist.errors import Outage, UserError

POLL_SECONDS = 0.05  # how soon a lock that became free is seen


@contextlib.contextmanager
def locked(
    path: Path,
    key: str,
    stop: threading.Event,
    made: Callable[[], bool],
    progress: Callable[[], object],
    patience: float,
) -> Iterator[bool]:
    """Hold the lock file, waiting for whoever has it, and remove it at the end.

    Gives True where it is held; False where what it is for was `made` meanwhile, or `progress`
    did not change for `patience` seconds, as of a process that was suspended.

    Raises the UserError (an Outage if it was one) with which a process of the same `key` failed that
    was waited for: of all that want the same from the same place one is to try, not each in turn.
    Raises Stopped once `stop` is set.
    """
    while True:
        with open(path, "a+b") as file:
            if not _acquired(file, stop, made, progress, patience):
                yield False
                return
            if not _is_at(file, path):  # removed by the one that was waited for
                file.seek(0)
                if text := file.read().decode():
                    whose, kind, failure = text.split("\n", 2)
                    if whose == key:
                        raise (Outage if kind == Outage.__name__ else UserError)(failure)
                continue
            file.truncate(0)
            try:
                yield True
            except UserError as error:
                file.write(f"{key}\n{type(error).__name__}\n{error}".encode())
                file.flush()
                raise
            finally:
                path.unlink(missing_ok=True)
            return


def _acquired(
    file: BinaryIO,
    stop: threading.Event,
    made: Callable[[], bool],
    progress: Callable[[], object],
    patience: float,
) -> bool:
    seen, since = progress(), time.monotonic()
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if stop.wait(POLL_SECONDS):
                raise Stopped from None
        if (now := progress()) != seen:
            seen, since = now, time.monotonic()
        elif made() or time.monotonic() - since > patience:
            return False


def _is_at(file: BinaryIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
