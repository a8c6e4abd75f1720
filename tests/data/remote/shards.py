"""Shards of random bytes, a cache that holds them, and processes that open them."""

from __future__ import annotations

import contextlib
import hashlib
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from sgan_dist.config import RemoteConfig
from sgan_dist.data.index import Shard
from sgan_dist.data.remote.cache import Storage
from tests.ranks import REPOSITORY
from tests.servers import FolderServer

SIZE = 100_000
REMOTE = RemoteConfig(tries=2, read_timeout=30.0)


def body(name: str, size: int = SIZE) -> bytes:
    """The bytes of the shard of that name."""
    seed = int.from_bytes(name.encode(), "big")
    return np.random.default_rng(seed).integers(0, 256, size, np.uint8).tobytes()


def shard_of(name: str, data: bytes) -> Shard:
    return Shard(name, 1, len(data), hashlib.sha256(data).hexdigest())


def put(folder: Path, name: str, size: int = SIZE) -> Shard:
    """Writes a shard into the folder."""
    data = body(name, size)
    (folder / name).write_bytes(data)
    return shard_of(name, data)


def renamed(shard: Shard, name: str) -> Shard:
    """The same bytes under another name."""
    return Shard(name, shard.samples, shard.bytes, shard.sha256)


def storage(
    root: str | Path, cache: Path, gib: float = 1.0, remote: RemoteConfig = REMOTE
) -> Storage:
    settings = replace(remote, cache=str(cache), cache_gib=gib)
    return Storage(str(root), settings)


def content(store: Storage, shard: Shard) -> bytes:
    with store.open(shard) as file:
        return file.read()


def cached_file(cache: Path, shard: Shard) -> Path:
    return cache / shard.sha256[:2] / shard.sha256


def cached_names(cache: Path) -> set[str]:
    """The names of the files in the cache. No unfinished download may be left in it."""
    assert list((cache / "incoming").iterdir()) == []
    return {path.name for path in cache.glob("??/*")}


# prints a shard's bytes, or the error
OPEN = """
import sys
from sgan_dist.config import RemoteConfig
from sgan_dist.data.index import Shard
from sgan_dist.data.remote import transfer
from sgan_dist.data.remote.cache import Storage
from sgan_dist.errors import UserError
transfer.BACKOFF_SECONDS = 0.0
root, cache, name, size, sha256 = sys.argv[1:]
shard = Shard(name, 1, int(size), sha256)
store = Storage(root, RemoteConfig(cache=cache, cache_gib=1.0, tries=2))
print("opening", file=sys.stderr, flush=True)
try:
    with store.open(shard) as file:
        sys.stdout.buffer.write(file.read())
except UserError as error:
    print(error)
"""


@contextlib.contextmanager
def process(
    code: str, server: FolderServer, cache: Path, shard: Shard
) -> Iterator[subprocess.Popen[bytes]]:
    """Runs code such as OPEN in a process of its own, and kills it at the end."""
    arguments = [server.url, str(cache), shard.name, str(shard.bytes), shard.sha256]
    command = [sys.executable, "-c", code, *arguments]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, cwd=REPOSITORY) as started:
        try:
            yield started
        finally:
            started.kill()


def wait_for_download(cache: Path) -> None:
    """Waits until a part of a shard has arrived."""
    while not any(path.stat().st_size for path in cache.glob("incoming/.*")):
        time.sleep(0.01)


def wait_for_waiters(*waiting: subprocess.Popen[bytes]) -> None:
    """Waits until each of these processes, which run OPEN, waits for another one's download."""
    for each in waiting:
        assert each.stderr is not None and b"opening\n" in each.stderr
    time.sleep(0.5)  # nothing shows that a process waits for a lock
