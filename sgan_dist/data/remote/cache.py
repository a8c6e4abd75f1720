"""Opens a dataset's files: in its own folder, or in a cache of the remote ones.

The cache is a folder of shards named by their sha256, so datasets and runs share equal shards:

    ab/abcdef...      whole shards and sidecars; a file is renamed into place once it was checked
    incoming/         unfinished downloads, and one lock file per shard
    lock              held while shards are added or removed

All processes of a node share it. It should be on a disk of the node: a network file system may not
lock across nodes, and would be as slow as the files that it caches.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import os
import re
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Self

import platformdirs
from filelock import Timeout

from sgan_dist.config import RemoteConfig
from sgan_dist.data.index import Shard, prepare_again
from sgan_dist.data.remote.secret import read_secrets
from sgan_dist.data.remote.transfer import CONNECT_SECONDS, LONGEST_WAIT_SECONDS, Stopped, fetch
from sgan_dist.data.remote.urls import is_remote, join, redact_url
from sgan_dist.errors import TransientError, UserError
from sgan_dist.files import locked

THREADS = 4  # shards that are prefetched at the same time
ABANDONED_SECONDS = 86400  # a file not written to for so long was left by a killed process

log = logging.getLogger(__name__)


def user_cache() -> Path:
    """Returns this program's folder in the user's cache: $XDG_CACHE_HOME, else ~/.cache on Linux.

    Raises:
        UserError: the user has no home folder.
    """
    try:
        return platformdirs.user_cache_path("sgan_dist")
    except RuntimeError:
        raise UserError("this user has no home folder: set XDG_CACHE_HOME to a folder") from None


class Storage:
    """The files below `root`, a folder or a remote location, for one process and all its threads.

    `remote` names the cache and its limit in GiB, least recently used shards out first. Shards
    being downloaded come on top of the limit, and so do removed shards that are still open. Errors
    are UserErrors that name the shard.
    """

    def __init__(self, root: str, remote: RemoteConfig) -> None:
        self.root = root
        self._remote = remote
        self._secrets = read_secrets(root)
        self._unchanged: set[Shard] = set()
        self._stop = threading.Event()
        self._slots = threading.Semaphore(THREADS)
        self._in_flight: dict[str, threading.Thread] = {}
        self._failed: set[str] = set()  # failed prefetches; the next `open` tries again

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def open(self, shard: Shard) -> io.BufferedReader:
        """Opens the whole shard at its first byte; a remote one is downloaded unless it is cached.

        The size of a local shard is checked; size and sha256 of a remote one, as it arrives.
        """
        location = self.location(shard)
        if is_remote(location):
            file = self._open_cached(shard, location, threading.Event())
            self._failed.discard(shard.sha256)
            return file
        advice = f"copy it again, or {prepare_again(self.root)}"
        try:
            file = open(location, "rb")
        except OSError as error:
            raise UserError(
                f"cannot read {self._describe(shard)} ({error.strerror}): {advice}"
            ) from None
        size = os.fstat(file.fileno()).st_size
        if size != shard.bytes:
            file.close()
            raise UserError(
                f"{self._describe(shard)} no longer matches the index: it has {size} bytes, the"
                f" index says {shard.bytes}; {advice}"
            )
        return file

    def unchanged(self, shard: Shard) -> bool:
        """Returns whether the shard's bytes have the sha256 of the index.

        Once True, they are not read again. A damaged copy in the cache is removed.
        """
        if shard in self._unchanged:
            return True
        with self.open(shard) as file:
            try:
                same = hashlib.file_digest(file, "sha256").hexdigest() == shard.sha256
            except OSError as error:
                raise UserError(
                    f"cannot read {self._describe(shard)}: {error.strerror}; check the disk"
                ) from None
        if same:
            self._unchanged.add(shard)
        elif is_remote(self.location(shard)):
            with self._exclusive():
                self._path(shard).unlink(missing_ok=True)
            log.warning(
                f"the copy of shard {shard.name} in {self._folder} was damaged: the next use"
                " downloads it again"
            )
        return same

    def prefetch(self, shards: Iterable[Shard]) -> None:
        """Starts to download remote shards that are not cached, in this order, in the background.

        Cached ones are marked as used. A failure is left to the `open` that needs the shard: it
        is not tried again here, since all ranks would keep asking the server for it.
        """
        for shard in shards:
            known = shard.sha256 in self._in_flight or shard.sha256 in self._failed
            if known or not is_remote(self.location(shard)):
                continue
            try:
                os.utime(self._path(shard))
            except OSError:  # not cached; or the cache is unusable, which `open` reports
                # daemons: a stalled download must not keep the process from ending
                thread = threading.Thread(target=self._prefetch, args=(shard,), daemon=True)
                self._in_flight[shard.sha256] = thread
                thread.start()

    def location(self, shard: Shard) -> str:
        """Returns the path or URL of a shard, with what is secret in it."""
        return self._secrets.get(shard.name) or join(self.root, shard.name)

    def close(self) -> None:
        """Stops the prefetching, within about a second."""
        self._stop.set()
        for thread in list(self._in_flight.values()):
            thread.join(1.0)

    def _prefetch(self, shard: Shard) -> None:
        try:
            with self._slots:
                if not self._stop.is_set():
                    self._open_cached(shard, self.location(shard), self._stop).close()
        except Stopped:
            return
        except UserError:
            self._failed.add(shard.sha256)  # `open` raises it, if the shard is needed
        except Exception as error:  # noqa: BLE001 - as for any error, `open` tries again
            self._failed.add(shard.sha256)
            log.warning(f"cannot prefetch shard {shard.name}: {error!r}")
        finally:
            del self._in_flight[shard.sha256]

    @property
    def _folder(self) -> Path:
        folder = self._remote.cache or os.environ.get("SGAN_CACHE")
        return Path(folder) if folder else user_cache() / "shards"

    def _path(self, shard: Shard) -> Path:
        if not re.fullmatch("[0-9a-f]{64}", shard.sha256):  # it becomes a path here
            raise UserError(
                f"the index of the dataset at {redact_url(self.root)} gives shard {shard.name} the"
                f" sha256 {shard.sha256!r}, which is not valid: index the dataset again"
            )
        return self._folder / shard.sha256[:2] / shard.sha256

    def _exclusive(self) -> contextlib.AbstractContextManager[None]:
        """The lock under which shards are added and removed."""
        return locked(self._folder / "lock")

    def _open_cached(self, shard: Shard, location: str, stop: threading.Event) -> io.BufferedReader:
        """Opens the shard in the cache; it is first downloaded, here or by another process."""
        try:
            return self._open_if_cached(shard) or self._download(shard, location, stop)
        except OSError as error:
            raise self._cache_error(shard, error) from None

    def _download(self, shard: Shard, location: str, stop: threading.Event) -> io.BufferedReader:
        limit = int(self._remote.cache_gib * 2**30)
        if shard.bytes > limit:
            raise UserError(
                f"shard {shard.name} has {shard.bytes / 2**30:.3g} GiB, the cache of shards"
                f" holds {self._remote.cache_gib:g}: raise remote.cache_gib"
            )
        incoming = self._folder / "incoming"
        incoming.mkdir(parents=True, exist_ok=True)
        target, path = incoming / shard.sha256, self._path(shard)
        lock = incoming / f"{shard.sha256}.lock"
        with contextlib.ExitStack() as stack:
            waiting = _Waiting(target, self._remote, stop)
            try:
                stack.enter_context(locked(lock, cancel=waiting.is_over))
            except Timeout:
                if stop.is_set():
                    raise Stopped from None
                raise TransientError(
                    f"another process of this node downloads shard {shard.name}, and has not received a"
                    f" byte for {waiting.longest:.0f} seconds: end that process if it hangs"
                ) from None
            stack.callback(lock.unlink, missing_ok=True)
            file = self._open_if_cached(shard)  # another process may have downloaded it meanwhile
            if file is not None:
                return file
            for leftover in incoming.glob(f".{target.name}.*"):
                leftover.unlink(missing_ok=True)  # of a process that was killed
            fetch(location, target, self._remote, shard.bytes, shard.sha256, stop)
            with self._exclusive():
                self._make_room(limit - shard.bytes)
                path.parent.mkdir(exist_ok=True)
                target.replace(path)
                return open(path, "rb")

    def _open_if_cached(self, shard: Shard) -> io.BufferedReader | None:
        try:
            file = open(self._path(shard), "rb")
        except FileNotFoundError:
            return None
        if os.fstat(file.fileno()).st_size != shard.bytes:  # cut off: it is replaced
            file.close()
            return None
        os.utime(file.fileno())
        return file

    def _make_room(self, limit: int) -> None:
        """Removes the least recently used shards until the others have at most `limit` bytes."""
        for path, state in _files(self._folder, "incoming/*"):
            if time.time() - state.st_mtime > ABANDONED_SECONDS:
                path.unlink(missing_ok=True)
        shards = [
            (state.st_mtime_ns, state.st_size, path)
            for path, state in _files(self._folder, "[0-9a-f][0-9a-f]/*")
            if not path.suffix
        ]
        total = sum(size for _, size, _ in shards)
        for _, size, path in sorted(shards):
            if total <= limit:
                return
            path.unlink(missing_ok=True)
            total -= size

    def _describe(self, shard: Shard) -> str:
        return f"shard {shard.name} of the dataset at {redact_url(self.root)}"

    def _cache_error(self, shard: Shard, error: OSError) -> UserError:
        return UserError(
            f"cannot keep shard {shard.name} in the cache of shards at {self._folder}"
            f" ({error.strerror}): set remote.cache or SGAN_CACHE to a folder on a disk of this"
            " node with enough room"
        )


class _Waiting:
    """Waits for another process's download, for as long as bytes arrive there."""

    def __init__(self, target: Path, remote: RemoteConfig, stop: threading.Event) -> None:
        self._target, self._stop = target, stop
        # it may wait for a connection, for a byte, and between two attempts
        self.longest = CONNECT_SECONDS + remote.read_timeout + LONGEST_WAIT_SECONDS
        self._seen: object = None
        self._since = time.monotonic()

    def is_over(self) -> bool:
        """Returns whether to wait no longer."""
        seen = [
            (path.name, state.st_size)
            for path, state in _files(self._target.parent, f".{self._target.name}.*")
        ]
        if seen != self._seen:
            self._seen, self._since = seen, time.monotonic()
        return self._stop.is_set() or time.monotonic() - self._since > self.longest


def _files(folder: Path, pattern: str) -> list[tuple[Path, os.stat_result]]:
    """Returns matching files and their sizes and times; other processes may remove some meanwhile."""
    files = []
    for path in sorted(folder.glob(pattern)):
        with contextlib.suppress(FileNotFoundError):
            files.append((path, path.stat()))
    return files
