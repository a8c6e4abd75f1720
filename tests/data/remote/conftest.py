"""A faulty server and an empty cache, for all tests of remote files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from sgan_dist.data.remote import transfer
from tests.data.remote.downloads import BODY, Place
from tests.servers import FolderServer, environment, http_server, s3_environment


@pytest.fixture(autouse=True)
def _no_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "BACKOFF_SECONDS", 0.0)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FolderServer]:
    """Serves a folder with BODY as /data/a.tar, the key a.tar of bucket `data` of S3 and GCS."""
    folder = tmp_path / "served"
    for path in ("data", "download/storage/v1/b/data/o"):
        (folder / path).mkdir(parents=True)
        (folder / path / "a.tar").write_bytes(BODY)
    with http_server(folder) as server:
        yield server


@pytest.fixture(params=["http", "s3", "gs"])
def place(request: pytest.FixtureRequest, server: FolderServer) -> Iterator[Place]:
    """The same faulty server under three kinds of location."""
    if request.param == "http":
        yield Place(server, f"{server.url}/data/a.tar", "/data/a.tar")
    elif request.param == "s3":
        with s3_environment(server.url):
            yield Place(server, "s3://data/a.tar", "/data/a.tar")
    else:
        with environment(STORAGE_EMULATOR_HOST=server.url):
            yield Place(server, "gs://data/a.tar", "/download/storage/v1/b/data/o/a.tar")
        from gcsfs.core import GCSFileSystem

        GCSFileSystem.clear_instance_cache()


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """A file that does not exist yet, in an empty folder."""
    (tmp_path / "downloaded").mkdir()
    return tmp_path / "downloaded" / "a.tar"


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """The folder of a cache that does not exist yet."""
    return tmp_path / "cache"
