"""Processes that share the cache: one downloads, the others wait, and any of them may die."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from pathlib import Path

import pytest

from sgan_dist.config import RemoteConfig
from sgan_dist.data.remote import cache as cache_module
from sgan_dist.errors import TransientError
from tests.data.remote.shards import (
    OPEN,
    body,
    cached_names,
    content,
    process,
    put,
    storage,
    wait_for_download,
    wait_for_waiters,
)
from tests.servers import FolderServer, Handler, stall, status

pytestmark = pytest.mark.timeout(120)


@pytest.mark.process
def test_several_processes_download_once(server: FolderServer, cache: Path) -> None:
    shard = put(server.folder, "a.tar")
    go = threading.Event()

    def after_go(handler: Handler, data: bytes) -> None:
        go.wait()
        handler.begin(len(data))
        handler.wfile.write(data)

    server.faults["/a.tar"] = after_go
    with contextlib.ExitStack() as stack:
        processes = [stack.enter_context(process(OPEN, server, cache, shard)) for _ in range(5)]
        wait_for_waiters(*processes)
        go.set()
        assert [each.communicate()[0] for each in processes] == [body("a.tar")] * 5
    assert server.requests == {"/a.tar": 1}
    assert cached_names(cache) == {shard.sha256}


@pytest.mark.process
def test_a_waiting_process_tries_after_a_failed_one(server: FolderServer, cache: Path) -> None:
    shard = put(server.folder, "a.tar")
    go = threading.Event()

    def fails(handler: Handler, data: bytes) -> None:
        go.wait()
        status(403)(handler, data)

    server.faults["/a.tar"] = [fails]
    with process(OPEN, server, cache, shard) as first:
        while not server.requests["/a.tar"]:
            time.sleep(0.01)
        with process(OPEN, server, cache, shard) as second:
            wait_for_waiters(second)
            go.set()
            assert b"HTTP 403" in first.communicate()[0]
            assert second.communicate()[0] == body("a.tar")
    assert server.requests == {"/a.tar": 2}
    assert cached_names(cache) == {shard.sha256}


@pytest.mark.process
def test_a_waiting_process_takes_over_from_a_killed_one(server: FolderServer, cache: Path) -> None:
    shard = put(server.folder, "a.tar")
    server.faults["/a.tar"] = [stall]
    with process(OPEN, server, cache, shard) as first:
        wait_for_download(cache)
        with process(OPEN, server, cache, shard) as second:
            wait_for_waiters(second)
            first.kill()
            assert second.communicate()[0] == body("a.tar")
    assert server.requests == {"/a.tar": 2}
    assert cached_names(cache) == {shard.sha256}


@pytest.mark.process
def test_a_stalled_process_ends_one_that_waits_for_it(
    server: FolderServer, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_module, "CONNECT_SECONDS", 0.1)
    monkeypatch.setattr(cache_module, "LONGEST_WAIT_SECONDS", 0.1)
    shard = put(server.folder, "a.tar")
    server.faults["/a.tar"] = [stall]
    hasty = storage(server.url, cache, remote=RemoteConfig(tries=1, read_timeout=1.0))
    with process(OPEN, server, cache, shard) as first:
        wait_for_download(cache)
        first.send_signal(signal.SIGSTOP)
        # exit code 75: the same command may succeed later
        with pytest.raises(TransientError, match=r"another process .*a\.tar.* for 1 seconds"):
            hasty.open(shard)


@pytest.mark.process
def test_files_of_a_killed_process_are_removed(server: FolderServer, cache: Path) -> None:
    shard = put(server.folder, "a.tar")
    server.faults["/a.tar"] = [stall]
    with process(OPEN, server, cache, shard):
        wait_for_download(cache)
    assert len(list(cache.glob("incoming/*"))) == 2  # the lock file and half of the shard
    assert content(storage(server.url, cache), shard) == body("a.tar")
    assert cached_names(cache) == {shard.sha256}


@pytest.mark.process
def test_a_full_disk(server: FolderServer, cache: Path) -> None:
    shard = put(server.folder, "a.tar")
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (4096, -1))\n"
    with process(limit + OPEN, server, cache, shard) as full:
        output = full.communicate()[0].decode()
    assert "(File too large): make room there" in output
    assert server.requests == {"/a.tar": 1}
    assert cached_names(cache) == set()
