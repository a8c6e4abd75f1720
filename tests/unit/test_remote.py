"""Fetching over http, S3, GCS and pipes, from servers that fail in every way."""

import gzip
import hashlib
import multiprocessing
import os
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import quote

import fsspec.config
import numpy as np
import pytest
from google.oauth2.credentials import Credentials

from sgan_dist.data import remote
from sgan_dist.data.remote import (
    Denied,
    Missing,
    Stopped,
    Transport,
    fetch,
    is_remote,
    join,
    read,
)
from sgan_dist.errors import UserError
from tests.servers import (
    cut,
    drop,
    environment,
    garble,
    gs_server,
    http_server,
    s3_environment,
    s3_server,
    silence,
    slow,
    stall,
    status,
)

BODY = np.random.default_rng(0).integers(0, 256, 300_000, np.uint8).tobytes()
SHA256 = hashlib.sha256(BODY).hexdigest()
PATIENT = Transport(tries=3, timeout=30.0)
HASTY = Transport(tries=3, timeout=0.5)  # for servers that stall

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(autouse=True)
def _no_backoff(monkeypatch):
    monkeypatch.setattr(remote, "BACKOFF_SECONDS", 0.0)


@pytest.fixture
def server(tmp_path):
    """Serves BODY as /data/a.tar, which is also key a.tar of bucket `data`, for S3 and GCS."""
    folder = tmp_path / "served"
    for path in ("data", "download/storage/v1/b/data/o"):
        (folder / path).mkdir(parents=True)
        (folder / path / "a.tar").write_bytes(BODY)
    with http_server(folder) as server:
        yield server


@pytest.fixture(params=["http", "s3", "gs"])
def place(request, server):
    """(server, location, path): the same faulty server under three kinds of location."""
    if request.param == "http":
        yield server, f"{server.url}/data/a.tar", "/data/a.tar"
    elif request.param == "s3":
        with s3_environment(server.url):
            yield server, "s3://data/a.tar", "/data/a.tar"
    else:
        with environment(STORAGE_EMULATOR_HOST=server.url):
            yield server, "gs://data/a.tar", "/download/storage/v1/b/data/o/a.tar"
        from gcsfs.core import GCSFileSystem

        GCSFileSystem.clear_instance_cache()


@pytest.fixture
def target(tmp_path):
    (tmp_path / "got").mkdir()
    return tmp_path / "got" / "a.tar"


def nothing_left(target):
    return list(target.parent.iterdir()) == []


@pytest.mark.parametrize(
    ("location", "answer"),
    [
        ("http://host/a", True),
        ("https://host/a", True),
        ("s3://bucket/a", True),
        ("gs://bucket/a", True),
        ("pipe:cat a", True),
        ("data/digits", False),
        ("/data/digits", False),
        ("./a:b", False),
        ("http:/a", False),
    ],
)
def test_is_remote(location, answer):
    assert is_remote(location) is answer


@pytest.mark.parametrize("location", ["ftp://host/a", "file:///a", "hdfs://a", "HTTP://host/a"])
def test_other_schemes_are_refused(location):
    with pytest.raises(UserError, match=f"(?i)cannot read {location}: give the path .*http://"):
        is_remote(location)


@pytest.mark.parametrize(
    ("root", "name", "joined"),
    [
        ("data", "unlabeled/0.tar", "data/unlabeled/0.tar"),
        ("data", "/other/0.tar", "/other/0.tar"),
        ("data", "s3://b/0.tar", "s3://b/0.tar"),
        ("http://h/d", "pipe:cat x", "pipe:cat x"),
        ("http://h/d", "/other/0.tar", "/other/0.tar"),
        ("http://h/d/", "a/0.tar", "http://h/d/a/0.tar"),
        ("http://h", "0.tar", "http://h/0.tar"),
        ("https://h/d?sig=a%2Fb%3D", "a/0.tar", "https://h/d/a/0.tar?sig=a%2Fb%3D"),
        ("http://h/d", "a b#1?.tar", "http://h/d/a%20b%231%3F.tar"),
        ("s3://b/d/", "a b.tar", "s3://b/d/a b.tar"),
        ("gs://b", "0.tar", "gs://b/0.tar"),
        ("pipe:ssh host cat /d", "a/0.tar", "pipe:ssh host cat /d/a/0.tar"),
        ("pipe:cat /d/", "a b;c.tar", "pipe:cat /d/'a b;c.tar'"),
    ],
)
def test_join(root, name, joined):
    assert join(root, name) == joined


def test_a_local_file_is_not_fetched(target):
    with pytest.raises(UserError, match=r"data/a\.tar is no remote location"):
        fetch("data/a.tar", target, PATIENT)


def test_a_file_comes_whole(place, target):
    server, location, path = place
    target.write_bytes(b"an older one")
    fetch(location, target, PATIENT, len(BODY), SHA256)
    assert target.read_bytes() == BODY
    assert server.requests == {path: 1}
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize(
    "fault",
    [status(500), status(503), status(429), status(408), drop, cut, garble, stall, silence],
    ids=["500", "503", "429", "408", "drop", "cut", "garble", "stall", "silence"],
)
def test_a_fault_that_passes(place, target, fault):
    server, location, path = place
    server.faults[path] = [fault, fault]
    fetch(location, target, HASTY, len(BODY), SHA256)
    assert target.read_bytes() == BODY
    assert server.requests == {path: 3}
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (status(500), r"cannot download LOCATION \(HTTP 500 .*, 3 tries\)"),
        (status(503), r"cannot download LOCATION \(HTTP 503 .*, 3 tries\)"),
        (drop, r"cannot download LOCATION \(.*, 3 tries\)"),
        (stall, r"cannot download LOCATION \(.*, 3 tries\)"),
        (silence, r"cannot download LOCATION \(.*, 3 tries\)"),
        (
            cut,
            r"bytes no longer match the index: LOCATION has 150000 bytes, the index says 300000 "
            r"\(3 tries\)",
        ),
        (
            garble,
            "bytes no longer match the index: LOCATION has sha256 [0-9a-f]{12}, the index says "
            rf"{SHA256[:12]} \(3 tries\)",
        ),
    ],
    ids=["500", "503", "drop", "stall", "silence", "cut", "garble"],
)
def test_a_fault_that_stays(place, target, fault, message):
    server, location, path = place
    server.faults[path] = fault
    with pytest.raises(UserError, match=message.replace("LOCATION", location)) as caught:
        fetch(location, target, HASTY, len(BODY), SHA256)
    assert server.requests == {path: 3}  # no library tries by itself
    assert nothing_left(target)
    assert not isinstance(caught.value, Missing | Denied)


def test_no_library_waits_longer(place, target):
    server, location, path = place
    server.faults[path] = stall
    # at any library's own timeout, of 15 seconds or more, this test would not end in time
    with pytest.raises(UserError, match=r", 9 tries\)"):
        fetch(location, target, Transport(tries=9, timeout=0.25))
    assert server.requests == {path: 9}


@pytest.mark.parametrize(
    ("code", "kind"),
    [(404, Missing), (403, Denied), (401, Denied), (400, UserError)],
    ids=["404", "403", "401", "400"],
)
def test_what_no_second_attempt_mends(place, target, code, kind):
    server, location, path = place
    server.faults[path] = status(code)
    with pytest.raises(UserError, match=rf"cannot download {location} \(HTTP {code}\b") as caught:
        fetch(location, target, PATIENT, len(BODY), SHA256)
    assert type(caught.value) is kind
    assert server.requests == {path: 1}
    assert nothing_left(target)


def test_a_slow_server_is_no_stalled_one(place, target):
    server, location, path = place
    server.faults[path] = slow(pieces=10, seconds=0.2)  # two seconds in all
    fetch(location, target, Transport(tries=1, timeout=1.0), len(BODY), SHA256)
    assert target.read_bytes() == BODY
    assert server.requests == {path: 1}


def test_read(place):
    server, location, path = place
    server.faults[path] = [drop]
    assert read(location, PATIENT) == BODY
    server.faults[path] = status(404)
    assert read(location, PATIENT) is None
    server.faults[path] = status(403)
    with pytest.raises(Denied):
        read(location, PATIENT)
    server.faults[path] = status(500)
    with pytest.raises(UserError, match="3 tries"):
        read(location, PATIENT)


def test_stopping_a_stalled_download(place, target):
    server, location, path = place
    server.faults[path] = stall
    stop = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        patient = Transport(tries=6, timeout=3600.0)
        fetching = pool.submit(fetch, location, target, patient, stop=stop)
        while not server.requests[path]:
            time.sleep(0.01)
        stop.set()
        with pytest.raises(Stopped):
            fetching.result()
    assert nothing_left(target)


def test_stopping_a_wait_between_attempts(server, target, monkeypatch):
    monkeypatch.setattr(remote, "BACKOFF_SECONDS", 3600.0)
    monkeypatch.setattr(remote, "LONGEST_WAIT_SECONDS", 3600.0)
    server.faults["/data/a.tar"] = status(503, Retry_After="3600")
    stop = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        fetching = pool.submit(fetch, f"{server.url}/data/a.tar", target, PATIENT, stop=stop)
        while not server.requests["/data/a.tar"]:
            time.sleep(0.01)
        stop.set()
        with pytest.raises(Stopped):
            fetching.result()
    assert server.requests["/data/a.tar"] == 1


def test_retry_after_is_waited_for(server, target):
    server.faults["/data/a.tar"] = [status(429, Retry_After="1")]
    begin = time.monotonic()
    fetch(f"{server.url}/data/a.tar", target, PATIENT)
    assert time.monotonic() - begin >= 1


def test_packed_files_stay_packed(server, target):
    packed = gzip.compress(BODY)

    def as_encoding(handler, body):
        handler.send_response(200)
        handler.send_header("Content-Encoding", "gzip")
        handler.send_header("Content-Length", str(len(packed)))
        handler.end_headers()
        handler.wfile.write(packed)

    server.faults["/data/a.tar"] = as_encoding
    fetch(f"{server.url}/data/a.tar", target, PATIENT)
    assert target.read_bytes() == packed
    assert server.seen[0][1]["Accept-Encoding"] == "identity"


def test_addresses_are_sent_as_they_are_but_not_shown(server, target):
    query = "X-Credential=A%2Fb%20c&sig=x%2By%3D"
    fetch(f"{server.url}/data/a.tar?{query}", target, PATIENT)
    assert server.seen[-1][0] == f"/data/a.tar?{query}"
    (server.folder / "data" / "ä b.tar").write_bytes(BODY)
    fetch(f"{server.url}/data/ä b.tar", target, PATIENT)
    assert server.seen[-1][0] == f"/data/{quote('ä b.tar')}"
    secret = server.url.replace("http://", "http://user:password@")
    with pytest.raises(Missing) as caught:
        fetch(f"{secret}/absent.tar?{query}", target, PATIENT)
    assert f"cannot download {server.url}/absent.tar (" in str(caught.value)
    assert "Basic" in server.seen[-1][1]["Authorization"]


@pytest.mark.parametrize("location", ["http://", "http://host:port/a", "http://[::1/a"])
def test_invalid_addresses(target, location):
    with pytest.raises(UserError, match=r"cannot download http://.*"):
        fetch(location, target, PATIENT)
    assert nothing_left(target)


@pytest.mark.parametrize("kind", ["http", "s3", "gs"])
def test_nobody_listens(target, kind):
    with socket.socket() as bound:  # bound but not listening: refuses
        bound.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{bound.getsockname()[1]}"
        location = f"{url}/a.tar" if kind == "http" else f"{kind}://data/a.tar"
        with (
            s3_environment(url),
            environment(STORAGE_EMULATOR_HOST=url),
            pytest.raises(UserError, match=rf"cannot download {location} \(.*, 3 tries\)"),
        ):
            fetch(location, target, PATIENT)
    assert nothing_left(target)


def test_many_at_once(place, target):
    _, location, _ = place
    targets = [target.with_name(f"{number}.tar") for number in range(24)]
    with ThreadPoolExecutor(8) as pool:
        for done in [
            pool.submit(fetch, location, each, PATIENT, sha256=SHA256) for each in targets
        ]:
            done.result()
    assert sorted(target.parent.iterdir()) == sorted(targets)


def test_a_folder_that_cannot_be_written(server, tmp_path):
    with pytest.raises(UserError, match=rf"cannot write {tmp_path}/absent \(No such file"):
        fetch(f"{server.url}/data/a.tar", tmp_path / "absent" / "a.tar", PATIENT)
    assert not server.requests


FULL_DISK = """
import resource, sys
from pathlib import Path
from sgan_dist.data.remote import Transport, fetch
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
try:
    fetch(sys.argv[1], Path(sys.argv[2]), Transport())
except Exception as error:
    print(type(error).__name__, error)
"""


@pytest.mark.parametrize("piped", [False, True], ids=["download", "pipe"])
def test_a_full_disk_is_not_the_networks_fault(place, target, piped):
    server, location, path = place
    if piped:
        location = f"pipe:cat {server.folder}/data/a.tar"
    said = run_code(FULL_DISK, location, target)
    assert said.startswith(f"UserError cannot write {target.parent} (File too large): make room")
    assert server.requests[path] == (0 if piped else 1)
    assert nothing_left(target)


def run_code(code, *arguments):
    """What a process of its own prints."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


STALLED_AT_EXIT = """
import sys, threading
from pathlib import Path
from sgan_dist.data.remote import Transport, fetch
patient = Transport(timeout=3600.0)
fetch(sys.argv[1] + "?first", Path(sys.argv[2]), patient)
location = sys.argv[1] if sys.argv[3] == "network" else "pipe:sleep 3600"
arguments = (location, Path(sys.argv[2] + "x"), patient)
threading.Thread(target=fetch, args=arguments, daemon=True).start()
while sys.argv[3] == "network" and not Path(sys.argv[4]).exists():
    threading.Event().wait(0.01)
print("end")
"""


def test_a_stalled_download_does_not_keep_a_process(place, target, tmp_path):
    server, location, path = place
    begun = tmp_path / "begun"

    def stalls(handler, body):
        begun.touch()
        stall(handler, body)

    def fine(handler, body):
        handler.begin(len(body))
        handler.wfile.write(body)

    server.faults[path] = [fine, stalls]
    # a query has no meaning but for http
    code = (
        STALLED_AT_EXIT
        if location.startswith("http")
        else STALLED_AT_EXIT.replace('+ "?first"', "")
    )
    assert run_code(code, location, target, "network", begun) == "end\n"


def _fetch_in_child(location, target):
    fetch(location, target, PATIENT, sha256=SHA256)


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_processes_that_others_start(place, target, method):
    _, location, _ = place
    fetch(location, target, PATIENT)  # this process has a thread and instances of its own
    context = multiprocessing.get_context(method)
    if method == "forkserver":
        context = multiprocessing.get_context("spawn")  # of which the fork server is a child
        code = (
            "import multiprocessing, sys; from pathlib import Path\n"
            "from tests.unit.test_remote import _fetch_in_child\n"
            "if __name__ == '__main__':\n"
            "    context = multiprocessing.get_context('forkserver')\n"
            "    context.set_forkserver_preload(['fsspec.implementations.http'])\n"
            "    child = context.Process(target=_fetch_in_child,"
            " args=(sys.argv[1], Path(sys.argv[2])))\n"
            "    child.start(); child.join(); sys.exit(child.exitcode)\n"
        )
        run_code(code, location, target.with_name("child.tar"))
    else:
        child = context.Process(
            target=_fetch_in_child, args=(location, target.with_name("child.tar"))
        )
        child.start()
        child.join()
        assert child.exitcode == 0
    assert target.with_name("child.tar").read_bytes() == BODY


# S3 and GCS


@pytest.fixture(scope="module")
def s3():
    with s3_server("data") as server:
        server.put("data", "a b/0.tar", BODY)
        yield server


def test_s3(s3, target):
    fetch("s3://data/a b/0.tar", target, PATIENT, len(BODY), SHA256)
    assert target.read_bytes() == BODY
    assert read("s3://data/a b/0.tar", PATIENT) == BODY


def test_s3_absent(s3, target):
    with pytest.raises(Missing, match=r"cannot download s3://data/b.tar \(HTTP 404 NoSuchKey\)"):
        fetch("s3://data/b.tar", target, PATIENT)
    assert read("s3://data/b.tar", PATIENT) is None
    for attempt in (read, lambda location, how: fetch(location, target, how)):
        with pytest.raises(UserError, match=r"s3://absent/a\.tar: there is no bucket absent$"):
            attempt("s3://absent/a.tar", PATIENT)
    assert nothing_left(target)


def test_s3_credentials(server, target, monkeypatch):
    with s3_environment(server.url, key=None):
        with pytest.raises(Denied, match=r"s3://data/a.tar \(Unable to locate credentials\).*anon"):
            fetch("s3://data/a.tar", target, PATIENT)
        assert not server.requests
        monkeypatch.setitem(fsspec.config.conf, "s3", {"anon": True})  # as FSSPEC_S3 does
        fetch("s3://data/a.tar", target, PATIENT, sha256=SHA256)
    assert "Authorization" not in server.seen[-1][1]
    monkeypatch.setitem(fsspec.config.conf, "s3", {})
    with s3_environment(server.url, key="me"):
        fetch("s3://data/a.tar", target, PATIENT, sha256=SHA256)
    assert "Credential=me/" in server.seen[-1][1]["Authorization"]


def test_s3_an_impossible_bucket(s3, target):
    with pytest.raises(UserError, match=r"Invalid bucket name.*: check the location") as caught:
        fetch("s3://Bad_Bucket!!/a.tar", target, PATIENT)
    assert not isinstance(caught.value, Missing | Denied)


def test_gs_credentials(server, target, monkeypatch):
    with environment(STORAGE_EMULATOR_HOST=server.url):
        monkeypatch.setitem(fsspec.config.conf, "gs", {"token": Credentials("secret")})
        fetch("gs://data/a.tar", target, PATIENT, sha256=SHA256)
        assert server.seen[-1][1]["authorization"] == "Bearer secret"
        monkeypatch.setitem(fsspec.config.conf, "gs", {"token": "anon"})  # as FSSPEC_GS does
        fetch("gs://data/a.tar", target, PATIENT, sha256=SHA256)
        assert "authorization" not in server.seen[-1][1]


def test_s3_other_endpoint_variable(server, target):
    with s3_environment("http://127.0.0.1:9"), environment(AWS_ENDPOINT_URL_S3=server.url):
        fetch("s3://data/a.tar", target, PATIENT, sha256=SHA256)
    assert server.requests == {"/data/a.tar": 1}


def test_s3_a_big_object_is_one_request(server, target):
    with open(server.folder / "data" / "big.tar", "wb") as file:
        file.truncate(2**26)  # more than s3fs takes in one piece
    with s3_environment(server.url):
        fetch("s3://data/big.tar", target, PATIENT, size=2**26)
    assert server.requests == {"/data/big.tar": 1}


def test_gs(target):
    with gs_server("data") as server:
        server.put("data", "a b/0.tar", BODY)
        fetch("gs://data/a b/0.tar", target, PATIENT, len(BODY), SHA256)
        assert target.read_bytes() == BODY
        assert read("gs://data/b.tar", PATIENT) is None
        assert read("gs://absent/b.tar", PATIENT) is None


@pytest.mark.parametrize(("kind", "package"), [("s3", "s3fs"), ("gs", "gcsfs")])
def test_without_the_extra(target, monkeypatch, kind, package):
    for name in list(sys.modules):
        if name.split(".")[0] == package:
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    location = f"{kind}://data/a.tar"
    message = rf"reading {location} takes {package}: pip install 'sgan_dist\[{kind}\]'"
    with pytest.raises(UserError, match=message):
        fetch(location, target, PATIENT)


# Pipes


def test_pipe(tmp_path, target):
    (tmp_path / "a b.tar").write_bytes(BODY)
    # more on standard error than a pipe holds
    noise = "head -c 300000 /dev/zero >&2"
    location = join(f"pipe:{noise}; cat {tmp_path}", "a b.tar")
    fetch(location, target, PATIENT, len(BODY), SHA256)
    assert target.read_bytes() == BODY
    assert read(location, PATIENT) == BODY


def test_a_pipe_that_fails(tmp_path, target):
    (tmp_path / "a.tar").write_bytes(BODY)
    count = f"echo x >> {tmp_path}/count"
    fails = f"pipe:{count}; cat {tmp_path}/a.tar; echo first >&2; echo ' no luck ' >&2; exit 3"
    with pytest.raises(UserError, match=r"\(exit status 3: no luck, 3 tries\)"):
        fetch(fails, target, PATIENT, len(BODY), SHA256)  # though all bytes came
    assert (tmp_path / "count").read_text() == "x\n" * 3
    assert nothing_left(target)
    once = f"pipe:{count}; test $(wc -l < {tmp_path}/count) -gt 4 && cat {tmp_path}/a.tar"
    fetch(once, target, PATIENT, len(BODY), SHA256)
    assert (tmp_path / "count").read_text() == "x\n" * 5
    assert target.read_bytes() == BODY
    with pytest.raises(UserError, match="has 150000 bytes, the index says 300000"):
        fetch(f"pipe:head -c 150000 {tmp_path}/a.tar", target, PATIENT, len(BODY))


@pytest.mark.parametrize("leader", ["wait", "exec >&-; wait", "exit"], ids=str.split)
def test_a_pipe_that_stalls(tmp_path, target, leader):
    # a child of the shell holds the pipe; or the shell closed it and lives on; or it is gone
    holds = "" if leader != "exec >&-; wait" else " >/dev/null"
    stalled = f"pipe:echo some; sleep 3600{holds} & echo $! >> {tmp_path}/pids; {leader}"
    with pytest.raises(UserError, match=r"\(no (byte for|end) 0.5 seconds.*, 3 tries\)"):
        fetch(stalled, target, HASTY)
    pids = [int(line) for line in (tmp_path / "pids").read_text().split()]
    assert len(pids) == 3
    for pid in pids:
        while running(pid):  # the whole group was killed
            time.sleep(0.01)
    assert nothing_left(target)


def running(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_stopping_a_pipe(tmp_path, target):
    stop = threading.Event()
    location = f"pipe:echo $$ > {tmp_path}/made; mv {tmp_path}/made {tmp_path}/pid; sleep 3600"
    with ThreadPoolExecutor(1) as pool:
        patient = Transport(timeout=3600.0)
        fetching = pool.submit(fetch, location, target, patient, stop=stop)
        while not (tmp_path / "pid").exists():
            time.sleep(0.01)
        stop.set()
        with pytest.raises(Stopped):
            fetching.result()
    assert not running(int((tmp_path / "pid").read_text()))
    assert nothing_left(target)


def test_a_slow_pipe_is_no_stalled_one(target):
    slowly = "pipe:for i in 1 2 3 4 5 6 7 8; do printf x; sleep 0.2; done"
    fetch(slowly, target, Transport(tries=1, timeout=1.0), size=8)
    assert target.read_bytes() == b"x" * 8


def test_environment_is_put_back():
    before = dict(os.environ)
    with s3_environment("http://127.0.0.1:9"), environment(STORAGE_EMULATOR_HOST="x"):
        assert os.environ["AWS_ENDPOINT_URL"] == "http://127.0.0.1:9"
    assert dict(os.environ) == before


@pytest.mark.parametrize(
    "wrong", [{"tries": 0}, {"timeout": 0.0}, {"timeout": float("inf")}, {"timeout": float("nan")}]
)
def test_impossible_patience(wrong):
    with pytest.raises(UserError, match=rf"data\.{next(iter(wrong))} is "):
        Transport(**wrong)


def test_retries_are_said(server, target, capsys):
    server.faults["/data/a.tar"] = [status(500)]
    fetch(f"{server.url}/data/a.tar?sig=secret", target, PATIENT)
    said = capsys.readouterr().err
    assert said.startswith(f"retrying {server.url}/data/a.tar in 0 s: HTTP 500")
    assert said.endswith("(2 of 3)\n") and said.count("\n") == 1


def endless(handler, body):
    handler.send_response(200)
    handler.end_headers()
    while not handler.outer.closing.wait(0.001):
        handler.wfile.write(body)


@pytest.mark.parametrize("piped", [False, True], ids=["download", "pipe"])
def test_more_bytes_than_there_should_be(place, target, piped):
    server, location, path = place
    server.faults[path] = endless
    location = "pipe:cat /dev/zero" if piped else location
    with pytest.raises(UserError, match=r"has more than 300000 bytes \(3 tries\)"):
        fetch(location, target, PATIENT, len(BODY), SHA256)
    assert nothing_left(target)


def test_stopping_a_pipe_that_flows(target):
    stop = threading.Event()
    threading.Timer(0.3, stop.set).start()
    with pytest.raises(Stopped):
        fetch("pipe:while :; do echo x; done", target, PATIENT, stop=stop)
