"""Sidecars of record offsets, local and remote."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from sgan_dist.errors import UserError
from tests.data.remote.shards import SIZE, cached_names, content, put, shard_of, sidecar, storage
from tests.servers import FolderServer, status

pytestmark = pytest.mark.timeout(120)

SHARDS = [shard_of(name, name.encode()) for name in "abcdefgh"]


@pytest.mark.parametrize("kind", ["local", "http"])
def test_offsets(server: FolderServer, cache: Path, kind: str) -> None:
    store = storage(server.folder if kind == "local" else server.url, cache)
    path = server.folder / "unlabeled" / "000012.tar.offsets.npy"
    good, *others = SHARDS
    assert store.offsets("unlabeled", 12, 2, good) is None
    path.parent.mkdir()
    assert store.offsets("unlabeled", 12, 2, good) is None
    path.write_bytes(sidecar(np.array([0, 512, 1024])))
    offsets = store.offsets("unlabeled", 12, 2, good)
    assert offsets is not None and offsets.tolist() == [0, 512, 1024]
    assert store.offsets("unlabeled", 13, 2, others[0]) is None
    for wrong in (np.array([0, 512]), np.array([0.0, 1.0, 2.0]), np.array([[0, 512, 1024]])):
        path.write_bytes(sidecar(wrong))
        with pytest.raises(UserError, match=rf"{path.name} does not match its shard: delete it"):
            store.offsets("unlabeled", 12, 2, others.pop())
    for broken in (b"", b"<html>", sidecar(np.array([0, 512, 1024]))[:-1]):
        path.write_bytes(broken)
        with pytest.raises(UserError, match=rf"cannot read .*{path.name}: .*; delete it"):
            store.offsets("unlabeled", 12, 2, others.pop())
    # only what was remote and right is cached
    names = {path.name for path in cache.glob("??/*")}
    assert names == (set() if kind == "local" else {f"{good.sha256}.offsets"})


def test_a_server_that_refuses_or_fails(server: FolderServer, cache: Path) -> None:
    path = "/unlabeled/000000.tar.offsets.npy"
    store = storage(server.url, cache)
    server.faults[path] = status(403)  # the answer of S3 if listing is not allowed
    assert store.offsets("unlabeled", 0, 2, SHARDS[0]) is None
    server.faults[path] = status(500)
    with pytest.raises(UserError, match=r"cannot download .*offsets\.npy \(HTTP 500 .*, 2 tries"):
        store.offsets("unlabeled", 0, 2, SHARDS[0])
    piped = storage("pipe:cat /no/such", cache)
    assert piped.offsets("unlabeled", 0, 2, SHARDS[0]) is None


def test_offsets_are_cached_and_removed_with_their_shard(server: FolderServer, cache: Path) -> None:
    a, b = put(server.folder, "a.tar"), put(server.folder, "b.tar")
    (server.folder / "unlabeled").mkdir()
    path = "/unlabeled/000000.tar.offsets.npy"
    (server.folder / path[1:]).write_bytes(sidecar(np.arange(3)))
    store = storage(server.url, cache, gib=1.5 * SIZE / 2**30)
    content(store, a)
    for _ in range(2):
        offsets = store.offsets("unlabeled", 0, 2, a)
        assert offsets is not None and offsets.tolist() == [0, 1, 2]
    assert server.requests[path] == 1
    assert cached_names(cache) == {a.sha256, f"{a.sha256}.offsets"}
    content(store, b)
    assert cached_names(cache) == {b.sha256}


def test_damaged_offsets_in_the_cache(server: FolderServer, cache: Path) -> None:
    shard = put(server.folder, "a.tar")
    (server.folder / "unlabeled").mkdir()
    path = "/unlabeled/000000.tar.offsets.npy"
    (server.folder / path[1:]).write_bytes(sidecar(np.arange(3)))
    store = storage(server.url, cache)
    store.offsets("unlabeled", 0, 2, shard)
    cached = cache / shard.sha256[:2] / f"{shard.sha256}.offsets"
    cached.write_bytes(b"damaged")
    with pytest.raises(UserError, match=rf"cannot read {cached}: .*; delete it"):
        store.offsets("unlabeled", 0, 2, shard)
