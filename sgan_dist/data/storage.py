"""Where a dataset's files are read from: its own folder, or a cache of what is remote.

The cache is a folder of shards named by their sha256, so datasets and runs share what is equal:

    ab/abcdef...      whole shards; a file is renamed into place once it was checked
    ab/abcdef....offsets    where a shard's records begin, with which it comes and goes
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
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np

from sgan_dist.data import remote
from sgan_dist.data.download import cache_home
from sgan_dist.data.index import Shard, prepare_again, sidecar_name
from sgan_dist.data.locations import is_remote, join, shown
from sgan_dist.data.locks import locked
from sgan_dist.data.order import Int64s
from sgan_dist.data.remote import Denied, Stopped, Transport, fetch, pause, read
from sgan_dist.errors import UserError

THREADS = 4  # shards that are brought ahead at the same time
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
        self._given: set[Shard] = set()  # remote ones that were opened
        self._stop = threading.Event()
        self._wanted: queue.SimpleQueue[Shard | None] = queue.SimpleQueue()
        self._on_the_way: set[str] = set()
        self._failed: set[str] = set()  # while brought ahead; the next `open` tries again
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def open(self, shard: Shard) -> io.BufferedReader:
        """The whole shard, at its first byte; a remote one is in the cache, or brought there.

        Local: its size is checked. Remote: size and sha256 are, as it arrives.
        """
        location = join(self.root, shard.name)
        if is_remote(location):
            self._given.add(shard)
            file = self._cached(shard, location, threading.Event())
            self._failed.discard(shard.sha256)
            return file
        again = f"copy it again, or {prepare_again(self.root)}"
        try:
            file = open(location, "rb")
        except OSError as error:
            raise UserError(
                f"cannot read shard {shard.name} of the dataset at {shown(self.root)} "
                f"({error.strerror}): {again}"
            ) from None
        size = os.fstat(file.fileno()).st_size
        if size != shard.bytes:
            file.close()
            raise UserError(
                f"shard {shard.name} of the dataset at {shown(self.root)} no longer matches the index: "
                f"it has {size} bytes, the index says {shard.bytes}; {again}"
            )
        return file

    def offsets(
        self, split: str, number: int, records: int, shard: Shard | None = None
    ) -> Int64s | None:
        """Where the records of a split's shard begin, in bytes: int64 (records + 1,), if known.

        None without a sidecar, and through a pipe, which can't tell that there is none. With
        `shard`, a remote sidecar is kept in the cache beside it.
        """
        location = join(self.root, sidecar_name(split, number))
        if location.startswith("pipe:"):
            return None
        if not is_remote(location):
            try:
                data = Path(location).read_bytes()
            except FileNotFoundError:
                return None
            except OSError as error:
                raise _useless(location, error.strerror) from None
            return _parsed(location, data, records)
        if shard is None:
            found = self._bring_offsets(location, records)
            return None if found is None else found[0]
        try:
            return self._kept_offsets(shard, location, records)
        except OSError as error:
            raise self._unusable(shard, error) from None

    def _kept_offsets(self, shard: Shard, location: str, records: int) -> Int64s | None:
        """A remote sidecar's, from the cache; brought there first where it is not."""
        path = self._path(shard)
        path = path.with_name(f"{path.name}.offsets")
        with contextlib.suppress(FileNotFoundError):
            try:
                return _parsed(str(path), path.read_bytes(), records)
            except UserError as error:
                _say(f"bringing the offsets of shard {shard.name} again: {error}")
        found = self._bring_offsets(location, records)
        if found is None:
            return None
        incoming = self._folder / "incoming"
        incoming.mkdir(parents=True, exist_ok=True)
        temporary = incoming / f".offsets.{shard.sha256}.{os.urandom(8).hex()}"
        try:
            temporary.write_bytes(found[1])
            with self._alone():
                path.parent.mkdir(exist_ok=True)
                temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        return found[0]

    def _bring_offsets(self, location: str, records: int) -> tuple[Int64s, bytes] | None:
        """A remote sidecar's, and its bytes; tried again where those are no such array."""
        for attempt in range(1, self._transport.tries + 1):
            try:
                data = read(location, self._transport)
            except Denied:
                # object stores answer so, too, where nothing is and the folder must not be listed
                return None
            if data is None:
                return None
            try:
                return _parsed(location, data, records), data
            except UserError as error:
                if attempt == self._transport.tries:
                    raise
                why = str(error).partition(";")[0]
            pause(location, why, attempt, self._transport, self._stop)
        return None

    def unchanged(self, shard: Shard) -> bool:
        """Whether the bytes that are read have the sha256 of the index; once True, not read again.

        A cached shard that has not is dropped, and brought anew at once; False also where `open`
        gave it before, since what was read of it may have been damaged.
        """
        if shard in self._unchanged:
            return True
        same = self._has_sum(shard)
        if not same and is_remote(join(self.root, shard.name)):
            with self._alone():
                path = self._path(shard)
                path.unlink(missing_ok=True)
                path.with_name(f"{path.name}.offsets").unlink(missing_ok=True)
            given = shard in self._given
            then = "it will be brought anew when it is opened" if given else "bringing it anew"
            _say(f"the copy of shard {shard.name} in {self._folder} was damaged: {then}")
            same = not given and self._has_sum(shard)
        if same:
            self._unchanged.add(shard)
        return same

    def _has_sum(self, shard: Shard) -> bool:
        location = join(self.root, shard.name)
        # not `open`, of which `unchanged` must know
        remotely = is_remote(location)
        file = self._cached(shard, location, threading.Event()) if remotely else self.open(shard)
        with file:
            try:
                return hashlib.file_digest(file, "sha256").hexdigest() == shard.sha256
            except OSError as error:
                raise UserError(
                    f"cannot read shard {shard.name} of the dataset at {shown(self.root)}: "
                    f"{error.strerror}; check the disk"
                ) from None

    def ahead(self, shards: Iterable[Shard]) -> None:
        """Begin to bring remote shards that are not there yet, in this order, in the background.

        Those that are there count as used. What fails is left to the `open` that needs it: were it
        tried at every call, all ranks would go on asking a server for what it can't give.
        """
        for shard in shards:
            known = shard.sha256 in self._on_the_way or shard.sha256 in self._failed
            if known or not is_remote(join(self.root, shard.name)):
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
            except (UserError, OSError):
                self._failed.add(shard.sha256)  # it may never be needed; `open` says it
            except Stopped:
                return
            except Exception as error:  # noqa: BLE001 - the next shards are to be brought still
                self._failed.add(shard.sha256)
                _say(f"cannot bring shard {shard.name} ahead: {error!r}")
            finally:
                self._on_the_way.discard(shard.sha256)

    @property
    def _folder(self) -> Path:
        given = self._options.folder or os.environ.get("SGAN_CACHE")
        return Path(given) if given else cache_home() / "sgan_dist" / "shards"

    def _path(self, shard: Shard) -> Path:
        if not re.fullmatch("[0-9a-f]{64}", shard.sha256):  # it becomes a path here
            raise UserError(
                f"the index of the dataset at {shown(self.root)} gives shard {shard.name} the sha256 "
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
            path = self._path(shard)
            patience = self._transport.timeout + remote.LONGEST_WAIT_SECONDS
            with locked(
                target.with_name(f"{target.name}.lock"),
                _key(location, self._transport),
                stop,
                path.exists,
                lambda: _progress(incoming, shard.sha256),
                patience,
            ) as alone:
                file = self._found(shard)
                if file is not None:
                    return file
                if alone:
                    for left in incoming.glob(f".{target.name}.*"):
                        left.unlink(missing_ok=True)  # by a process that was killed
                else:
                    _say(
                        f"who brings shard {shard.name} got nothing for {patience:g} s: bringing "
                        "it without waiting longer"
                    )
                    # a name that who holds the lock does not sweep
                    target = incoming / f"own.{shard.sha256}.{os.urandom(8).hex()}"
                fetch(location, target, self._transport, shard.bytes, shard.sha256, stop)
                with self._alone():
                    self._make_room(limit - shard.bytes)
                    path.parent.mkdir(exist_ok=True)
                    target.replace(path)
                    return open(path, "rb")
        except OSError as error:
            raise self._unusable(shard, error) from None

    def _unusable(self, shard: Shard, error: OSError) -> UserError:
        return UserError(
            f"cannot keep shard {shard.name} in the cache of shards at {self._folder} "
            f"({error.strerror}): let data.cache or SGAN_CACHE name a folder on a disk of "
            "this node with room for it"
        )

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
        kept: dict[str, tuple[int, int, list[Path]]] = {}
        for path in self._folder.glob("[0-9a-f][0-9a-f]/*"):
            state = path.stat()
            used, size, paths = kept.get(path.stem, (0, 0, []))
            used = max(used, state.st_mtime_ns)
            kept[path.stem] = used, size + state.st_size, [*paths, path]
        total = sum(size for _, size, _ in kept.values())
        for _, size, paths in sorted(kept.values()):
            if total <= limit:
                return
            for path in paths:
                path.unlink()
            total -= size

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Nobody else puts shards in or out."""
        with open(self._folder / "lock", "ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def _key(location: str, transport: Transport) -> str:
    """Of whom an error is one's own: the same job's processes, which want the same file."""
    address, port = (os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT"))
    job = f"{address}:{port}" if address or port else ""
    text = repr((location, transport.tries, transport.timeout, job))
    return hashlib.sha256(text.encode()).hexdigest()


def _progress(incoming: Path, sha256: str) -> list[tuple[str, int, int]]:
    """What changes while a shard arrives."""
    found = []
    for path in incoming.glob(f".{sha256}.*"):
        with contextlib.suppress(FileNotFoundError):  # they come and go
            state = path.stat()
            found.append((path.name, state.st_size, state.st_mtime_ns))
    return sorted(found)


def _parsed(location: str, data: bytes, records: int) -> Int64s:
    try:
        offsets: Int64s = np.lib.format.read_array(io.BytesIO(data))
    except (OSError, ValueError, EOFError) as error:
        raise _useless(location, str(error)) from None
    if offsets.shape != (records + 1,) or offsets.dtype != np.int64:
        raise UserError(f"{shown(location)} is not of its shard: delete it, it is not needed")
    return offsets


def _useless(location: str, why: str | None) -> UserError:
    return UserError(f"cannot read {shown(location)}: {why}; delete it, it is not needed")


def _say(line: str) -> None:
    print(line, file=sys.stderr)
