"""The cache of remote shards: shared by processes, limited, healed; and local shards beside it."""

import contextlib
import hashlib
import io
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from sgan_dist.data import remote
from sgan_dist.data.index import Shard
from sgan_dist.data.remote import Transport
from sgan_dist.data.storage import ABANDONED_SECONDS, THREADS, CacheOptions, Storage
from sgan_dist.errors import Outage, UserError
from tests.servers import (
    environment,
    garble,
    http_server,
    s3_server,
    slow,
    stall,
    status,
)

SIZE = 100_000
TRANSPORT = Transport(tries=2, timeout=30.0)

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(autouse=True)
def _no_backoff(monkeypatch):
    monkeypatch.setattr(remote, "BACKOFF_SECONDS", 0.0)


@pytest.fixture
def server(tmp_path):
    (tmp_path / "served").mkdir()
    with http_server(tmp_path / "served") as server:
        yield server


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


def body(name, size=SIZE):
    seed = int.from_bytes(name.encode(), "big")
    return np.random.default_rng(seed).integers(0, 256, size, np.uint8).tobytes()


def shard_of(name, data):
    return Shard(name, 1, len(data), hashlib.sha256(data).hexdigest())


def put(folder, name, size=SIZE):
    """A shard in the folder."""
    data = body(name, size)
    (folder / name).write_bytes(data)
    return shard_of(name, data)


def storage(root, cache, gib=1.0, transport=TRANSPORT):
    return Storage(str(root), transport, CacheOptions(str(cache), gib))


def content(at, shard):
    with at.open(shard) as file:
        return file.read()


def kept(cache):
    """Sums of the shards in the cache; nothing may be left of what was on its way."""
    assert list((cache / "incoming").iterdir()) == []
    return {path.name for path in cache.glob("??/*")}


# Local


def test_a_local_shard_is_opened_where_it_is(tmp_path, cache):
    shard = put(tmp_path, "a.tar")
    for named in (shard, Shard(str(tmp_path / "a.tar"), *list_of(shard)[1:])):
        at = storage(tmp_path, cache)
        at.ahead([named])
        with at.open(named) as file:
            assert file.tell() == 0
            assert file.read() == body("a.tar")
            assert os.path.samestat(os.fstat(file.fileno()), (tmp_path / "a.tar").stat())
        assert at.unchanged(named)
        at.close()
    assert not cache.exists()


def list_of(shard):
    return [shard.name, shard.samples, shard.bytes, shard.sha256]


def test_a_local_shard_of_another_size(tmp_path, cache):
    shard = put(tmp_path, "a.tar")
    (tmp_path / "a.tar").write_bytes(body("a.tar")[:-1])
    message = (
        rf"shard a\.tar of the dataset at {tmp_path} no longer matches the index: it has "
        rf"{SIZE - 1} bytes, the index says {SIZE}; copy it again"
    )
    for attempt in (Storage.open, Storage.unchanged):
        with pytest.raises(UserError, match=message):
            attempt(storage(tmp_path, cache), shard)
    (tmp_path / "a.tar").unlink()
    with pytest.raises(UserError, match=r"cannot read shard a\.tar .*No such file"):
        storage(tmp_path, cache).open(shard)


def test_a_local_shard_of_other_bytes(tmp_path, cache):
    shard = put(tmp_path, "a.tar")
    (tmp_path / "a.tar").write_bytes(body("b.tar"))
    at = storage(tmp_path, cache)
    assert content(at, shard) == body("b.tar")  # only its size is looked at
    assert not at.unchanged(shard)
    assert (tmp_path / "a.tar").exists()  # not ours to remove


# Remote


def test_a_remote_shard_is_brought_once(server, cache):
    shard = put(server.folder, "a.tar")
    at = storage(server.url, cache)
    with at.open(shard) as file:
        assert file.tell() == 0
        assert file.read() == body("a.tar")
    assert content(at, shard) == body("a.tar")
    assert content(storage(server.url, cache), shard) == body("a.tar")
    assert storage(server.url, cache).unchanged(shard)
    # the same bytes under another name are the same shard
    elsewhere = Shard("s3://nowhere/b.tar", *list_of(shard)[1:])
    assert content(storage("/no/such/folder", cache), elsewhere) == body("a.tar")
    assert server.requests == {"/a.tar": 1}
    assert kept(cache) == {shard.sha256}


def test_where_the_cache_is(server, tmp_path):
    shard = put(server.folder, "a.tar")
    named = {"named": tmp_path / "1", "SGAN_CACHE": tmp_path / "2", "XDG": tmp_path / "3"}
    folders = [named["named"], named["SGAN_CACHE"], named["XDG"] / "sgan_dist" / "shards"]
    with environment(SGAN_CACHE=str(named["SGAN_CACHE"]), XDG_CACHE_HOME=str(named["XDG"])):
        options = CacheOptions(str(named["named"]))
        content(Storage(server.url, TRANSPORT, options), shard)
        content(Storage(server.url, TRANSPORT, CacheOptions()), shard)
        with environment(SGAN_CACHE=None):
            content(Storage(server.url, TRANSPORT, CacheOptions()), shard)
    for folder in folders:
        assert kept(folder) == {shard.sha256}


def test_a_remote_shard_of_other_bytes(server, cache):
    shard = put(server.folder, "a.tar")
    server.faults["/a.tar"] = garble
    message = r"no longer match the index: http://.*/a\.tar has sha256 .*, the index says"
    with pytest.raises(UserError, match=message):
        storage(server.url, cache).open(shard)
    (server.folder / "a.tar").write_bytes(b"new")
    server.faults.clear()
    with pytest.raises(UserError, match=rf"a\.tar has 3 bytes, the index says {SIZE}"):
        storage(server.url, cache).open(shard)
    assert kept(cache) == set()


def test_an_impossible_sum(server, cache, tmp_path):
    (tmp_path / "mine").write_bytes(b"mine")
    shard = Shard("a.tar", 1, 10, f"../../../{tmp_path}/mine")
    for attempt in (Storage.open, Storage.unchanged):
        with pytest.raises(UserError, match=r"shard a\.tar the sha256 .* which is none"):
            attempt(storage(server.url, cache), shard)
    assert (tmp_path / "mine").read_bytes() == b"mine"


OPEN = """
import sys
from sgan_dist.data import remote
from sgan_dist.data.index import Shard
from sgan_dist.data.remote import Transport
from sgan_dist.data.storage import CacheOptions, Storage
from sgan_dist.errors import UserError
remote.BACKOFF_SECONDS = 0.0
root, cache, name, size, sha256 = sys.argv[1:]
shard = Shard(name, 1, int(size), sha256)
at = Storage(root, Transport(tries=2), CacheOptions(cache, 1.0))
try:
    with at.open(shard) as file:
        sys.stdout.buffer.write(file.read())
except UserError as error:
    print(error)
"""


def start(code, server, cache, shard):
    """A process of its own."""
    arguments = [server.url, str(cache), shard.name, str(shard.bytes), shard.sha256]
    return subprocess.Popen([sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE)


@contextlib.contextmanager
def ended(*processes):
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def test_several_processes_ask_once(server, cache):
    shard = put(server.folder, "a.tar")
    go = threading.Event()

    def after_all_came(handler, data):
        go.wait()
        handler.begin(len(data))
        handler.wfile.write(data)

    server.faults["/a.tar"] = after_all_came
    processes = [start(OPEN, server, cache, shard) for _ in range(5)]
    with ended(*processes):
        wait_for_holders(cache, shard, [process.pid for process in processes])
        go.set()
        assert [process.communicate()[0] for process in processes] == [body("a.tar")] * 5
    assert server.requests == {"/a.tar": 1}
    assert kept(cache) == {shard.sha256}


def wait_for_holders(cache, shard, pids, times=1):
    """Until all these processes have the shard's lock file open, so many times."""
    lock = str(cache / "incoming" / f"{shard.sha256}.lock")
    for pid in pids:
        found = -1
        while found < times:
            time.sleep(0.01)
            found = 0
            for link in Path(f"/proc/{pid}/fd").iterdir():
                with contextlib.suppress(FileNotFoundError):
                    found += str(link.readlink()) == lock


def test_who_waited_fails_with_the_one_who_tried(server, cache):
    shard = put(server.folder, "a.tar")
    go = threading.Event()

    def fails(handler, data):
        go.wait()
        status(500)(handler, data)

    server.faults["/a.tar"] = fails
    with ThreadPoolExecutor(5) as pool:
        opening = [pool.submit(storage(server.url, cache).open, shard) for _ in range(5)]
        wait_for_holders(cache, shard, [os.getpid()], times=5)
        go.set()
        for each in opening:
            with pytest.raises(Outage, match=r"a\.tar \(HTTP 500 .*, 2 tries\)"):
                each.result()
    assert server.requests == {"/a.tar": 2}
    # who comes later tries
    server.faults.clear()
    assert content(storage(server.url, cache), shard) == body("a.tar")
    assert kept(cache) == {shard.sha256}


def test_killed_half_way(server, cache):
    shard = put(server.folder, "a.tar")
    server.faults["/a.tar"] = [stall]
    first = start(OPEN, server, cache, shard)
    with ended(first):
        while not any(path.stat().st_size for path in cache.glob("incoming/.*")):
            time.sleep(0.01)
        second = start(OPEN, server, cache, shard)  # waits for the first
        with ended(second):
            wait_for_holders(cache, shard, [second.pid])
            first.kill()
            assert second.communicate()[0] == body("a.tar")
    assert server.requests == {"/a.tar": 2}
    assert kept(cache) == {shard.sha256}


def test_killed_half_way_alone(server, cache):
    shard = put(server.folder, "a.tar")
    server.faults["/a.tar"] = [stall]
    first = start(OPEN, server, cache, shard)
    with ended(first):
        while not any(path.stat().st_size for path in cache.glob("incoming/.*")):
            time.sleep(0.01)
    assert len(list(cache.glob("incoming/*"))) == 2  # the lock file and a part
    assert content(storage(server.url, cache), shard) == body("a.tar")
    assert kept(cache) == {shard.sha256}


def test_what_others_left_long_ago_is_removed(server, cache):
    shard = put(server.folder, "a.tar")
    (cache / "incoming").mkdir(parents=True)
    for name, age in ((".old.0", ABANDONED_SECONDS + 60), ("old.lock", ABANDONED_SECONDS + 60)):
        (cache / "incoming" / name).touch()
        os.utime(cache / "incoming" / name, (time.time() - age, time.time() - age))
    (cache / "incoming" / ".new.0").touch()
    content(storage(server.url, cache), shard)
    assert [path.name for path in cache.glob("incoming/*")] == [".new.0"]


# The limit


def test_the_least_recently_used_goes_first(server, cache):
    names = [f"{letter}.tar" for letter in "abcde"]
    a, b, c, d, e = (put(server.folder, name) for name in names)
    at = storage(server.url, cache, gib=3 * SIZE / 2**30)

    def use(shard):
        assert content(at, shard) == body(shard.name)
        time.sleep(0.02)  # stamps are as fine as the kernel's clock

    for shard in (a, b, c, a):
        use(shard)
    use(d)
    assert kept(cache) == {a.sha256, c.sha256, d.sha256}
    at.ahead([c])  # it will be needed soon
    time.sleep(0.02)
    use(e)
    assert kept(cache) == {c.sha256, d.sha256, e.sha256}
    use(b)
    assert kept(cache) == {b.sha256, c.sha256, e.sha256}
    assert server.requests == {f"/{name}": 2 if name == "b.tar" else 1 for name in names}


def test_shards_of_several_sizes_within_the_limit(server, cache):
    small = [put(server.folder, f"{letter}.tar", SIZE // 4) for letter in "abcd"]
    big = put(server.folder, "e.tar", SIZE)
    at = storage(server.url, cache, gib=1.25 * SIZE / 2**30)
    for shard in small:
        content(at, shard)
        time.sleep(0.02)
    content(at, big)
    assert kept(cache) == {small[-1].sha256, big.sha256}


def test_a_shard_beyond_the_limit(server, cache):
    shard = put(server.folder, "a.tar")
    at = storage(server.url, cache, gib=(SIZE - 1) / 2**30)
    with pytest.raises(UserError, match=r"shard a\.tar has .* GiB, .* raise data\.cache_gib"):
        at.open(shard)
    assert not server.requests


def test_a_reader_survives_eviction(server, cache):
    a, b = put(server.folder, "a.tar"), put(server.folder, "b.tar")
    at = storage(server.url, cache, gib=SIZE / 2**30)
    with at.open(a) as file:
        start = file.read(10)
        content(at, b)
        assert kept(cache) == {b.sha256}
        assert start + file.read() == body("a.tar")


def test_many_threads_and_a_small_cache(server, cache):
    shards = [put(server.folder, f"{letter}.tar") for letter in "abcdef"]
    each = [storage(server.url, cache, gib=2 * SIZE / 2**30) for _ in range(6)]

    def read_all(number):
        for shard in shards[number:] + shards[:number]:
            assert content(each[number], shard) == body(shard.name)

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(read_all, range(6)))
    assert len(kept(cache)) == 2


# Damage


def test_a_cached_shard_that_was_cut(server, cache):
    shard = put(server.folder, "a.tar")
    at = storage(server.url, cache)
    content(at, shard)
    os.truncate(cache / shard.sha256[:2] / shard.sha256, SIZE // 2)
    assert content(at, shard) == body("a.tar")
    assert server.requests == {"/a.tar": 2}


def test_a_cached_shard_that_was_damaged(server, cache):
    shard = put(server.folder, "a.tar")
    content(storage(server.url, cache), shard)
    (cache / shard.sha256[:2] / shard.sha256).write_bytes(body("b.tar"))
    at = storage(server.url, cache)
    assert content(at, shard) == body("b.tar")
    assert not at.unchanged(shard)
    assert kept(cache) == set()
    assert content(at, shard) == body("a.tar")  # healed
    assert at.unchanged(shard)
    assert server.requests == {"/a.tar": 2}


def test_unchanged_is_remembered(tmp_path, cache):
    shard, other = put(tmp_path, "a.tar"), put(tmp_path, "b.tar")
    at = storage(tmp_path, cache)
    assert at.unchanged(shard)
    for name in ("a.tar", "b.tar"):
        (tmp_path / name).write_bytes(body("c.tar"))
    assert at.unchanged(shard)
    assert not at.unchanged(other)


def test_a_folder_that_cannot_be_used(server, tmp_path):
    shard = put(server.folder, "a.tar")
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match=r"cannot keep shard a\.tar .*data\.cache or SGAN_C"):
            storage(server.url, folder).open(shard)
    assert not server.requests


def test_a_full_disk(server, cache):
    shard = put(server.folder, "a.tar")
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (4096, -1))\n"
    process = start(limit + OPEN, server, cache, shard)
    with ended(process):
        said = process.communicate()[0].decode()
    assert "(File too large): make room there" in said
    assert server.requests == {"/a.tar": 1}
    assert kept(cache) == set()


# Ahead


def test_ahead(server, cache):
    shards = [put(server.folder, f"{letter}.tar") for letter in "abcdef"]
    at = storage(server.url, cache)
    at.ahead(shards)
    at.ahead(shards)
    for shard in shards:  # some are there, some on their way
        assert content(at, shard) == body(shard.name)
    at.ahead(shards)
    at.close()
    assert server.requests == {f"/{shard.name}": 1 for shard in shards}
    assert kept(cache) == {shard.sha256 for shard in shards}


def test_ahead_needs_no_open(server, cache):
    shard = put(server.folder, "a.tar")
    at = storage(server.url, cache)
    at.ahead([shard])
    while not (cache / shard.sha256[:2] / shard.sha256).exists():
        time.sleep(0.01)
    at.close()
    server.close()
    assert content(at, shard) == body("a.tar")


def test_ahead_brings_again_what_was_evicted(server, cache):
    a, b = put(server.folder, "a.tar"), put(server.folder, "b.tar")
    at = storage(server.url, cache, gib=SIZE / 2**30)
    for shard in (a, b, a):
        at.ahead([shard])
        while not (cache / shard.sha256[:2] / shard.sha256).exists():
            time.sleep(0.01)
            at.ahead([shard])
    at.close()
    assert server.requests == {"/a.tar": 2, "/b.tar": 1}


def test_ahead_is_a_few_at_a_time(server, cache):
    shards = [put(server.folder, f"{letter}.tar") for letter in "abcdefgh"]
    go = threading.Event()

    def after_go(handler, data):
        go.wait()
        handler.begin(len(data))
        handler.wfile.write(data)

    server.faults = {f"/{shard.name}": after_go for shard in shards}
    at = storage(server.url, cache)
    at.ahead(shards)
    while server.requests.total() < THREADS:
        time.sleep(0.01)
    time.sleep(0.5)
    assert server.requests == {f"/{shard.name}": 1 for shard in shards[:THREADS]}
    go.set()
    assert content(at, shards[-1]) == body(shards[-1].name)
    at.close()


def test_ahead_fails_and_open_says_it(server, cache):
    shard = put(server.folder, "a.tar")
    server.faults["/a.tar"] = [status(403)]
    at = storage(server.url, cache)
    at.ahead([shard])
    while not server.requests["/a.tar"] or list(cache.glob("incoming/*")):
        time.sleep(0.01)
    assert content(at, shard) == body("a.tar")
    missing = shard_of("b.tar", body("b.tar"))
    at.ahead([missing])
    with pytest.raises(UserError, match=r"cannot download http://.*/b\.tar \(HTTP 404"):
        at.open(missing)
    at.close()


def test_what_failed_ahead_is_left_to_open(server, cache):
    shard, last = put(server.folder, "a.tar"), put(server.folder, "z.tar")
    server.faults["/a.tar"] = [status(403), status(403)]
    at = storage(server.url, cache)

    def ahead() -> None:
        """What is asked for again is not asked for twice; `last` comes after it, when it is new."""
        (cache / last.sha256[:2] / last.sha256).unlink(missing_ok=True)
        at.ahead([shard, last])
        while not (cache / last.sha256[:2] / last.sha256).exists():
            time.sleep(0.01)
        while not server.requests["/a.tar"] or list(cache.glob("incoming/*")):
            time.sleep(0.01)

    for _ in range(3):
        ahead()
    assert server.requests["/a.tar"] == 1
    with pytest.raises(UserError, match=r"cannot download .*/a\.tar \(HTTP 403"):
        at.open(shard)
    ahead()
    assert server.requests["/a.tar"] == 2
    assert content(at, shard) == body("a.tar")
    (cache / shard.sha256[:2] / shard.sha256).unlink()  # as by another job of the node
    ahead()
    while not (cache / shard.sha256[:2] / shard.sha256).exists():
        time.sleep(0.01)
    at.close()
    assert server.requests["/a.tar"] == 4


def test_close_ends_stalled_downloads(server, cache):
    shards = [put(server.folder, f"{letter}.tar") for letter in "abcdefgh"]
    server.faults = {f"/{shard.name}": stall for shard in shards}
    at = storage(server.url, cache, transport=Transport(timeout=3600.0))
    at.ahead(shards)
    while server.requests.total() < THREADS:
        time.sleep(0.01)
    at.close()
    at.close()
    while list(cache.glob("incoming/*")):  # an hour, would they not end
        time.sleep(0.01)
    assert kept(cache) == set() and server.requests.total() == THREADS
    server.faults.clear()
    assert content(at, shards[0]) == body(shards[0].name)


LEAVE = OPEN.partition("try:")[0].replace("tries=2", "timeout=3600.0") + (
    """
at.ahead([shard])
import time
from pathlib import Path
while not any(path.stat().st_size for path in Path(cache).glob("incoming/.*")):
    time.sleep(0.01)
print("end")
"""
)


def test_a_process_ends_without_close(server, cache):
    shard = put(server.folder, "a.tar")
    server.faults["/a.tar"] = stall
    process = start(LEAVE, server, cache, shard)
    with ended(process):
        assert process.communicate()[0] == b"end\n"
        assert process.returncode == 0


# Sidecars


def sidecar(offsets):
    file = io.BytesIO()
    np.save(file, offsets)
    return file.getvalue()


@pytest.mark.parametrize("kind", ["local", "http"])
def test_offsets(server, cache, kind):
    at = storage(server.folder if kind == "local" else server.url, cache)
    path = server.folder / "unlabeled" / "000012.tar.offsets.npy"
    assert at.offsets("unlabeled", 12, 2) is None
    path.parent.mkdir()
    assert at.offsets("unlabeled", 12, 2) is None
    path.write_bytes(sidecar(np.array([0, 512, 1024])))
    assert at.offsets("unlabeled", 12, 2).tolist() == [0, 512, 1024]
    assert at.offsets("unlabeled", 13, 2) is None
    assert not cache.exists()  # it is not known which shard they are of
    for wrong in (np.array([0, 512]), np.array([0.0, 1.0, 2.0]), np.array([[0, 512, 1024]])):
        path.write_bytes(sidecar(wrong))
        with pytest.raises(UserError, match=rf"{path.name} is not of its shard: delete it"):
            at.offsets("unlabeled", 12, 2)
    for broken in (b"", b"<html>", sidecar(np.array([0, 512, 1024]))[:-1]):
        path.write_bytes(broken)
        with pytest.raises(UserError, match=rf"cannot read .*{path.name}: .*; delete it"):
            at.offsets("unlabeled", 12, 2)


def test_offsets_that_cannot_be_had(server, cache):
    path = "/unlabeled/000000.tar.offsets.npy"
    at = storage(server.url, cache)
    server.faults[path] = status(403)  # S3's answer where listing is not allowed
    assert at.offsets("unlabeled", 0, 2) is None
    server.faults[path] = status(500)
    with pytest.raises(UserError, match=r"cannot download .*offsets\.npy \(HTTP 500 .*, 2 tries"):
        at.offsets("unlabeled", 0, 2)
    assert storage("pipe:cat /no/such", cache).offsets("unlabeled", 0, 2) is None


# Other kinds of location


def test_pipes(tmp_path, cache):
    shard = put(tmp_path, "a.tar")
    at = storage(f"pipe:cat {tmp_path}", cache)
    at.ahead([shard])
    assert content(at, shard) == body("a.tar")
    at.close()
    (tmp_path / "a.tar").unlink()
    assert content(at, shard) == body("a.tar")
    (tmp_path / "b.tar").write_bytes(b"")
    gone = shard_of("c.tar", body("c.tar"))
    with pytest.raises(UserError, match=r"pipe:cat .*/c\.tar \(exit status 1: .*No such file"):
        at.open(gone)


def test_s3(tmp_path, cache):
    served = tmp_path / "served"
    served.mkdir()
    shards = [put(served, f"{letter}.tar") for letter in "abcdef"]
    (served / "unlabeled").mkdir()
    (served / "unlabeled" / "000001.tar.offsets.npy").write_bytes(sidecar(np.arange(3)))
    with s3_server("data") as s3:
        s3.upload(served, "data")
        at = storage("s3://data", cache)
        at.ahead(shards)
        for shard in shards:
            assert content(at, shard) == body(shard.name)
            assert at.unchanged(shard)
        assert at.offsets("unlabeled", 0, 2) is None
        assert at.offsets("unlabeled", 1, 2).tolist() == [0, 1, 2]
        missing = shard_of("g.tar", b"g")
        with pytest.raises(UserError, match=r"s3://data/g\.tar \(HTTP 404 NoSuchKey"):
            at.open(missing)
        with pytest.raises(UserError, match="there is no bucket absent"):
            storage("s3://absent", cache).open(missing)
        at.close()
    assert kept(cache) == {shard.sha256 for shard in shards}


def test_a_slow_server_and_a_small_timeout(server, cache):
    shard = put(server.folder, "a.tar")
    server.faults["/a.tar"] = slow(pieces=8, seconds=0.2)
    at = storage(server.url, cache, transport=Transport(tries=1, timeout=1.0))
    assert content(at, shard) == body("a.tar")


# Others that fail, wait or were suspended


def test_a_failure_of_another_job_is_not_taken_over(server, cache):
    shard = put(server.folder, "a.tar")
    go = threading.Event()

    def fails(handler, data):
        go.wait()
        status(403)(handler, data)

    server.faults["/a.tar"] = [fails]
    with environment(MASTER_ADDR="host", MASTER_PORT="1"):
        first = start(OPEN, server, cache, shard)
    with ended(first), ThreadPoolExecutor(1) as pool:
        while not server.requests["/a.tar"]:
            time.sleep(0.01)
        with environment(MASTER_ADDR="host", MASTER_PORT="2"):
            second = pool.submit(content, storage(server.url, cache), shard)
            wait_for_holders(cache, shard, [os.getpid()])
            go.set()
            assert b"HTTP 403" in first.communicate()[0]
            assert second.result() == body("a.tar")


def test_a_suspended_process_holds_nobody_up(server, cache, monkeypatch, capsys):
    monkeypatch.setattr(remote, "LONGEST_WAIT_SECONDS", 0.5)
    shard = put(server.folder, "a.tar")
    server.faults["/a.tar"] = [stall]
    first = start(OPEN, server, cache, shard)
    with ended(first):
        while not any(path.stat().st_size for path in cache.glob("incoming/.*")):
            time.sleep(0.01)
        first.send_signal(signal.SIGSTOP)
        at = storage(server.url, cache, transport=Transport(timeout=0.5))
        assert content(at, shard) == body("a.tar")
        assert "who brings shard a.tar got nothing for 1 s" in capsys.readouterr().err
        assert len(list(cache.glob("incoming/*"))) == 2  # the first's lock and part


def test_a_damaged_copy_heals_before_it_is_opened(server, cache, capsys):
    shard = put(server.folder, "a.tar")
    content(storage(server.url, cache), shard)
    (cache / shard.sha256[:2] / shard.sha256).write_bytes(body("b.tar"))
    with storage(server.url, cache) as at:
        assert at.unchanged(shard)
        assert content(at, shard) == body("a.tar")
    assert "the copy of shard a.tar in" in capsys.readouterr().err


def test_ahead_survives_any_error(server, cache, monkeypatch, capsys):
    a, b = put(server.folder, "a.tar"), put(server.folder, "b.tar")
    monkeypatch.setattr("sgan_dist.data.storage.THREADS", 1)
    with storage(server.url, cache) as at:
        bring = at._cached

        def once(*arguments):
            monkeypatch.setattr(at, "_cached", bring)
            raise RuntimeError("odd")

        monkeypatch.setattr(at, "_cached", once)
        at.ahead([a, b])
        while not (cache / b.sha256[:2] / b.sha256).exists():
            time.sleep(0.01)
    assert "cannot bring shard a.tar ahead: RuntimeError('odd')" in capsys.readouterr().err


def test_offsets_are_tried_again_and_kept_beside_their_shard(server, cache):
    a, b = put(server.folder, "a.tar"), put(server.folder, "b.tar")
    (server.folder / "unlabeled").mkdir()
    path = "/unlabeled/000000.tar.offsets.npy"
    (server.folder / path[1:]).write_bytes(sidecar(np.arange(3)))
    at = storage(server.url, cache, gib=1.5 * SIZE / 2**30)
    content(at, a)
    server.faults[path] = [lambda handler, data: (handler.begin(9), handler.wfile.write(data[:9]))]
    for _ in range(2):
        assert at.offsets("unlabeled", 0, 2, a).tolist() == [0, 1, 2]
    assert server.requests[path] == 2
    assert kept(cache) == {a.sha256, f"{a.sha256}.offsets"}
    content(at, b)
    assert kept(cache) == {b.sha256}


def test_no_password_in_messages(cache):
    at = storage("http://user:secret@127.0.0.1:9/d?sig=secret", cache)
    for attempt in (lambda: at.offsets("unlabeled", 0, 2), lambda: at._path(Shard("a", 1, 1, "x"))):
        with pytest.raises(UserError) as caught:
            attempt()
        assert "secret" not in str(caught.value)
