"""Where a dataset's files are read from: its own folder, or a cache of what is remote.

The cache is a folder of shards named by their sha256, so datasets and runs share what is equal:

    ab/abcdef...      whole shards; a file is renamed into place once it was checked
    incoming/         what is on its way, and a lock a shard, which the kernel frees
    lock              held for the moment in which shards are put in and out

All processes of a node share it. It should be on a disk of the node: on network file systems
locks may not reach across nodes, and it would be as far away as what it caches.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import os
import queue
import re
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from sgan_dist.data.download import cache_home
from sgan_dist.data.index import Shard, prepare_again
from sgan_dist.data.order import Int64s
from sgan_dist.data.remote import Denied, Stopped, Transport, fetch, is_remote, join, read
from sgan_dist.errors import UserError

THREADS = 4  # shards that are brought ahead at the same time
POLL_SECONDS = 0.05  # how soon a lock that became free is seen
ABANDONED_SECONDS = 86400  # what nothing was written to for so long, a killed process left


@dataclass(frozen=True)
class CacheOptions:
    """Where remote shards are kept, and how much of them.

    Files that readers hold open keep their space until they are closed, and shards on their way
    come on top of the limit.
    """

    folder: str | None = None
    """a node-local folder of this user; None: $SGAN_CACHE, else the user's cache folder"""
    gib: float = 50.0
    """limit in GiB for all shards in the folder, least recently used out first"""


class Storage:
    """The files below `root`, a folder or a remote location, for one process and all its threads.

    Its errors are UserErrors that name the shard.
    """

    def __init__(self, root: str, transport: Transport, cache: CacheOptions) -> None:
        self.root = root
        self._transport = transport
        self._options = cache
        self._unchanged: set[Shard] = set()
        self._stop = threading.Event()
        self._wanted: queue.SimpleQueue[Shard | None] = queue.SimpleQueue()
        self._on_the_way: set[str] = set()
        self._threads: list[threading.Thread] = []

    def open(self, shard: Shard) -> io.BufferedReader:
        """The whole shard, at its first byte; a remote one is in the cache, or brought there.

        Local: its size is checked. Remote: size and sha256 are, as it arrives.
        """
        location = join(self.root, shard.name)
        if is_remote(location):
            return self._cached(shard, location, threading.Event())
        again = f"copy it again, or {prepare_again(self.root)}"
        try:
            file = open(location, "rb")
        except OSError as error:
            raise UserError(
                f"cannot read shard {shard.name} of the dataset at {self.root} "
                f"({error.strerror}): {again}"
            ) from None
        size = os.fstat(file.fileno()).st_size
        if size != shard.bytes:
            file.close()
            raise UserError(
                f"shard {shard.name} of the dataset at {self.root} no longer matches the index: "
                f"it has {size} bytes, the index says {shard.bytes}; {again}"
            )
        return file

    def offsets(self, split: str, number: int, records: int) -> Int64s | None:
        """Where the records of a split's shard begin, in bytes: int64 (records + 1,), if known.

        None without a sidecar, and through a pipe, which can't tell that there is none.
        """
        name = f"{split}/{number:06d}.tar.offsets.npy"
        location = join(self.root, name)
        if location.startswith("pipe:"):
            return None
        try:
            if is_remote(location):
                data = read(location, self._transport)
            else:
                data = Path(location).read_bytes()
        except FileNotFoundError:
            return None
        except Denied:
            # object stores answer so, too, where nothing is and the folder must not be listed
            return None
        except OSError as error:
            raise UserError(
                f"cannot read {location}: {error.strerror}; delete it, it is not needed"
            ) from None
        if data is None:
            return None
        try:
            offsets = np.load(io.BytesIO(data), allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise UserError(
                f"cannot read {location}: {error}; delete it, it is not needed"
            ) from None
        if offsets.shape != (records + 1,) or offsets.dtype != np.int64:
            raise UserError(f"{location} is not of its shard: delete it, it is not needed")
        found: Int64s = offsets
        return found

    def unchanged(self, shard: Shard) -> bool:
        """Whether the bytes that are read have the sha256 of the index; once True, not read again.

        A cached shard that has not is dropped, so that the next `open` brings it anew.
        """
        if shard in self._unchanged:
            return True
        with self.open(shard) as file:
            try:
                same = hashlib.file_digest(file, "sha256").hexdigest() == shard.sha256
            except OSError as error:
                raise UserError(
                    f"cannot read shard {shard.name} of the dataset at {self.root}: "
                    f"{error.strerror}; check the disk"
                ) from None
        if same:
            self._unchanged.add(shard)
        elif is_remote(join(self.root, shard.name)):
            with self._alone():
                self._path(shard).unlink(missing_ok=True)
        return same

    def ahead(self, shards: Iterable[Shard]) -> None:
        """Begin to bring remote shards that are not there yet, in this order, in the background.

        Those that are there count as used. What fails is tried again by the `open` that needs it.
        """
        for shard in shards:
            if shard.sha256 in self._on_the_way or not is_remote(join(self.root, shard.name)):
                continue
            try:
                os.utime(self._path(shard))
            except OSError:  # not there; or not usable, which `open` will say
                self._on_the_way.add(shard.sha256)
                self._wanted.put(shard)
                if len(self._threads) < THREADS:
                    # daemons: a stalled download must not keep the process from ending
                    self._threads.append(threading.Thread(target=self._bring_ahead, daemon=True))
                    self._threads[-1].start()

    def close(self) -> None:
        """End what is brought in the background, within about a second."""
        self._stop.set()
        for _ in self._threads:
            self._wanted.put(None)
        for thread in self._threads:
            thread.join(1.0)
        self._threads.clear()

    def _bring_ahead(self) -> None:
        while (shard := self._wanted.get()) is not None and not self._stop.is_set():
            try:
                self._cached(shard, join(self.root, shard.name), self._stop).close()
            except UserError:
                continue  # the shard may never be needed; `open` tries again, and says it
            except Stopped:
                return
            finally:
                self._on_the_way.discard(shard.sha256)

    @property
    def _folder(self) -> Path:
        given = self._options.folder or os.environ.get("SGAN_CACHE")
        return Path(given) if given else cache_home() / "sgan_dist" / "shards"

    def _path(self, shard: Shard) -> Path:
        if not re.fullmatch("[0-9a-f]{64}", shard.sha256):  # it becomes a path here
            raise UserError(
                f"the index of the dataset at {self.root} gives shard {shard.name} the sha256 "
                f"{shard.sha256!r}, which is none: index the dataset again"
            )
        return self._folder / shard.sha256[:2] / shard.sha256

    def _cached(self, shard: Shard, location: str, stop: threading.Event) -> io.BufferedReader:
        """The shard in the cache, opened; brought there first unless another process does."""
        try:
            file = self._found(shard)
            if file is not None:
                return file
            limit = int(self._options.gib * 2**30)
            if shard.bytes > limit:
                raise UserError(
                    f"shard {shard.name} has {shard.bytes / 2**30:.3g} GiB, the cache of shards "
                    f"holds {self._options.gib:g}: raise data.cache_gib"
                )
            incoming = self._folder / "incoming"
            incoming.mkdir(parents=True, exist_ok=True)
            target = incoming / shard.sha256
            with _locked(target.with_name(f"{target.name}.lock"), stop):
                file = self._found(shard)
                if file is not None:
                    return file
                for left in incoming.glob(f".{target.name}.*"):
                    left.unlink()  # by a process that was killed, as the lock is ours
                fetch(location, target, self._transport, shard.bytes, shard.sha256, stop)
                with self._alone():
                    self._make_room(limit - shard.bytes)
                    path = self._path(shard)
                    path.parent.mkdir(exist_ok=True)
                    target.replace(path)
                    return open(path, "rb")
        except OSError as error:
            raise UserError(
                f"cannot keep shard {shard.name} in the cache of shards at {self._folder} "
                f"({error.strerror}): let data.cache or SGAN_CACHE name a folder on a disk of "
                "this node with room for it"
            ) from None

    def _found(self, shard: Shard) -> io.BufferedReader | None:
        path = self._path(shard)
        try:
            file = open(path, "rb")
        except FileNotFoundError:
            return None
        if os.fstat(file.fileno()).st_size != shard.bytes:
            file.close()
            with self._alone():
                path.unlink(missing_ok=True)
            return None
        os.utime(file.fileno())
        return file

    def _make_room(self, limit: int) -> None:
        """Remove the least recently used shards until the rest has at most `limit` bytes."""
        for left in (self._folder / "incoming").iterdir():
            with contextlib.suppress(FileNotFoundError):  # they come and go
                if time.time() - left.stat().st_mtime > ABANDONED_SECONDS:
                    left.unlink()
        kept = []
        for path in self._folder.glob("[0-9a-f][0-9a-f]/*"):
            state = path.stat()
            kept.append((state.st_mtime_ns, state.st_size, path))
        total = sum(size for _, size, _ in kept)
        for _, size, path in sorted(kept):
            if total <= limit:
                return
            path.unlink()
            total -= size

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Nobody else puts shards in or out."""
        with open(self._folder / "lock", "ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


@contextlib.contextmanager
def _locked(path: Path, stop: threading.Event) -> Iterator[None]:
    """Hold the lock file, waiting for whoever has it, and remove it at the end.

    Raises the UserError with which the one that was waited for failed: of all the processes that
    want a shard, one is to try, not each in turn. Raises Stopped once `stop` is set.
    """
    while True:
        with open(path, "a+b") as file:
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if stop.wait(POLL_SECONDS):
                        raise Stopped from None
            if not _is_at(file, path):  # removed by the one that was waited for
                file.seek(0)
                failure = file.read().decode()
                if failure:
                    raise UserError(failure)
                continue
            file.truncate(0)
            try:
                yield
            except UserError as error:
                file.write(str(error).encode())
                file.flush()
                raise
            finally:
                path.unlink(missing_ok=True)
            return


def _is_at(file: BinaryIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
