"""The cache of remote shards: limited and repaired; local shards; and all kinds of location."""

from __future__ import annotations

import os
import pwd
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from sgan_dist.config import RemoteConfig
from sgan_dist.data.index import Shard
from sgan_dist.data.remote.cache import ABANDONED_SECONDS, Storage
from sgan_dist.errors import UserError
from tests.data.remote.shards import (
    SIZE,
    body,
    cached_file,
    cached_names,
    content,
    put,
    renamed,
    shard_of,
    storage,
)
from tests.servers import FolderServer, environment, garble, s3_server, slow

pytestmark = pytest.mark.timeout(120)

# Local


def test_a_local_shard_is_opened_where_it_is(tmp_path: Path, cache: Path) -> None:
    shard = put(tmp_path, "a.tar")
    for same in (shard, renamed(shard, str(tmp_path / "a.tar"))):
        store = storage(tmp_path, cache)
        store.prefetch([same])
        with store.open(same) as file:
            assert file.tell() == 0
            assert file.read() == body("a.tar")
            assert os.path.samestat(os.fstat(file.fileno()), (tmp_path / "a.tar").stat())
        assert store.unchanged(same)
        store.close()
    assert not cache.exists()


def test_a_local_shard_of_another_size(tmp_path: Path, cache: Path) -> None:
    shard = put(tmp_path, "a.tar")
    (tmp_path / "a.tar").write_bytes(body("a.tar")[:-1])
    message = (
        rf"shard a\.tar of the dataset at {tmp_path} no longer matches the index: it has "
        rf"{SIZE - 1} bytes, the index says {SIZE}; copy it again"
    )
    for method in (Storage.open, Storage.unchanged):
        with pytest.raises(UserError, match=message):
            method(storage(tmp_path, cache), shard)
    (tmp_path / "a.tar").unlink()
    with pytest.raises(UserError, match=r"cannot read shard a\.tar .*No such file"):
        storage(tmp_path, cache).open(shard)


def test_a_local_shard_of_other_bytes(tmp_path: Path, cache: Path) -> None:
    shard = put(tmp_path, "a.tar")
    (tmp_path / "a.tar").write_bytes(body("b.tar"))
    store = storage(tmp_path, cache)
    assert content(store, shard) == body("b.tar")  # only its size is checked
    assert not store.unchanged(shard)
    assert (tmp_path / "a.tar").exists()  # the user's own file is not removed


def test_unchanged_is_remembered(tmp_path: Path, cache: Path) -> None:
    shard, other = put(tmp_path, "a.tar"), put(tmp_path, "b.tar")
    store = storage(tmp_path, cache)
    assert store.unchanged(shard)
    for name in ("a.tar", "b.tar"):
        (tmp_path / name).write_bytes(body("c.tar"))
    assert store.unchanged(shard)
    assert not store.unchanged(other)


# Remote


def test_a_remote_shard_is_downloaded_once(server: FolderServer, cache: Path) -> None:
    shard = put(server.folder, "a.tar")
    store = storage(server.url, cache)
    with store.open(shard) as file:
        assert file.tell() == 0
        assert file.read() == body("a.tar")
    assert content(store, shard) == body("a.tar")
    assert content(storage(server.url, cache), shard) == body("a.tar")
    assert storage(server.url, cache).unchanged(shard)
    # the same bytes under another name are the same shard
    elsewhere = renamed(shard, "s3://nowhere/b.tar")
    assert content(storage("/no/such/folder", cache), elsewhere) == body("a.tar")
    assert server.requests == {"/a.tar": 1}
    assert cached_names(cache) == {shard.sha256}


def test_the_place_of_the_cache(server: FolderServer, tmp_path: Path) -> None:
    shard = put(server.folder, "a.tar")
    by_setting, by_variable, by_xdg = (tmp_path / name for name in "123")
    with environment(SGAN_CACHE=str(by_variable), XDG_CACHE_HOME=str(by_xdg)):
        content(storage(server.url, by_setting), shard)
        content(Storage(server.url, RemoteConfig()), shard)
        with environment(SGAN_CACHE=None):
            content(Storage(server.url, RemoteConfig()), shard)
    for folder in (by_setting, by_variable, by_xdg / "sgan_dist" / "shards"):
        assert cached_names(folder) == {shard.sha256}


def test_a_user_without_a_home(server: FolderServer, monkeypatch: pytest.MonkeyPatch) -> None:
    shard = put(server.folder, "a.tar")

    def no_entry(_: int) -> None:
        raise KeyError

    monkeypatch.setattr(pwd, "getpwuid", no_entry)
    with (
        environment(HOME=None, XDG_CACHE_HOME=None, SGAN_CACHE=None),
        pytest.raises(UserError, match="no home folder: set XDG_CACHE_HOME"),
    ):
        Storage(server.url, RemoteConfig()).open(shard)
    assert not server.requests


def test_a_remote_shard_of_other_bytes(server: FolderServer, cache: Path) -> None:
    shard = put(server.folder, "a.tar")
    server.faults["/a.tar"] = garble
    message = r"no longer match the index: http://.*/a\.tar has sha256 .*, the index says"
    with pytest.raises(UserError, match=message):
        storage(server.url, cache).open(shard)
    (server.folder / "a.tar").write_bytes(b"new")
    server.faults.clear()
    with pytest.raises(UserError, match=rf"a\.tar has 3 bytes, the index says {SIZE}"):
        storage(server.url, cache).open(shard)
    assert cached_names(cache) == set()


def test_an_invalid_sum(server: FolderServer, cache: Path, tmp_path: Path) -> None:
    (tmp_path / "private").write_bytes(b"private")
    shard = Shard("a.tar", 1, 10, f"../../../{tmp_path}/private")
    for method in (Storage.open, Storage.unchanged):
        with pytest.raises(UserError, match=r"shard a\.tar the sha256 .* which is not valid"):
            method(storage(server.url, cache), shard)
    assert (tmp_path / "private").read_bytes() == b"private"


def test_no_password_in_messages(cache: Path) -> None:
    store = storage("http://user:secret@127.0.0.1:9/d?sig=secret", cache)
    with pytest.raises(UserError) as caught:
        store.open(Shard("a", 1, 1, "x"))
    assert "secret" not in str(caught.value)


def test_a_slow_server_and_a_small_timeout(server: FolderServer, cache: Path) -> None:
    shard = put(server.folder, "a.tar")
    server.faults["/a.tar"] = slow(pieces=8, seconds=0.3)  # 2.4 s in all
    store = storage(server.url, cache, remote=RemoteConfig(tries=1, read_timeout=2.0))
    assert content(store, shard) == body("a.tar")


# The limit


def test_the_least_recently_used_is_removed_first(server: FolderServer, cache: Path) -> None:
    names = [f"{letter}.tar" for letter in "abcde"]
    a, b, c, d, e = (put(server.folder, name) for name in names)
    store = storage(server.url, cache, gib=3 * SIZE / 2**30)

    def use(shard: Shard) -> None:
        assert content(store, shard) == body(shard.name)
        time.sleep(0.02)  # file times are as coarse as the kernel's clock

    for shard in (a, b, c, a):
        use(shard)
    use(d)
    assert cached_names(cache) == {a.sha256, c.sha256, d.sha256}
    store.prefetch([c])  # it will be needed soon
    time.sleep(0.02)
    use(e)
    assert cached_names(cache) == {c.sha256, d.sha256, e.sha256}
    use(b)
    assert cached_names(cache) == {b.sha256, c.sha256, e.sha256}
    assert server.requests == {f"/{name}": 2 if name == "b.tar" else 1 for name in names}


def test_shards_of_several_sizes_within_the_limit(server: FolderServer, cache: Path) -> None:
    small = [put(server.folder, f"{letter}.tar", SIZE // 4) for letter in "abcd"]
    big = put(server.folder, "e.tar", SIZE)
    store = storage(server.url, cache, gib=1.25 * SIZE / 2**30)
    for shard in small:
        content(store, shard)
        time.sleep(0.02)
    content(store, big)
    assert cached_names(cache) == {small[-1].sha256, big.sha256}


def test_a_shard_beyond_the_limit(server: FolderServer, cache: Path) -> None:
    shard = put(server.folder, "a.tar")
    store = storage(server.url, cache, gib=(SIZE - 1) / 2**30)
    with pytest.raises(UserError, match=r"shard a\.tar has .* GiB, .* raise remote\.cache_gib"):
        store.open(shard)
    assert not server.requests


def test_a_reader_survives_the_removal(server: FolderServer, cache: Path) -> None:
    a, b = put(server.folder, "a.tar"), put(server.folder, "b.tar")
    store = storage(server.url, cache, gib=SIZE / 2**30)
    with store.open(a) as file:
        start = file.read(10)
        content(store, b)
        assert cached_names(cache) == {b.sha256}
        assert start + file.read() == body("a.tar")


def test_many_threads_and_a_small_cache(server: FolderServer, cache: Path) -> None:
    shards = [put(server.folder, f"{letter}.tar") for letter in "abcdef"]
    storages = [storage(server.url, cache, gib=2 * SIZE / 2**30) for _ in range(6)]

    def read_all(number: int) -> None:
        for shard in shards[number:] + shards[:number]:
            assert content(storages[number], shard) == body(shard.name)

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(read_all, range(6)))
    assert len(cached_names(cache)) == 2


def test_old_files_of_other_processes_are_removed(server: FolderServer, cache: Path) -> None:
    shard = put(server.folder, "a.tar")
    (cache / "incoming").mkdir(parents=True)
    old = time.time() - ABANDONED_SECONDS - 60
    for name in (".old.0", "old.lock"):
        (cache / "incoming" / name).touch()
        os.utime(cache / "incoming" / name, (old, old))
    (cache / "incoming" / ".new.0").touch()
    content(storage(server.url, cache), shard)
    assert [path.name for path in cache.glob("incoming/*")] == [".new.0"]


# Damage


def test_a_cached_shard_that_was_cut(server: FolderServer, cache: Path) -> None:
    shard = put(server.folder, "a.tar")
    store = storage(server.url, cache)
    content(store, shard)
    os.truncate(cached_file(cache, shard), SIZE // 2)
    assert content(store, shard) == body("a.tar")
    assert server.requests == {"/a.tar": 2}


def test_a_cached_shard_that_was_damaged(
    server: FolderServer, cache: Path, log: pytest.LogCaptureFixture
) -> None:
    shard = put(server.folder, "a.tar")
    content(storage(server.url, cache), shard)
    cached_file(cache, shard).write_bytes(body("b.tar"))
    store = storage(server.url, cache)
    assert content(store, shard) == body("b.tar")
    assert not store.unchanged(shard)
    assert "the copy of shard a.tar in" in log.text
    assert cached_names(cache) == set()
    assert content(store, shard) == body("a.tar")  # repaired
    assert store.unchanged(shard)
    assert server.requests == {"/a.tar": 2}


def test_a_folder_that_cannot_be_used(server: FolderServer, tmp_path: Path) -> None:
    shard = put(server.folder, "a.tar")
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match=r"cannot keep shard a\.tar .*remote\.cache or SGAN_C"):
            storage(server.url, folder).open(shard)
    assert not server.requests


# Other kinds of location


@pytest.mark.process
def test_pipes(tmp_path: Path, cache: Path) -> None:
    shard = put(tmp_path, "a.tar")
    store = storage(f"pipe:cat {tmp_path}", cache)
    store.prefetch([shard])
    assert content(store, shard) == body("a.tar")
    store.close()
    (tmp_path / "a.tar").unlink()
    assert content(store, shard) == body("a.tar")
    missing = shard_of("c.tar", body("c.tar"))
    with pytest.raises(UserError, match=r"pipe:cat .*/c\.tar \(exit status 1: .*No such file"):
        store.open(missing)


@pytest.mark.process
def test_s3(tmp_path: Path, cache: Path) -> None:
    served = tmp_path / "bucket"
    served.mkdir()
    shards = [put(served, f"{letter}.tar") for letter in "abcdef"]
    with s3_server("data") as s3:
        s3.upload(served, "data")
        store = storage("s3://data", cache)
        store.prefetch(shards)
        for shard in shards:
            assert content(store, shard) == body(shard.name)
            assert store.unchanged(shard)
        missing = shard_of("g.tar", b"g")
        with pytest.raises(UserError, match=r"s3://data/g\.tar \(HTTP 404 NoSuchKey"):
            store.open(missing)
        with pytest.raises(UserError, match="there is no bucket absent"):
            storage("s3://absent", cache).open(missing)
        store.close()
    assert cached_names(cache) == {shard.sha256 for shard in shards}
