"""Prefetching of remote shards: in the background, a few at a time, and errors left to `open`."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest

from sgan_dist.config import RemoteConfig
from sgan_dist.data.index import Shard
from sgan_dist.data.remote.cache import THREADS
from sgan_dist.errors import UserError
from tests.data.remote.shards import (
    OPEN,
    SIZE,
    body,
    cached_file,
    cached_names,
    content,
    process,
    put,
    shard_of,
    storage,
)
from tests.servers import FolderServer, Handler, stall, status

pytestmark = pytest.mark.timeout(120)


def wait_until_cached(cache: Path, shard: Shard) -> None:
    while not cached_file(cache, shard).exists():
        time.sleep(0.01)


def test_prefetched_shards_are_downloaded_once(server: FolderServer, cache: Path) -> None:
    shards = [put(server.folder, f"{letter}.tar") for letter in "abcdef"]
    store = storage(server.url, cache)
    store.prefetch(shards)
    store.prefetch(shards)
    for shard in shards:  # some are cached, some in flight
        assert content(store, shard) == body(shard.name)
    store.prefetch(shards)
    store.close()
    assert server.requests == {f"/{shard.name}": 1 for shard in shards}
    assert cached_names(cache) == {shard.sha256 for shard in shards}


def test_prefetching_needs_no_open(server: FolderServer, cache: Path) -> None:
    shard = put(server.folder, "a.tar")
    store = storage(server.url, cache)
    store.prefetch([shard])
    wait_until_cached(cache, shard)
    store.close()
    server.close()
    assert content(store, shard) == body("a.tar")


def test_removed_shards_are_prefetched_again(server: FolderServer, cache: Path) -> None:
    a, b = put(server.folder, "a.tar"), put(server.folder, "b.tar")
    store = storage(server.url, cache, gib=SIZE / 2**30)
    for shard in (a, b, a):
        store.prefetch([shard])
        while not cached_file(cache, shard).exists():
            time.sleep(0.01)
            store.prefetch([shard])
    store.close()
    assert server.requests == {"/a.tar": 2, "/b.tar": 1}


def test_a_few_at_a_time(server: FolderServer, cache: Path) -> None:
    shards = [put(server.folder, f"{letter}.tar") for letter in "abcdefgh"]
    go = threading.Event()

    def after_go(handler: Handler, data: bytes) -> None:
        go.wait()
        handler.begin(len(data))
        handler.wfile.write(data)

    server.faults = {f"/{shard.name}": after_go for shard in shards}
    store = storage(server.url, cache)
    store.prefetch(shards)
    while server.requests.total() < THREADS:
        time.sleep(0.01)
    time.sleep(0.5)
    assert server.requests == {f"/{shard.name}": 1 for shard in shards[:THREADS]}
    go.set()
    assert content(store, shards[-1]) == body(shards[-1].name)
    store.close()


def test_open_raises_after_a_failed_prefetch(server: FolderServer, cache: Path) -> None:
    shard = put(server.folder, "a.tar")
    server.faults["/a.tar"] = [status(403)]
    store = storage(server.url, cache)
    store.prefetch([shard])
    while not server.requests["/a.tar"] or list(cache.glob("incoming/*")):
        time.sleep(0.01)
    assert content(store, shard) == body("a.tar")
    missing = shard_of("b.tar", body("b.tar"))
    store.prefetch([missing])
    with pytest.raises(UserError, match=r"cannot download http://.*/b\.tar \(HTTP 404"):
        store.open(missing)
    store.close()


def test_a_failed_prefetch_is_not_repeated(server: FolderServer, cache: Path) -> None:
    shard, last = put(server.folder, "a.tar"), put(server.folder, "z.tar")
    server.faults["/a.tar"] = [status(403), status(403)]
    store = storage(server.url, cache)

    def prefetch() -> None:
        """Prefetches both, and waits; `last` is removed first, so that it is always downloaded."""
        cached_file(cache, last).unlink(missing_ok=True)
        store.prefetch([shard, last])
        wait_until_cached(cache, last)
        for thread in list(store._in_flight.values()):  # while it runs, a shard is not prefetched
            thread.join()

    for _ in range(3):
        prefetch()
    assert server.requests["/a.tar"] == 1
    with pytest.raises(UserError, match=r"cannot download .*/a\.tar \(HTTP 403"):
        store.open(shard)
    prefetch()
    assert server.requests["/a.tar"] == 2
    assert content(store, shard) == body("a.tar")
    cached_file(cache, shard).unlink()  # as by another job of the node
    prefetch()
    wait_until_cached(cache, shard)
    store.close()
    assert server.requests["/a.tar"] == 4


def test_prefetching_survives_any_error(
    server: FolderServer,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    log: pytest.LogCaptureFixture,
) -> None:
    a, b = put(server.folder, "a.tar"), put(server.folder, "b.tar")
    monkeypatch.setattr("sgan_dist.data.remote.cache.THREADS", 1)
    with storage(server.url, cache) as store:
        original = store._open_cached

        def fails_once(*arguments: Any) -> None:
            monkeypatch.setattr(store, "_open_cached", original)
            raise RuntimeError("odd")

        monkeypatch.setattr(store, "_open_cached", fails_once)
        store.prefetch([a, b])
        wait_until_cached(cache, b)
    assert "cannot prefetch shard a.tar: RuntimeError('odd')" in log.text


def test_close_ends_stalled_downloads(server: FolderServer, cache: Path) -> None:
    shards = [put(server.folder, f"{letter}.tar") for letter in "abcdefgh"]
    server.faults = {f"/{shard.name}": stall for shard in shards}
    store = storage(server.url, cache, remote=RemoteConfig(read_timeout=3600.0))
    store.prefetch(shards)
    while server.requests.total() < THREADS:
        time.sleep(0.01)
    store.close()
    store.close()
    while list(cache.glob("incoming/*")):  # for an hour, if they did not end
        time.sleep(0.01)
    assert cached_names(cache) == set() and server.requests.total() == THREADS
    server.faults.clear()
    assert content(store, shards[0]) == body(shards[0].name)


# prefetches a shard, and ends in the middle of its download
LEAVE = OPEN.partition("try:")[0].replace("tries=2", "read_timeout=3600.0") + (
    """
store.prefetch([shard])
import time
from pathlib import Path
while not any(path.stat().st_size for path in Path(cache).glob("incoming/.*")):
    time.sleep(0.01)
print("end")
"""
)


@pytest.mark.process
def test_a_process_ends_without_close(server: FolderServer, cache: Path) -> None:
    shard = put(server.folder, "a.tar")
    server.faults["/a.tar"] = stall
    with process(LEAVE, server, cache, shard) as leaving:
        assert leaving.communicate()[0] == b"end\n"
        assert leaving.returncode == 0
