"""Downloads from S3 and GCS: buckets, credentials, and optional packages."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import fsspec.config
import pytest
from google.oauth2.credentials import Credentials

from sgan_dist.data.remote.transfer import Denied, Missing, fetch, read
from sgan_dist.errors import UserError
from tests.data.remote.downloads import BODY, PATIENT, SHA256, is_clean
from tests.servers import (
    BucketServer,
    FolderServer,
    environment,
    gs_server,
    s3_environment,
    s3_server,
)

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def s3() -> Iterator[BucketServer]:
    with s3_server("data") as server:
        server.put("data", "a b/0.tar", BODY)
        yield server


def test_s3(s3: BucketServer, target: Path) -> None:
    fetch("s3://data/a b/0.tar", target, PATIENT, len(BODY), SHA256)
    assert target.read_bytes() == BODY
    assert read("s3://data/a b/0.tar", PATIENT) == BODY


def test_a_missing_key_or_bucket_of_s3(s3: BucketServer, target: Path) -> None:
    with pytest.raises(Missing, match=r"cannot download s3://data/b.tar \(HTTP 404 NoSuchKey\)"):
        fetch("s3://data/b.tar", target, PATIENT)
    assert read("s3://data/b.tar", PATIENT) is None
    no_bucket = r"s3://absent/a\.tar: there is no bucket absent$"
    with pytest.raises(UserError, match=no_bucket):
        read("s3://absent/a.tar", PATIENT)
    with pytest.raises(UserError, match=no_bucket):
        fetch("s3://absent/a.tar", target, PATIENT)
    assert is_clean(target)


def test_credentials_of_s3(
    server: FolderServer, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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


def test_an_invalid_bucket_name_of_s3(s3: BucketServer, target: Path) -> None:
    with pytest.raises(UserError, match=r"Invalid bucket name.*: check the location") as caught:
        fetch("s3://Bad_Bucket!!/a.tar", target, PATIENT)
    assert not isinstance(caught.value, Missing | Denied)


def test_the_other_endpoint_variable_of_s3(server: FolderServer, target: Path) -> None:
    with s3_environment("http://127.0.0.1:9"), environment(AWS_ENDPOINT_URL_S3=server.url):
        fetch("s3://data/a.tar", target, PATIENT, sha256=SHA256)
    assert server.requests == {"/data/a.tar": 1}


def test_a_big_object_of_s3_is_one_request(server: FolderServer, target: Path) -> None:
    with open(server.folder / "data" / "big.tar", "wb") as file:
        file.truncate(2**26)  # more than s3fs reads in one piece
    with s3_environment(server.url):
        fetch("s3://data/big.tar", target, PATIENT, size=2**26)
    assert server.requests == {"/data/big.tar": 1}


@pytest.mark.process
def test_gs(target: Path) -> None:
    with gs_server("data") as server:
        server.put("data", "a b/0.tar", BODY)
        fetch("gs://data/a b/0.tar", target, PATIENT, len(BODY), SHA256)
        assert target.read_bytes() == BODY
        assert read("gs://data/b.tar", PATIENT) is None
        assert read("gs://absent/b.tar", PATIENT) is None


def test_credentials_of_gs(
    server: FolderServer, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with environment(STORAGE_EMULATOR_HOST=server.url):
        monkeypatch.setitem(fsspec.config.conf, "gs", {"token": Credentials("secret")})
        fetch("gs://data/a.tar", target, PATIENT, sha256=SHA256)
        assert server.seen[-1][1]["authorization"] == "Bearer secret"
        monkeypatch.setitem(fsspec.config.conf, "gs", {"token": "anon"})  # as FSSPEC_GS does
        fetch("gs://data/a.tar", target, PATIENT, sha256=SHA256)
        assert "authorization" not in server.seen[-1][1]


@pytest.mark.parametrize(("kind", "package"), [("s3", "s3fs"), ("gs", "gcsfs")])
def test_without_the_extra(
    target: Path, monkeypatch: pytest.MonkeyPatch, kind: str, package: str
) -> None:
    for name in list(sys.modules):
        if name.split(".")[0] == package:
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    location = f"{kind}://data/a.tar"
    message = rf"reading {location} takes {package}: pip install 'sgan_dist\[{kind}\]'"
    with pytest.raises(UserError, match=message):
        fetch(location, target, PATIENT)


def test_environment_variables_are_restored() -> None:
    before = dict(os.environ)
    with s3_environment("http://127.0.0.1:9"), environment(STORAGE_EMULATOR_HOST="x"):
        assert os.environ["AWS_ENDPOINT_URL"] == "http://127.0.0.1:9"
    assert dict(os.environ) == before
