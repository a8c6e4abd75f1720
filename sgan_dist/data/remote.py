"""Bringing files from http(s)://, s3://, gs:// and pipe: locations, whole or not at all.

- `http://`, `https://`: proxies and `.netrc` are taken from the environment.
- `s3://BUCKET/KEY`: credentials, region and endpoint as boto3 finds them (`AWS_PROFILE`,
  `AWS_ENDPOINT_URL`, ...); a public bucket without credentials: `FSSPEC_S3='{"anon": true}'`.
- `gs://BUCKET/KEY`: Google's application default credentials; a public bucket without any:
  `FSSPEC_GS='{"token": "anon"}'`; `STORAGE_EMULATOR_HOST` names another endpoint.
- `pipe:COMMAND`: what a command writes, run by /bin/sh as webdataset does.

Not for processes that were forked (fsspec keeps a thread): start them by spawn or forkserver.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import errno
import hashlib
import math
import os
import random
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote, urlsplit

from sgan_dist.data.locations import PREFIXES, shown
from sgan_dist.data.locations import is_remote as is_remote
from sgan_dist.data.locations import join as join
from sgan_dist.errors import Outage, UserError

BACKOFF_SECONDS = 1.0  # at most, before the second attempt; doubled before every further one
LONGEST_WAIT_SECONDS = 60.0
POLL_SECONDS = 0.2  # how soon a fetch that was stopped ends
# what a full or read-only disk says; no network error does
_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}


@dataclass(frozen=True)
class Transport:
    """How patiently a file is brought."""

    tries: int = 6
    """attempts a file before giving up"""
    timeout: float = 30.0
    """seconds without a byte after which an attempt is given up"""

    def __post_init__(self) -> None:
        if self.tries < 1:
            raise UserError(f"data.tries is {self.tries}: give at least 1")
        if not (self.timeout > 0 and math.isfinite(self.timeout)):
            raise UserError(f"data.timeout is {self.timeout:g}: give seconds, more than 0")


class Missing(UserError):
    """There is nothing at the location."""


class Denied(UserError):
    """The server refuses access to the location."""


class Stopped(Exception):
    """A fetch was stopped by whoever asked for it."""


class _Transient(Exception):
    """An attempt failed, and the next may succeed, `wait` seconds later at the earliest."""

    def __init__(self, why: str, wait: float = 0.0) -> None:
        super().__init__(why)
        self.wait = wait


class _TooLong(_Transient):
    """More bytes came than were indexed."""


class _Attempt(NamedTuple):
    """Into which file, how, and at most how many bytes."""

    path: Path
    timeout: float
    stop: threading.Event
    most: int | None

    def check(self, size: int) -> None:
        """Raises Stopped where it is, _TooLong where so many bytes are too many."""
        if self.stop.is_set():
            raise Stopped
        if self.most is not None and size > self.most:
            raise _TooLong(f"more than {self.most} bytes")


def fetch(
    location: str,
    target: Path,
    transport: Transport,
    size: int | None = None,
    sha256: str | None = None,
    stop: threading.Event | None = None,
) -> None:
    """Bring the file at a remote location to `target`, whole or not at all.

    Failing transport, and bytes that are not of `size` and `sha256`, are tried again. Raises
    Missing, Denied or another UserError that names the location; Stopped once `stop` is set.
    """
    if not is_remote(location):
        raise UserError(f"{location} is no remote location: use one of {' '.join(PREFIXES)}")
    stop = stop or threading.Event()
    for attempt in range(1, transport.tries + 1):
        temporary = target.with_name(f".{target.name}.{os.urandom(8).hex()}")
        wait = 0.0
        try:
            temporary.touch()
            _bring(location, _Attempt(temporary, transport.timeout, stop, size))
            differs = _difference(temporary, size, sha256)
            if differs is None:
                temporary.replace(target)
                return
            why = differs
        except _Transient as error:
            why, wait = str(error), error.wait
            differs = why if isinstance(error, _TooLong) else None
        except OSError as error:
            raise UserError(
                f"cannot write {target.parent} ({error.strerror}): make room there, or choose "
                "another folder"
            ) from None
        finally:
            temporary.unlink(missing_ok=True)
        if attempt < transport.tries:
            pause(location, why, attempt, transport, stop, wait)
    if differs is not None:
        raise UserError(
            f"the shard's bytes no longer match the index: {shown(location)} has {why} "
            f"({transport.tries} tries): put back the file that was indexed, or index it again"
        )
    raise Outage(
        f"cannot download {shown(location)} ({why}, {transport.tries} tries): check the network "
        "and what serves it"
    )


def pause(
    location: str,
    why: str,
    attempt: int,
    transport: Transport,
    stop: threading.Event,
    least: float = 0.0,
) -> None:
    """Wait after a failed attempt, the first being 1, and say so. Raises Stopped."""
    # full jitter: the ranks of a job must not all come back at the same moment
    wait = max(least, random.uniform(0, BACKOFF_SECONDS * 2 ** (attempt - 1)))
    wait = min(wait, LONGEST_WAIT_SECONDS)
    which = f"{attempt + 1} of {transport.tries}"
    print(f"retrying {shown(location)} in {wait:.0f} s: {why} ({which})", file=sys.stderr)
    if stop.wait(wait):
        raise Stopped


def read(location: str, transport: Transport) -> bytes | None:
    """The bytes of a small remote file; None where there is none.

    Of a `pipe:` command that fails nobody can tell why, so that is an error. Raises as `fetch`.
    """
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "file"
        try:
            fetch(location, target, transport)
        except Missing:
            return None
        return target.read_bytes()


def _difference(path: Path, size: int | None, sha256: str | None) -> str | None:
    """How the file differs from what was indexed, or None."""
    found = path.stat().st_size
    if size is not None and found != size:
        return f"{found} bytes, the index says {size}"
    if sha256 is not None:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != sha256:
            return f"sha256 {digest[:12]}, the index says {sha256[:12]}"
    return None


def _bring(location: str, to: _Attempt) -> None:
    """One attempt. Raises _Transient, UserError, Stopped, or the OSError of a disk."""
    if location.startswith("pipe:"):
        _bring_pipe(location, to)
    elif location.startswith("s3:"):
        _bring_s3(location, to)
    elif location.startswith("gs:"):
        _bring_gs(location, to)
    else:
        # encoded as it is, but for what no URL may hold: a signed URL must not be changed
        url = quote(location, safe="!#$%&'()*+,/:;=?@[]~")
        _bring_http(location, url, {}, to)


def _refusal(location: str, status: int, why: str, wait: float = 0.0) -> Exception:
    """What to raise for an HTTP status."""
    if status >= 500 or status in (408, 429):
        return _Transient(why, wait)
    if status in (404, 410):
        return Missing(f"cannot download {shown(location)} ({why}): check the location")
    if status in (401, 403):
        public = {
            "s3": """, or set FSSPEC_S3='{"anon": true}' if the bucket is public""",
            "gs": """, or set FSSPEC_GS='{"token": "anon"}' if the bucket is public""",
        }.get(location[:2], "")
        return Denied(f"cannot download {shown(location)} ({why}): check your credentials{public}")
    return UserError(f"cannot download {shown(location)} ({why}): check the location")


def _run(
    loop: asyncio.AbstractEventLoop, download: Coroutine[Any, Any, None], to: _Attempt
) -> None:
    """Wait for a download in fsspec's loop; it ends with us, however we end."""
    future = asyncio.run_coroutine_threadsafe(download, loop)
    try:
        while not concurrent.futures.wait([future], POLL_SECONDS).done:
            with contextlib.suppress(FileNotFoundError):
                to.check(to.path.stat().st_size)
        future.result()
    finally:
        future.cancel()


def _bring_http(location: str, url: str, headers: dict[str, str], to: _Attempt) -> None:
    import aiohttp
    from fsspec.implementations.http import HTTPFileSystem

    # packed files are to be kept as they are, though a server may call that an encoding
    session = {"auto_decompress": False, "trust_env": True}
    http = HTTPFileSystem(encoded=True, client_kwargs=session)
    download = http._get_file(
        url,
        str(to.path),
        headers={"Accept-Encoding": "identity", **headers},
        # no `total`, which would be the time for the whole of a shard
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=to.timeout, sock_read=to.timeout),
    )
    try:
        _run(http.loop, download, to)
    except FileNotFoundError:
        raise _refusal(location, 404, "HTTP 404 Not Found") from None
    except aiohttp.ClientResponseError as error:
        after = error.headers.get("Retry-After", "") if error.headers else ""
        why = f"HTTP {error.status} {error.message}"
        wait = float(after) if after.isdecimal() else 0.0
        raise _refusal(location, error.status, why, wait) from None
    except ValueError:  # aiohttp's InvalidURL, and yarl's own
        raise UserError(f"cannot download {shown(location)}: it is not a valid URL") from None
    except TimeoutError:
        raise _Transient(f"no byte for {to.timeout:g} seconds") from None
    except (aiohttp.ClientError, OSError) as error:
        if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
            raise
        if isinstance(error, aiohttp.ClientConnectorError) and (error.errno or -1) > 0:
            raise _Transient(os.strerror(error.errno or 0)) from None
        raise _Transient(_words(error)) from None


def _bring_s3(location: str, to: _Attempt) -> None:
    try:
        import fsspec.config
        from aiohttp import ClientError
        from botocore.exceptions import (
            BotoCoreError,
            HTTPClientError,
            IncompleteReadError,
            NoCredentialsError,
        )
        from botocore.exceptions import ConnectionError as ConnectingError
        from botocore.parsers import ResponseParserError
        from s3fs import S3FileSystem
    except ImportError:
        raise UserError(f"reading {location} takes s3fs: pip install 'sgan_dist[s3]'") from None
    s3 = S3FileSystem(
        config_kwargs={
            **fsspec.config.conf.get("s3", {}).get("config_kwargs", {}),
            "connect_timeout": to.timeout,
            "read_timeout": to.timeout,
            "retries": {"total_max_attempts": 1},
        }
    )
    s3.retries = 1  # attempts: ours are counted in `fetch`
    try:
        _run(s3.loop, s3._get_file(location, str(to.path), max_concurrency=1), to)
    except (
        TimeoutError,
        ConnectingError,
        HTTPClientError,
        IncompleteReadError,
        ResponseParserError,
        ClientError,
    ) as error:
        raise _Transient(_words(error)) from None
    except OSError as error:
        response = getattr(error.__cause__, "response", None)
        if response is None:
            if error.errno in _DISK_ERRORS:
                raise
            raise _Transient(_words(error)) from None
        code = response.get("Error", {}).get("Code", "")
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 500)
        why = f"HTTP {status} {code}"
        if code == "NoSuchBucket":
            bucket = urlsplit(location).netloc
            raise UserError(f"cannot download {location}: there is no bucket {bucket}") from None
        denied = isinstance(error, PermissionError)  # some of which have status 400
        raise _refusal(location, 403 if denied else status, why) from None
    except NoCredentialsError as error:
        raise _refusal(location, 401, _words(error)) from None
    except BotoCoreError as error:  # no such profile, an impossible bucket
        raise UserError(
            f"cannot download {location} ({_words(error)}): check the location and your AWS "
            "configuration"
        ) from None


def _bring_gs(location: str, to: _Attempt) -> None:
    try:
        from gcsfs.core import GCSFileSystem
        from google.auth.exceptions import GoogleAuthError, TransportError
    except ImportError:
        raise UserError(f"reading {location} takes gcsfs: pip install 'sgan_dist[gs]'") from None
    # gcsfs knows the address and the credentials; its own download tries six times by itself
    headers: dict[str, str] = {}
    try:
        gs = GCSFileSystem()
        gs.credentials.apply(headers)
    except (TransportError, OSError) as error:  # whose words may hold the token
        raise _Transient(f"no answer about credentials, {type(error).__name__}") from None
    except GoogleAuthError as error:
        raise _refusal(location, 401, _words(error)) from None
    _bring_http(location, gs.url(location), headers, to)


def _bring_pipe(location: str, to: _Attempt) -> None:
    with to.path.open("wb") as out, tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            location.removeprefix("pipe:"),
            shell=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=said,
            start_new_session=True,  # a group of its own, to be killed as a whole
        )
        assert process.stdout is not None
        try:
            last, size = time.monotonic(), 0
            while True:
                to.check(size)
                if select.select([process.stdout], [], [], min(POLL_SECONDS, to.timeout))[0]:
                    data = os.read(process.stdout.fileno(), 2**20)
                    if not data:
                        break
                    out.write(data)
                    last, size = time.monotonic(), size + len(data)
                elif time.monotonic() - last > to.timeout:
                    raise _Transient(f"no byte for {to.timeout:g} seconds")
            status = process.wait(to.timeout)
        except BaseException as error:
            # not yet waited for, so its group still is its own
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if isinstance(error, subprocess.TimeoutExpired):
                raise _Transient(f"no end {to.timeout:g} seconds after its last byte") from None
            raise
        finally:
            process.stdout.close()
        if status:
            said.seek(0)
            lines = said.read().decode(errors="replace").split("\n")
            last_line = next((line.strip() for line in reversed(lines) if line.strip()), "")
            raise _Transient(f"exit status {status}{': ' * bool(last_line)}{last_line[:200]}")


def _words(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
