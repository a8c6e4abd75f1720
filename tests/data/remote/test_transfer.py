"""Downloads over http, S3 and GCS, from a server with every kind of fault."""

from __future__ import annotations

import datetime
import gzip
import ipaddress
import socket
import ssl
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import quote

import pytest

from sgan_dist.config import RemoteConfig
from sgan_dist.data.remote import transfer
from sgan_dist.data.remote.transfer import Denied, Missing, Stopped, fetch, read
from sgan_dist.errors import UserError
from tests.data.remote.downloads import BODY, HASTY, PATIENT, SHA256, Place, is_clean
from tests.servers import (
    Fault,
    FolderServer,
    Handler,
    cut,
    drop,
    environment,
    garble,
    s3_environment,
    silence,
    slow,
    stall,
    status,
)

pytestmark = pytest.mark.timeout(120)


def test_a_local_file_is_not_downloaded(target: Path) -> None:
    with pytest.raises(UserError, match=r"data/a\.tar is not a remote location"):
        fetch("data/a.tar", target, PATIENT)


def test_a_file_arrives_whole(place: Place, target: Path) -> None:
    server, location, path = place
    target.write_bytes(b"an older one")
    fetch(location, target, PATIENT, len(BODY), SHA256)
    assert target.read_bytes() == BODY
    assert server.requests == {path: 1}
    assert list(target.parent.iterdir()) == [target]


def test_many_at_once(place: Place, target: Path) -> None:
    _, location, _ = place
    targets = [target.with_name(f"{number}.tar") for number in range(24)]
    with ThreadPoolExecutor(8) as pool:
        for download in [
            pool.submit(fetch, location, each, PATIENT, sha256=SHA256) for each in targets
        ]:
            download.result()
    assert sorted(target.parent.iterdir()) == sorted(targets)


def test_read(place: Place) -> None:
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


# Faults


def patience(fault: Fault) -> RemoteConfig:
    """Only a server that stalls needs a short timeout; on a busy machine others may be slow."""
    return HASTY if fault in (stall, silence) else PATIENT


@pytest.mark.parametrize(
    "fault",
    [status(500), status(503), status(429), status(408), drop, cut, garble, stall, silence],
    ids=["500", "503", "429", "408", "drop", "cut", "garble", "stall", "silence"],
)
def test_a_fault_that_passes(place: Place, target: Path, fault: Fault) -> None:
    server, location, path = place
    server.faults[path] = [fault, fault]
    fetch(location, target, patience(fault), len(BODY), SHA256)
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
def test_a_fault_that_stays(place: Place, target: Path, fault: Fault, message: str) -> None:
    server, location, path = place
    server.faults[path] = fault
    start = time.monotonic()
    with pytest.raises(UserError, match=message.replace("LOCATION", location)) as caught:
        fetch(location, target, patience(fault), len(BODY), SHA256)
    assert server.requests == {path: 3}  # no library retries by itself
    assert time.monotonic() - start < 3 * 15  # none waits for its own timeout, 15 s or more
    assert is_clean(target)
    assert not isinstance(caught.value, Missing | Denied)


@pytest.mark.parametrize(
    ("code", "kind"),
    [(404, Missing), (403, Denied), (401, Denied), (400, UserError)],
    ids=["404", "403", "401", "400"],
)
def test_errors_that_are_not_retried(
    place: Place, target: Path, code: int, kind: type[UserError]
) -> None:
    server, location, path = place
    server.faults[path] = status(code)
    with pytest.raises(UserError, match=rf"cannot download {location} \(HTTP {code}\b") as caught:
        fetch(location, target, PATIENT, len(BODY), SHA256)
    assert type(caught.value) is kind
    assert server.requests == {path: 1}
    assert is_clean(target)


def endless(handler: Handler, body: bytes) -> None:
    handler.send_response(200)
    handler.end_headers()
    while not handler.outer.closing.wait(0.001):
        handler.wfile.write(body)


@pytest.mark.process
@pytest.mark.parametrize("piped", [False, True], ids=["download", "pipe"])
def test_too_many_bytes(place: Place, target: Path, piped: bool) -> None:
    server, location, path = place
    server.faults[path] = endless
    location = "pipe:cat /dev/zero" if piped else location
    with pytest.raises(UserError, match=r"has more than 300000 bytes \(3 tries\)"):
        fetch(location, target, PATIENT, len(BODY), SHA256)
    assert is_clean(target)


@pytest.mark.parametrize("kind", ["http", "s3", "gs"])
def test_a_refused_connection(target: Path, kind: str) -> None:
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
    assert is_clean(target)


@pytest.mark.parametrize("location", ["http://", "http://host:port/a", "http://[::1/a"])
def test_invalid_addresses(target: Path, location: str) -> None:
    with pytest.raises(UserError, match=r"cannot download http://.*"):
        fetch(location, target, PATIENT)
    assert is_clean(target)


def test_a_folder_that_cannot_be_written(server: FolderServer, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"cannot write {tmp_path}/absent \(No such file"):
        fetch(f"{server.url}/data/a.tar", tmp_path / "absent" / "a.tar", PATIENT)
    assert not server.requests


# Waiting and stopping


def test_a_slow_server_is_not_a_stalled_one(place: Place, target: Path) -> None:
    server, location, path = place
    server.faults[path] = slow(pieces=8, seconds=0.3)  # 2.4 s in all
    remote = RemoteConfig(tries=1, read_timeout=2.0)
    fetch(location, target, remote, len(BODY), SHA256)
    assert target.read_bytes() == BODY
    assert server.requests == {path: 1}


def test_stopping_a_stalled_download(place: Place, target: Path) -> None:
    server, location, path = place
    server.faults[path] = stall
    stop = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        patient = RemoteConfig(tries=6, read_timeout=3600.0)
        download = pool.submit(fetch, location, target, patient, stop=stop)
        while not server.requests[path]:
            time.sleep(0.01)
        stop.set()
        with pytest.raises(Stopped):
            download.result()
    assert is_clean(target)


def test_stopping_a_wait_between_attempts(
    server: FolderServer, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "BACKOFF_SECONDS", 3600.0)
    monkeypatch.setattr(transfer, "LONGEST_WAIT_SECONDS", 3600.0)
    server.faults["/data/a.tar"] = status(503, Retry_After="3600")
    stop = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        download = pool.submit(fetch, f"{server.url}/data/a.tar", target, PATIENT, stop=stop)
        while not server.requests["/data/a.tar"]:
            time.sleep(0.01)
        stop.set()
        with pytest.raises(Stopped):
            download.result()
    assert server.requests["/data/a.tar"] == 1


def test_retry_after_is_obeyed(server: FolderServer, target: Path) -> None:
    server.faults["/data/a.tar"] = [status(429, Retry_After="1")]
    start = time.monotonic()
    fetch(f"{server.url}/data/a.tar", target, PATIENT)
    assert time.monotonic() - start >= 1


def test_retries_are_logged(
    server: FolderServer, target: Path, log: pytest.LogCaptureFixture
) -> None:
    server.faults["/data/a.tar"] = [status(500)]
    fetch(f"{server.url}/data/a.tar?sig=secret", target, PATIENT)
    (message,) = log.messages
    assert message.startswith(f"retrying {server.url}/data/a.tar in 0 s: HTTP 500")
    assert message.endswith("(2 of 3)")
    assert log.records[0].levelname == "WARNING"


# What is sent over http


def test_packed_files_stay_packed(server: FolderServer, target: Path) -> None:
    packed = gzip.compress(BODY)

    def as_encoding(handler: Handler, body: bytes) -> None:
        handler.send_response(200)
        handler.send_header("Content-Encoding", "gzip")
        handler.send_header("Content-Length", str(len(packed)))
        handler.end_headers()
        handler.wfile.write(packed)

    server.faults["/data/a.tar"] = as_encoding
    fetch(f"{server.url}/data/a.tar", target, PATIENT)
    assert target.read_bytes() == packed
    assert server.seen[0][1]["Accept-Encoding"] == "identity"


def test_addresses_are_sent_unchanged_but_not_shown(server: FolderServer, target: Path) -> None:
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


def test_a_redirect_is_followed_byte_for_byte(server: FolderServer, target: Path) -> None:
    """A signature holds for the address as it is written: `%2F` is not `/`."""
    query = (
        "response-content-disposition=a%3B%20b%3D%22un.tar%22&Signature=ab~c%2Bd%2Fe%3D&Id=K%2FX"
    )

    def redirect(handler: Handler, body: bytes) -> None:
        handler.send_response(302)
        handler.send_header("Location", f"{server.url}/data/a.tar?{query}")
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    server.faults["/sign/a.tar"] = redirect
    fetch(f"{server.url}/sign/a.tar", target, PATIENT, len(BODY), SHA256)
    assert server.seen[-1][0] == f"/data/a.tar?{query}"
    server.faults["/data/a.tar"] = redirect
    with pytest.raises(UserError, match="it redirects in a circle"):
        fetch(f"{server.url}/sign/a.tar", target, PATIENT)


def test_a_certificate_that_is_not_trusted(
    server: FolderServer, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([address]), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem = target.with_name("cert.pem")
    private = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    pem.write_bytes(private + certificate.public_bytes(serialization.Encoding.PEM))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pem)
    server._http.socket = context.wrap_socket(server._http.socket, server_side=True)
    location = server.url.replace("http:", "https:") + "/data/a.tar"
    with pytest.raises(
        UserError, match=r"not trusted \(self-signed certificate\): set SSL_CERT_FILE"
    ):
        fetch(location, target, PATIENT)
