"""Servers on 127.0.0.1 with the faults of real ones: http, an S3 API, a GCS API."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

Fault = Callable[["Handler", bytes], None]  # answers a request instead of the server


class FolderServer:
    """Serves a folder; `faults` replace its answers, by path without query.

    A list of faults is used up, one per request, before the file itself is served; a single fault
    answers every request.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.faults: dict[str, Fault | list[Fault]] = {}
        self.requests: Counter[str] = Counter()
        self.seen: list[tuple[str, dict[str, str]]] = []  # path and query, headers
        self.closing = threading.Event()
        self._lock = threading.Lock()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self._http.folder_server = self  # type: ignore[attr-defined]
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()

    def count(self, target: str, headers: dict[str, str]) -> Fault | None:
        """Counts the request, and returns the fault that answers it."""
        path = unquote(urlsplit(target).path)
        with self._lock:
            self.requests[path] += 1
            self.seen.append((target, headers))
            fault = self.faults.get(path)
            if isinstance(fault, list):
                return fault.pop(0) if fault else None
            return fault

    def close(self) -> None:
        self.closing.set()
        self._http.shutdown()
        self._http.server_close()


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.outer: FolderServer = self.server.folder_server  # type: ignore[attr-defined]
        fault = self.outer.count(self.path, dict(self.headers))
        file = self.outer.folder / unquote(urlsplit(self.path).path).lstrip("/")
        body = file.read_bytes() if file.is_file() else None
        with contextlib.suppress(ConnectionError):  # the client went away
            if fault is not None:
                fault(self, body or b"")
            elif body is None:
                self.send_error(404)
            else:
                self.begin(len(body))
                self.wfile.write(body)

    def begin(self, length: int) -> None:
        """Sends the head of a good answer."""
        self.send_response(200)
        self.send_header("Content-Length", str(length))
        self.end_headers()

    def log_message(self, *args: object) -> None:
        pass


def status(code: int, **headers: str) -> Fault:
    """Answers with this status; `Retry_After="1"` gives the header Retry-After."""

    def fault(handler: Handler, body: bytes) -> None:
        handler.send_response(code)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    return fault


def drop(handler: Handler, body: bytes) -> None:
    """Ends the connection half-way through the body."""
    handler.begin(len(body))
    handler.wfile.write(body[: len(body) // 2])


def stall(handler: Handler, body: bytes) -> None:
    """Sends half of the body, then nothing for as long as the server lives."""
    handler.begin(len(body))
    handler.wfile.write(body[: len(body) // 2])
    handler.outer.closing.wait()


def silence(handler: Handler, body: bytes) -> None:
    """Takes the request and never answers."""
    handler.outer.closing.wait()


def slow(pieces: int, seconds: float) -> Fault:
    """Sends the body in this many pieces, and waits so many seconds before each."""

    def fault(handler: Handler, body: bytes) -> None:
        handler.begin(len(body))
        size = -(-len(body) // pieces)
        for at in range(0, len(body), size):
            if handler.outer.closing.wait(seconds):
                return
            handler.wfile.write(body[at : at + size])

    return fault


def cut(handler: Handler, body: bytes) -> None:
    """Serves half of the file as if it were whole."""
    handler.begin(len(body) // 2)
    handler.wfile.write(body[: len(body) // 2])


def garble(handler: Handler, body: bytes) -> None:
    """Serves the right number of bytes, the last one changed."""
    handler.begin(len(body))
    handler.wfile.write(body[:-1] + bytes([body[-1] ^ 1]))


@contextlib.contextmanager
def http_server(folder: Path) -> Iterator[FolderServer]:
    """Runs a FolderServer for this process and its children, without a proxy."""
    server = FolderServer(folder)
    try:
        with environment(no_proxy="127.0.0.1", NO_PROXY="127.0.0.1"):
            yield server
    finally:
        server.close()


@contextlib.contextmanager
def environment(**values: str | None) -> Iterator[None]:
    """Sets environment variables inside the block; None removes one."""
    before = {name: os.environ.get(name) for name in values}
    try:
        _set(values)
        yield
    finally:
        _set(before)


def _set(values: dict[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


@contextlib.contextmanager
def s3_environment(url: str, key: str | None = "key") -> Iterator[None]:
    """Sends s3:// to this endpoint, with dummy credentials, or none."""
    from s3fs import S3FileSystem

    S3FileSystem.clear_instance_cache()  # connected to another endpoint
    with environment(
        no_proxy="127.0.0.1",
        NO_PROXY="127.0.0.1",
        AWS_ENDPOINT_URL=url,
        AWS_ACCESS_KEY_ID=key,
        AWS_SECRET_ACCESS_KEY=key,
        AWS_SESSION_TOKEN=None,
        AWS_PROFILE=None,
        AWS_DEFAULT_REGION="us-east-1",
        AWS_CONFIG_FILE=os.devnull,
        AWS_SHARED_CREDENTIALS_FILE=os.devnull,
        AWS_EC2_METADATA_DISABLED="true",
    ):
        yield
    S3FileSystem.clear_instance_cache()


class BucketServer:
    """An object store's API in a process of its own."""

    def __init__(self, url: str, put_url: str) -> None:
        self.url = url
        self._put_url = put_url

    def put(self, bucket: str, key: str, data: bytes) -> None:
        """Writes an object into an existing bucket."""
        url = self._put_url.format(url=self.url, bucket=bucket, key=quote(key))
        method = "POST" if "upload" in url else "PUT"
        self.send(method, url, data)

    def upload(self, folder: Path, bucket: str) -> None:
        """Writes all files below a folder into an existing bucket."""
        for path in folder.rglob("*"):
            if path.is_file():
                self.put(bucket, path.relative_to(folder).as_posix(), path.read_bytes())

    def send(self, method: str, url: str, data: bytes, kind: str = "application/x-tar") -> None:
        headers = {"Content-Type": kind}
        request = urllib.request.Request(url, data, headers, method=method)
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        direct.open(request, timeout=30).close()


# prints its port, and ends when its standard input does
_MOTO = """
import sys
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
"""
_GCS = """
import sys
from gcp_storage_emulator.server import create_server
server = create_server("127.0.0.1", 0, in_memory=True)
server.start()
print(server._api._httpd.server_address[1], flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def s3_server(*buckets: str) -> Iterator[BucketServer]:
    """Runs moto's S3 server with these buckets, and sends s3:// there."""
    with _server(_MOTO) as url:
        server = BucketServer(url, "{url}/{bucket}/{key}")
        for bucket in buckets:
            server.send("PUT", f"{url}/{bucket}", b"")
        with s3_environment(url):
            yield server


@contextlib.contextmanager
def gs_server(*buckets: str) -> Iterator[BucketServer]:
    """Runs an emulator of Google's storage with these buckets, and sends gs:// there."""
    from gcsfs.core import GCSFileSystem

    with _server(_GCS) as url:
        upload = "{url}/upload/storage/v1/b/{bucket}/o?uploadType=media&name={key}"
        server = BucketServer(url, upload)
        for bucket in buckets:
            name = b'{"name": "%s"}' % bucket.encode()
            server.send("POST", f"{url}/storage/v1/b?project=test", name, "application/json")
        GCSFileSystem.clear_instance_cache()
        with environment(STORAGE_EMULATOR_HOST=url, no_proxy="127.0.0.1", NO_PROXY="127.0.0.1"):
            yield server
        GCSFileSystem.clear_instance_cache()


@contextlib.contextmanager
def _server(code: str) -> Iterator[str]:
    with subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        assert process.stdout is not None and process.stdin is not None
        try:
            yield f"http://127.0.0.1:{int(process.stdout.readline())}"
        finally:
            process.kill()
