"""Downloads from http(s)://, s3://, gs:// and pipe: locations: a whole file, or nothing.

- `http://`, `https://`: proxies and `.netrc` are taken from the environment.
- `s3://BUCKET/KEY`: credentials, region and endpoint as boto3 finds them (`AWS_PROFILE`,
  `AWS_ENDPOINT_URL`, ...); a public bucket without credentials: `FSSPEC_S3='{"anon": true}'`.
- `gs://BUCKET/KEY`: Google's application default credentials; a public bucket without any:
  `FSSPEC_GS='{"token": "anon"}'`; `STORAGE_EMULATOR_HOST` names another endpoint.
- `pipe:COMMAND`: the output of a command, run by /bin/sh as webdataset does.

Not for forked processes, since fsspec runs a thread: start processes by spawn or forkserver.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import errno
import hashlib
import logging
import os
import select
import signal
import ssl
import subprocess
import tempfile
import threading
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote, urlsplit

import tenacity

from sgan_dist.config import RemoteConfig
from sgan_dist.data.remote.urls import PREFIXES, is_remote, redact_url
from sgan_dist.errors import TransientError, UserError

BACKOFF_SECONDS = 1.0  # maximum before the second attempt; doubled before each further one
LONGEST_WAIT_SECONDS = 60.0
POLL_SECONDS = 0.2  # how soon a stopped download ends
CONNECT_SECONDS = 30.0  # not `read_timeout`: a busy machine or a far server is no stalled one
# errors of a full or read-only disk; never those of a network
_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}

log = logging.getLogger(__name__)


class Missing(UserError):
    """There is no file at the location."""


class Denied(UserError):
    """The server refuses access to the location."""


class Stopped(Exception):
    """The caller stopped the download."""


class _Retry(Exception):
    """An attempt failed, and the next one may succeed, after `wait` seconds or more."""

    def __init__(self, reason: str, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.wait = wait


class _Mismatch(_Retry):
    """The content differs from the index."""


class _Attempt(NamedTuple):
    """One attempt: the file to write, the settings, and the maximum size in bytes."""

    path: Path
    timeout: float
    stop: threading.Event
    limit: int | None

    def check(self, size: int) -> None:
        """Raises Stopped, or _Mismatch if `size` bytes are too many."""
        if self.stop.is_set():
            raise Stopped
        if self.limit is not None and size > self.limit:
            raise _Mismatch(f"more than {self.limit} bytes")


def fetch(
    location: str,
    target: Path,
    remote: RemoteConfig,
    size: int | None = None,
    sha256: str | None = None,
    stop: threading.Event | None = None,
) -> None:
    """Downloads a remote file to `target`, whole or not at all.

    Network errors, and content that differs from `size` (bytes) and `sha256`, are retried.

    Raises:
        UserError: it cannot be downloaded, or `target` cannot be written: among them Missing,
            Denied, and TransientError if all attempts failed. The message names the location.
        Stopped: `stop` was set.
    """
    stop, shown = stop or threading.Event(), redact_url(location)
    if not is_remote(location):
        raise UserError(f"{shown} is not a remote location: use one of {' '.join(PREFIXES)}")

    def attempt() -> None:
        if stop.is_set():
            raise Stopped
        temporary = target.with_name(f".{target.name}.{os.urandom(8).hex()}")
        try:
            temporary.touch()
            _download(location, _Attempt(temporary, remote.read_timeout, stop, size))
            _compare(temporary, size, sha256)
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)

    def warn(state: tenacity.RetryCallState) -> None:
        assert state.outcome is not None and state.next_action is not None
        log.warning(
            f"retrying {shown} in {state.next_action.sleep:.0f} s: {state.outcome.exception()}"
            f" ({state.attempt_number + 1} of {remote.tries})"
        )

    try:
        tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(_Retry),
            stop=tenacity.stop_after_attempt(remote.tries),
            wait=_pause,
            sleep=tenacity.sleep_using_event(stop),
            before_sleep=warn,
            reraise=True,
        )(attempt)
    except _Mismatch as failure:
        raise UserError(
            f"the shard's bytes no longer match the index: {shown} has {failure}"
            f" ({remote.tries} tries): put back the file that was indexed, or index it again"
        ) from None
    except _Retry as failure:
        raise TransientError(
            f"cannot download {shown} ({failure}, {remote.tries} tries): check the network and the"
            " server"
        ) from None
    except OSError as error:
        raise UserError(
            f"cannot write {target.parent} ({error.strerror}): make room there, or choose another"
            " folder"
        ) from None


def _pause(state: tenacity.RetryCallState) -> float:
    """Seconds before the next attempt: those that the server asks for, or random ones.

    Full jitter: the ranks of a job must not all retry at the same moment.
    """
    jitter = tenacity.wait_random_exponential(BACKOFF_SECONDS, max=LONGEST_WAIT_SECONDS)(state)
    failure = state.outcome.exception() if state.outcome is not None else None
    wanted = failure.wait if isinstance(failure, _Retry) else 0.0
    return min(max(jitter, wanted), LONGEST_WAIT_SECONDS)


def read(location: str, remote: RemoteConfig) -> bytes | None:
    """Returns the bytes of a small remote file, or None if there is none. Raises as `fetch`.

    A `pipe:` command that fails is an error: it does not say whether the file exists.
    """
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "file"
        try:
            fetch(location, target, remote)
        except Missing:
            return None
        return target.read_bytes()


def _compare(path: Path, size: int | None, sha256: str | None) -> None:
    """Raises _Mismatch if the file differs from what was indexed."""
    actual = path.stat().st_size
    if size is not None and actual != size:
        raise _Mismatch(f"{actual} bytes, the index says {size}")
    if sha256 is not None:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != sha256:
            raise _Mismatch(f"sha256 {digest[:12]}, the index says {sha256[:12]}")


def _download(location: str, attempt: _Attempt) -> None:
    """Makes one attempt. Raises _Retry, UserError, Stopped, or the OSError of a disk."""
    if location.startswith("pipe:"):
        _download_pipe(location, attempt)
    elif location.startswith("s3:"):
        _download_s3(location, attempt)
    elif location.startswith("gs:"):
        _download_gs(location, attempt)
    else:
        # only characters that no URL may hold are encoded: a signed URL must not be changed
        url = quote(location, safe="!#$%&'()*+,/:;=?@[]~")
        _download_http(location, url, {}, attempt)


def _refusal(location: str, status: int, reason: str, wait: float = 0.0) -> Exception:
    """Returns what to raise for an HTTP status."""
    if status >= 500 or status in (408, 429):
        return _Retry(reason, wait)
    start = f"cannot download {redact_url(location)} ({reason})"
    if status in (404, 410):
        return Missing(f"{start}: check the location")
    if status in (401, 403):
        public = {
            "s3": """, or set FSSPEC_S3='{"anon": true}' if the bucket is public""",
            "gs": """, or set FSSPEC_GS='{"token": "anon"}' if the bucket is public""",
        }.get(location[:2], "")
        expired = ""
        if urlsplit(location).query:
            expired = ", or take a new URL by sgan-dist index --renew if its signature has expired"
        return Denied(f"{start}: check your credentials{public}{expired}")
    return UserError(f"{start}: check the location")


def _run(
    loop: asyncio.AbstractEventLoop, download: Coroutine[Any, Any, None], attempt: _Attempt
) -> None:
    """Waits for a coroutine of fsspec's asynchronous interface, and cancels it on any error here."""
    future = asyncio.run_coroutine_threadsafe(download, loop)
    try:
        while not concurrent.futures.wait([future], POLL_SECONDS).done:
            with contextlib.suppress(FileNotFoundError):
                attempt.check(attempt.path.stat().st_size)
        future.result()
    finally:
        future.cancel()


def _download_http(location: str, url: str, headers: dict[str, str], attempt: _Attempt) -> None:
    import aiohttp
    from fsspec.implementations.http import HTTPFileSystem

    # a .gz file must stay packed, though some servers declare that as an encoding; and the signature
    # of a redirect holds for its address byte for byte
    session = {"auto_decompress": False, "trust_env": True, "requote_redirect_url": False}
    http = HTTPFileSystem(encoded=True, client_kwargs=session)
    download = http._get_file(
        url,
        str(attempt.path),
        headers={"Accept-Encoding": "identity", **headers},
        # no `total`, which would limit the time for a whole shard
        timeout=aiohttp.ClientTimeout(
            total=None, sock_connect=CONNECT_SECONDS, sock_read=attempt.timeout
        ),
    )
    try:
        _run(http.loop, download, attempt)
    except FileNotFoundError:
        raise _refusal(location, 404, "HTTP 404 Not Found") from None
    except aiohttp.TooManyRedirects:
        raise UserError(
            f"cannot download {redact_url(location)}: it redirects in a circle; check the location"
        ) from None
    except aiohttp.ClientResponseError as error:
        after = error.headers.get("Retry-After", "") if error.headers else ""
        reason = f"HTTP {error.status} {error.message}"
        wait = float(after) if after.isdecimal() else 0.0
        raise _refusal(location, error.status, reason, wait) from None
    except (aiohttp.ClientConnectorCertificateError, aiohttp.ClientSSLError, ssl.SSLError) as error:
        reason = getattr(getattr(error, "certificate_error", error), "verify_message", "")
        raise UserError(
            f"cannot download {redact_url(location)}: its certificate is not trusted"
            f" ({reason or _one_line(error)}): set SSL_CERT_FILE to a file of trusted certificates"
        ) from None
    except (aiohttp.InvalidURL, ValueError):  # yarl's are ValueErrors
        raise UserError(f"cannot download {redact_url(location)}: it is not a valid URL") from None
    except aiohttp.ConnectionTimeoutError:
        raise _Retry(f"no connection within {CONNECT_SECONDS:g} seconds") from None
    except TimeoutError:
        raise _Retry(f"no byte for {attempt.timeout:g} seconds") from None
    except (aiohttp.ClientError, OSError) as error:
        if isinstance(error, aiohttp.ClientConnectorError) and (error.errno or -1) > 0:
            raise _Retry(os.strerror(error.errno or 0)) from None
        raise _retry_unless_disk(error) from None


def _download_s3(location: str, attempt: _Attempt) -> None:
    try:
        import fsspec.config
        from aiohttp import ClientError
        from botocore import exceptions as boto
        from botocore.parsers import ResponseParserError
        from s3fs import S3FileSystem
    except ImportError:
        raise UserError(f"reading {location} takes s3fs: pip install 'sgan_dist[s3]'") from None
    s3 = S3FileSystem(
        config_kwargs={
            **fsspec.config.conf.get("s3", {}).get("config_kwargs", {}),
            "connect_timeout": CONNECT_SECONDS,
            "read_timeout": attempt.timeout,
            "retries": {"total_max_attempts": 1},
        }
    )
    s3.retries = 1  # attempts: `fetch` counts its own
    try:
        _run(s3.loop, s3._get_file(location, str(attempt.path), max_concurrency=1), attempt)
    except (boto.ConnectionError, boto.HTTPClientError, boto.IncompleteReadError) as error:
        raise _Retry(_one_line(error)) from None
    except (ClientError, ResponseParserError) as error:
        raise _Retry(_one_line(error)) from None
    except OSError as error:
        response = getattr(error.__cause__, "response", None)
        if response is None:
            raise _retry_unless_disk(error) from None
        code = response.get("Error", {}).get("Code", "")
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 500)
        reason = f"HTTP {status} {code}"
        if code == "NoSuchBucket":
            bucket = urlsplit(location).netloc
            raise UserError(f"cannot download {location}: there is no bucket {bucket}") from None
        denied = isinstance(error, PermissionError)  # some of which have status 400
        raise _refusal(location, 403 if denied else status, reason) from None
    except boto.NoCredentialsError as error:
        raise _refusal(location, 401, _one_line(error)) from None
    except boto.BotoCoreError as error:  # no such profile, an impossible bucket
        raise UserError(
            f"cannot download {location} ({_one_line(error)}): check the location and your AWS"
            " configuration"
        ) from None


def _download_gs(location: str, attempt: _Attempt) -> None:
    try:
        from gcsfs.core import GCSFileSystem
        from google.auth.exceptions import GoogleAuthError, TransportError
    except ImportError:
        raise UserError(f"reading {location} takes gcsfs: pip install 'sgan_dist[gs]'") from None
    # gcsfs gives the address and the credentials; its own download would retry six times
    headers: dict[str, str] = {}
    try:
        gs = GCSFileSystem()
        gs.credentials.apply(headers)
    except (TransportError, OSError) as error:  # its message may hold the token
        raise _Retry(f"no answer about credentials, {type(error).__name__}") from None
    except GoogleAuthError as error:
        raise _refusal(location, 401, _one_line(error)) from None
    _download_http(location, gs.url(location), headers, attempt)


def _download_pipe(location: str, attempt: _Attempt) -> None:
    with attempt.path.open("wb") as out, tempfile.TemporaryFile() as stderr:
        process = subprocess.Popen(
            location.removeprefix("pipe:"),
            shell=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=stderr,
            start_new_session=True,  # a process group of its own, to be killed as a whole
        )
        assert process.stdout is not None
        try:
            last, size = time.monotonic(), 0
            while True:
                attempt.check(size)
                if select.select([process.stdout], [], [], min(POLL_SECONDS, attempt.timeout))[0]:
                    data = os.read(process.stdout.fileno(), 2**20)
                    if not data:
                        break
                    out.write(data)
                    last, size = time.monotonic(), size + len(data)
                elif time.monotonic() - last > attempt.timeout:
                    raise _Retry(f"no byte for {attempt.timeout:g} seconds")
            status = process.wait(attempt.timeout)
        except BaseException as error:
            # not yet waited for, so the group is still its own
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if isinstance(error, subprocess.TimeoutExpired):
                raise _Retry(f"no end {attempt.timeout:g} seconds after its last byte") from None
            raise
        finally:
            process.stdout.close()
        if status:
            stderr.seek(0)
            lines = stderr.read().decode(errors="replace").split("\n")
            last_line = next((line.strip() for line in reversed(lines) if line.strip()), "")
            raise _Retry(f"exit status {status}{': ' * bool(last_line)}{last_line[:200]}")


def _retry_unless_disk(error: Exception) -> Exception:
    """Returns what to raise for an error of a library: itself if the disk is full or read-only."""
    if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
        return error
    return _Retry(_one_line(error))


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
