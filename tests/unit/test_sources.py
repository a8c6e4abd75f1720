"""Sources by name: what they are called, where their files come from, and what is refused."""

import gzip
import os
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from sgan_dist.data import download, remote
from sgan_dist.data.prepare import main
from sgan_dist.data.sources import load_source, source_name
from sgan_dist.errors import UserError
from tests.servers import drop, garble, http_server, s3_server, status

REAL = os.environ.get("SGAN_DATA")
needs_real = pytest.mark.skipif(REAL is None, reason="SGAN_DATA is not set")
FIRST = "train-images-idx3-ubyte.gz"

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, no SGAN_DATA, no waiting between tries; the cache's folder of sources."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("SGAN_DATA", raising=False)
    monkeypatch.setattr(remote, "BACKOFF_SECONDS", 0.0)
    return tmp_path / "cache" / "sgan_dist"


@pytest.fixture
def mirror(cache, tmp_path, monkeypatch):
    """A server whose folder `copies` is the mirror; empty, until `serve`."""
    (tmp_path / "mirror" / "copies").mkdir(parents=True)
    with http_server(tmp_path / "mirror") as mirror:
        monkeypatch.setenv("SGAN_MIRROR", f"{mirror.url}/copies/")
        yield mirror


def serve(mirror, name):
    """The real files of the source of that name."""
    (mirror.folder / "copies" / name).symlink_to(Path(REAL) / name)


def kept(folder):
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
def test_names_without_loading(cache, spec, name):
    assert source_name(spec) == name
    assert not cache.exists()


@pytest.mark.parametrize("spec", ["", "idx:", "idx", "MNIST", "mnist:x", "http://example.com"])
def test_unknown_sources(spec):
    for attempt in (source_name, load_source):
        with pytest.raises(UserError, match="use digits, mnist, fashion-mnist or idx:FOLDER"):
            attempt(spec)


def test_digits_are_called_digits():
    assert load_source("digits").name == source_name("digits")


@needs_real
@pytest.mark.parametrize(
    ("name", "first", "last", "counts"),
    [
        ("mnist", "0", "9", [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]),
        ("fashion-mnist", "T-shirt/top", "Ankle boot", [1000] * 10),
    ],
)
def test_named_source_in_a_given_folder(mirror, cache, monkeypatch, name, first, last, counts):
    monkeypatch.setenv("SGAN_DATA", REAL)
    source = load_source(name)
    assert source.name == name
    assert source.class_names[0] == first and source.class_names[-1] == last
    assert source.train_images.shape == (60000, 28, 28, 1)
    assert source.test_images.shape == (10000, 28, 28, 1)
    assert len(source.class_names) == len(set(source.class_names)) == 10
    assert np.bincount(source.test_labels).tolist() == counts
    assert not mirror.requests and not cache.exists()


@needs_real
def test_downloads_what_is_missing(mirror, cache, tmp_path, monkeypatch, capsys):
    serve(mirror, "mnist")
    # a folder of data without this source in it changes nothing
    monkeypatch.setenv("SGAN_DATA", str(tmp_path))
    labels = "/copies/mnist/t10k-labels-idx1-ubyte.gz"
    mirror.faults[labels] = [status(500), drop]
    source = load_source("mnist", progress=True)
    files = sorted(f"{file}.gz" for file in download.SHA256["mnist"])
    assert kept(cache) == files
    asked = {f"/copies/mnist/{file}": 1 for file in files}
    assert mirror.requests == {**asked, labels: 3}
    assert f"downloading {mirror.url}/copies/mnist/{FIRST}" in capsys.readouterr().err
    # a file may also lie there unpacked; only the one that isn't there at all is downloaded
    packed = cache / "mnist" / "t10k-images-idx3-ubyte.gz"
    packed.with_suffix("").write_bytes(gzip.decompress(packed.read_bytes()))
    packed.unlink()
    (cache / "mnist" / "t10k-labels-idx1-ubyte.gz").unlink()
    mirror.requests.clear()
    again = load_source("mnist")
    assert mirror.requests == {labels: 1}
    assert (again.test_images == source.test_images).all()
    assert capsys.readouterr().err == ""


@needs_real
def test_several_download_at_once(mirror, cache):
    serve(mirror, "mnist")
    name = "t10k-labels-idx1-ubyte.gz"
    (cache / "mnist").mkdir(parents=True)
    for path in (Path(REAL) / "mnist").iterdir():
        if path.name != name:
            (cache / "mnist" / path.name).symlink_to(path)
    with ThreadPoolExecutor(4) as pool:
        folders = list(pool.map(download.dataset_folder, ["mnist"] * 4))
    assert folders == [cache / "mnist"] * 4
    assert len(kept(cache)) == 4
    assert (cache / "mnist" / name).read_bytes() == (Path(REAL) / "mnist" / name).read_bytes()


@pytest.mark.parametrize(
    "body",
    [b"<html>log in</html>", b"", gzip.compress(b"another file", mtime=0)],
    ids=["a-log-in-page", "nothing", "another-file"],
)
def test_what_is_not_the_file_is_not_kept(mirror, cache, body):
    (mirror.folder / "copies" / "mnist").mkdir()
    (mirror.folder / "copies" / "mnist" / FIRST).write_bytes(body)
    with pytest.raises(UserError, match=rf"{FIRST} is not the mnist file .*not kept.*idx:DIR"):
        load_source("mnist")
    assert kept(cache) == [] and mirror.requests.total() == 1


@needs_real
def test_a_damaged_file_is_not_kept(mirror, cache):
    serve(mirror, "mnist")
    mirror.faults[f"/copies/mnist/{FIRST}"] = garble
    with pytest.raises(UserError, match=rf"{FIRST} is not the mnist file .*not kept"):
        load_source("mnist")
    assert kept(cache) == []


@pytest.mark.parametrize(
    ("fault", "message", "tries"),
    [
        (status(404), "HTTP 404 Not Found", 1),
        (status(500), "HTTP 500 Internal Server Error, 6 tries", 6),
        (drop, "Response payload is not completed.*, 6 tries", 6),
    ],
    ids=["404", "500", "drop"],
)
def test_failing_mirrors(mirror, cache, fault, message, tries):
    path = f"/copies/fashion-mnist/{FIRST}"
    (mirror.folder / path[1:]).parent.mkdir()
    (mirror.folder / path[1:]).write_bytes(b"half of it and the other half")
    mirror.faults[path] = fault
    with pytest.raises(UserError) as caught:
        load_source("fashion-mnist")
    assert caught.match(rf"cannot download {mirror.url}{path} \({message}\): check .*; or give")
    assert caught.match(r"`--source idx:DIR`.*\$SGAN_DATA/fashion-mnist$")
    assert mirror.requests == {path: tries} and kept(cache) == []


@needs_real
def test_a_mirror_in_a_bucket(cache, monkeypatch):
    with s3_server("copies") as s3:
        s3.upload(Path(REAL), "copies")
        monkeypatch.setenv("SGAN_MIRROR", "s3://copies")
        assert len(load_source("mnist").test_labels) == 10_000


def test_no_network(cache, tmp_path, monkeypatch, capsys):
    with socket.socket() as bound:  # bound but not listening: refuses
        bound.bind(("127.0.0.1", 0))
        monkeypatch.setenv("SGAN_MIRROR", f"http://127.0.0.1:{bound.getsockname()[1]}")
        assert main(["--source=mnist", f"--out={tmp_path / 'out'}"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: cannot download http://127.0.0.1:")
    assert (
        "Connection refused" in line and "--source idx:DIR" in line and "$SGAN_DATA/mnist" in line
    )
    assert not (tmp_path / "out").exists()
    monkeypatch.setenv("SGAN_MIRROR", "not a mirror")
    with pytest.raises(UserError, match=rf"^not a mirror/mnist/{FIRST} is no remote location"):
        load_source("mnist")


def test_a_changed_file_is_named(mirror, cache, tmp_path, monkeypatch):
    for folder in (cache / "mnist", tmp_path / "data" / "mnist"):
        folder.mkdir(parents=True)
        for file in download.SHA256["mnist"]:
            (folder / f"{file}.gz").write_bytes(gzip.compress(b"\0\0\x08\x01\0\0\0\0"))
        with pytest.raises(UserError, match=rf"{folder / FIRST} is not .*sha256.*: remove it"):
            load_source("mnist")
        monkeypatch.setenv("SGAN_DATA", str(tmp_path / "data"))
    # a given folder is never written to
    (folder / FIRST).unlink()
    with pytest.raises(UserError, match="has neither train-images"):
        load_source("mnist")
    assert not mirror.requests


def test_cache_that_cannot_be_written(mirror, tmp_path, monkeypatch):
    (tmp_path / "cache").touch()
    with pytest.raises(UserError, match=r"cannot write .*set XDG_CACHE_HOME"):
        load_source("mnist")


def test_the_usual_cache(mirror, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for given in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", given)
        with pytest.raises(UserError, match="HTTP 404"):
            load_source("mnist")
    assert (tmp_path / "home" / ".cache" / "sgan_dist" / "mnist").is_dir()


def test_the_usual_mirrors(cache, monkeypatch):
    asked = []
    monkeypatch.delenv("SGAN_MIRROR", raising=False)

    def fetch(url, *_):
        asked.append(url)
        raise UserError("not in a test")

    monkeypatch.setattr(download, "fetch", fetch)
    for name in download.MIRRORS:
        with pytest.raises(UserError, match=r"not in a test; or give a folder"):
            load_source(name)
    assert asked == [
        f"https://ossci-datasets.s3.amazonaws.com/mnist/{FIRST}",
        f"http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/{FIRST}",
    ]
