"""Sources: their names, the places of their files, downloads, and what is refused."""

from __future__ import annotations

import gzip
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from sgan_dist.cli import main
from sgan_dist.data.prepare.sources import known, load_source, source_name
from sgan_dist.data.prepare.sources.known import MIRRORS, SHA256, source_folder
from sgan_dist.data.prepare.sources.source import Part, Source
from sgan_dist.data.remote import transfer
from sgan_dist.errors import UserError
from tests.data.prepare.idx import REAL, needs_real
from tests.servers import Fault, FolderServer, drop, garble, http_server, s3_server, status

FIRST = "train-images-idx3-ubyte.gz"

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The package's folder in an empty cache, without SGAN_DATA or waits between attempts."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("SGAN_DATA", raising=False)
    monkeypatch.setattr(transfer, "BACKOFF_SECONDS", 0.0)
    return tmp_path / "cache" / "sgan_dist"


@pytest.fixture
def mirror(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FolderServer]:
    """A server with an empty folder `copies` that is the mirror."""
    (tmp_path / "mirror" / "copies").mkdir(parents=True)
    with http_server(tmp_path / "mirror") as mirror:
        monkeypatch.setenv("SGAN_MIRROR", f"{mirror.url}/copies/")
        yield mirror


def serve(mirror: FolderServer, name: str) -> None:
    """Puts the real files of that source into the mirror."""
    (mirror.folder / "copies" / name).symlink_to(REAL / name)


def part_of_tests(source: Source) -> Part:
    assert source.test is not None
    return source.test


def file_names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        ("digits", "digits"),
        ("mnist", "mnist"),
        ("fashion-mnist", "fashion-mnist"),
        ("idx:/no/such/folder/", "idx:folder"),
        ("idx:mnist", "idx:mnist"),
        ("idx:a/../b", "idx:b"),
    ],
)
def test_names_without_loading(cache: Path, spec: str, name: str) -> None:
    assert source_name(spec) == name
    assert not cache.exists()


@pytest.mark.parametrize("spec", ["", "idx:", "idx", "MNIST", "mnist:x", "http://example.com"])
def test_unknown_sources(spec: str) -> None:
    for attempt in (source_name, load_source):
        with pytest.raises(
            UserError, match="use one of digits, mnist, fashion-mnist, folder:DIR, "
        ):
            attempt(spec)


def test_the_name_of_digits() -> None:
    assert load_source("digits").name == source_name("digits")


@needs_real
@pytest.mark.parametrize(
    ("name", "first", "last", "counts"),
    [
        ("mnist", "0", "9", [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]),
        ("fashion-mnist", "T-shirt/top", "Ankle boot", [1000] * 10),
    ],
)
def test_a_named_source_in_sgan_data(
    mirror: FolderServer,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    first: str,
    last: str,
    counts: list[int],
) -> None:
    monkeypatch.setenv("SGAN_DATA", str(REAL))
    source = load_source(name)
    assert part_of_tests(source).array is not None and part_of_tests(source).labels is not None
    assert source.name == name
    assert source.class_names[0] == first and source.class_names[-1] == last
    assert source.train.array.shape == (60000, 28, 28, 1)
    assert part_of_tests(source).array.shape == (10000, 28, 28, 1)
    assert len(source.class_names) == len(set(source.class_names)) == 10
    assert np.bincount(part_of_tests(source).labels).tolist() == counts
    assert not mirror.requests and not cache.exists()


@needs_real
def test_missing_files_are_downloaded(
    mirror: FolderServer,
    cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    log: pytest.LogCaptureFixture,
) -> None:
    serve(mirror, "mnist")
    # SGAN_DATA without this source changes nothing
    monkeypatch.setenv("SGAN_DATA", str(tmp_path))
    labels = "/copies/mnist/t10k-labels-idx1-ubyte.gz"
    mirror.faults[labels] = [status(500), drop]
    source = load_source("mnist")
    files = sorted(f"{file}.gz" for file in SHA256["mnist"])
    assert file_names(cache) == files
    requests = {f"/copies/mnist/{file}": 1 for file in files}
    assert mirror.requests == {**requests, labels: 3}
    assert f"downloading {mirror.url}/copies/mnist/{FIRST}" in log.text
    # a file may also be unpacked; only a file that is missing in both forms is downloaded
    packed = cache / "mnist" / "t10k-images-idx3-ubyte.gz"
    packed.with_suffix("").write_bytes(gzip.decompress(packed.read_bytes()))
    packed.unlink()
    (cache / "mnist" / "t10k-labels-idx1-ubyte.gz").unlink()
    mirror.requests.clear()
    log.clear()
    again = load_source("mnist")
    assert mirror.requests == {labels: 1}
    assert part_of_tests(again).array is not None and part_of_tests(source).array is not None
    assert (part_of_tests(again).array == part_of_tests(source).array).all()
    assert log.messages == [f"downloading {mirror.url}{labels}"]


@needs_real
def test_several_download_at_once(mirror: FolderServer, cache: Path) -> None:
    serve(mirror, "mnist")
    name = "t10k-labels-idx1-ubyte.gz"
    (cache / "mnist").mkdir(parents=True)
    for path in (REAL / "mnist").iterdir():
        if path.name != name:
            (cache / "mnist" / path.name).symlink_to(path)
    with ThreadPoolExecutor(4) as pool:
        folders = list(pool.map(source_folder, ["mnist"] * 4))
    assert folders == [cache / "mnist"] * 4
    assert len(file_names(cache)) == 4
    assert (cache / "mnist" / name).read_bytes() == (Path(REAL) / "mnist" / name).read_bytes()


@pytest.mark.parametrize(
    "body",
    [b"<html>log in</html>", b"", gzip.compress(b"another file", mtime=0)],
    ids=["a-log-in-page", "nothing", "another-file"],
)
def test_another_file_is_not_kept(mirror: FolderServer, cache: Path, body: bytes) -> None:
    (mirror.folder / "copies" / "mnist").mkdir()
    (mirror.folder / "copies" / "mnist" / FIRST).write_bytes(body)
    with pytest.raises(UserError, match=rf"{FIRST} is not the mnist file .*not kept.*idx:DIR"):
        load_source("mnist")
    assert file_names(cache) == [] and mirror.requests.total() == 1


@needs_real
def test_a_damaged_file_is_not_kept(mirror: FolderServer, cache: Path) -> None:
    serve(mirror, "mnist")
    mirror.faults[f"/copies/mnist/{FIRST}"] = garble
    with pytest.raises(UserError, match=rf"{FIRST} is not the mnist file .*not kept"):
        load_source("mnist")
    assert file_names(cache) == []


@pytest.mark.parametrize(
    ("fault", "message", "tries"),
    [
        (status(404), "HTTP 404 Not Found", 1),
        (status(500), "HTTP 500 Internal Server Error, 6 tries", 6),
        (drop, "Response payload is not completed.*, 6 tries", 6),
    ],
    ids=["404", "500", "drop"],
)
def test_failing_mirrors(
    mirror: FolderServer, cache: Path, fault: Fault, message: str, tries: int
) -> None:
    path = f"/copies/fashion-mnist/{FIRST}"
    (mirror.folder / path[1:]).parent.mkdir()
    (mirror.folder / path[1:]).write_bytes(b"half of it and the other half")
    mirror.faults[path] = fault
    with pytest.raises(UserError) as caught:
        load_source("fashion-mnist")
    assert caught.match(rf"cannot download {mirror.url}{path} \({message}\): check .*; or give")
    assert caught.match(r"`--source idx:DIR`.*\$SGAN_DATA/fashion-mnist$")
    assert mirror.requests == {path: tries} and file_names(cache) == []


@pytest.mark.process
@needs_real
def test_a_mirror_in_a_bucket(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with s3_server("copies") as s3:
        s3.upload(REAL, "copies")
        monkeypatch.setenv("SGAN_MIRROR", "s3://copies")
        labels = part_of_tests(load_source("mnist")).labels
        assert labels is not None and len(labels) == 10_000


def test_no_network(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as bound:  # bound but not listening: refuses
        bound.bind(("127.0.0.1", 0))
        monkeypatch.setenv("SGAN_MIRROR", f"http://127.0.0.1:{bound.getsockname()[1]}")
        assert main(["prepare", "--source=mnist", f"--out={tmp_path / 'out'}"]) == 75  # transient
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: cannot download http://127.0.0.1:")
    assert (
        "Connection refused" in line and "--source idx:DIR" in line and "$SGAN_DATA/mnist" in line
    )
    assert not (tmp_path / "out").exists()
    monkeypatch.setenv("SGAN_MIRROR", "not a mirror")
    with pytest.raises(UserError, match=rf"^not a mirror/mnist/{FIRST} is not a remote location"):
        load_source("mnist")


def test_a_changed_file_is_named(
    mirror: FolderServer, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in (cache / "mnist", tmp_path / "data" / "mnist"):
        folder.mkdir(parents=True)
        for file in SHA256["mnist"]:
            (folder / f"{file}.gz").write_bytes(gzip.compress(b"\0\0\x08\x01\0\0\0\0"))
        with pytest.raises(
            UserError, match=rf"{folder / FIRST} is not the known .*sha256.*: remove it"
        ):
            load_source("mnist")
        monkeypatch.setenv("SGAN_DATA", str(tmp_path / "data"))
    # SGAN_DATA is never written to
    (folder / FIRST).unlink()
    with pytest.raises(UserError, match="has neither train-images"):
        load_source("mnist")
    assert not mirror.requests


def test_cache_that_cannot_be_written(
    mirror: FolderServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cache").touch()
    with pytest.raises(UserError, match=r"cannot write .*set XDG_CACHE_HOME"):
        load_source("mnist")


def test_the_usual_cache(
    mirror: FolderServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for folder in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", folder)
        with pytest.raises(UserError, match="HTTP 404"):
            load_source("mnist")
    assert (tmp_path / "home" / ".cache" / "sgan_dist" / "mnist").is_dir()


def test_the_usual_mirrors(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    urls = []
    monkeypatch.delenv("SGAN_MIRROR", raising=False)

    def fetch(url: str, *_: object) -> None:
        urls.append(url)
        raise UserError("not in a test")

    monkeypatch.setattr(known, "fetch", fetch)
    for name in MIRRORS:
        with pytest.raises(UserError, match=r"not in a test; or give a folder"):
            load_source(name)
    assert urls == [
        f"https://ossci-datasets.s3.amazonaws.com/mnist/{FIRST}",
        f"http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/{FIRST}",
    ]
