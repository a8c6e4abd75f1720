"""Sources by name: what they are called, where their files come from, and what is refused."""

import gzip
import http.server
import os
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from sgan_dist.data import download
from sgan_dist.data.prepare import main
from sgan_dist.data.sources import load_source, source_name
from sgan_dist.errors import UserError

REAL = os.environ.get("SGAN_DATA")
needs_real = pytest.mark.skipif(REAL is None, reason="SGAN_DATA is not set")
FIRST = "train-images-idx3-ubyte.gz"

pytestmark = pytest.mark.timeout(60)


class Mirror:
    """A web server: answers[path] is a status, a body, or a list of them, the last one for ever."""

    def __init__(self):
        self.answers = {}
        self.asked = []
        mirror = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                mirror.asked.append(self.path)
                answer = mirror.answers.get(self.path, 404)
                if isinstance(answer, list):
                    answer = answer.pop(0) if len(answer) > 1 else answer[0]
                if isinstance(answer, int):
                    self.send_error(answer)
                    return
                self.send_response(200)
                cut = answer[-3:] == b"CUT"  # the connection ends before the body does
                self.send_header("Content-Length", str(len(answer) + cut))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, *args):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/copies"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def serve(self, name):
        """The real files of the source of that name."""
        for path in (Path(REAL) / name).iterdir():
            self.answers[f"/copies/{name}/{path.name}"] = path.read_bytes()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, no SGAN_DATA, no waiting between tries; the cache's folder of sources."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.delenv("SGAN_DATA", raising=False)
    monkeypatch.setattr(download, "BACKOFF_SECONDS", 0)
    return tmp_path / "cache" / "sgan_dist"


@pytest.fixture
def mirror(cache, monkeypatch):
    mirror = Mirror()
    monkeypatch.setenv("SGAN_MIRROR", mirror.url + "/")
    yield mirror
    mirror.server.shutdown()
    mirror.server.server_close()


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
    assert not mirror.asked and not cache.exists()


@needs_real
def test_downloads_what_is_missing(mirror, cache, tmp_path, monkeypatch, capsys):
    mirror.serve("mnist")
    # a folder of data without this source in it changes nothing
    monkeypatch.setenv("SGAN_DATA", str(tmp_path))
    labels = "/copies/mnist/t10k-labels-idx1-ubyte.gz"
    body = mirror.answers[labels]
    mirror.answers[labels] = [500, body[:100] + b"CUT", body]
    source = load_source("mnist", progress=True)
    files = sorted(f"{file}.gz" for file in download.SHA256["mnist"])
    assert kept(cache) == files
    assert len(mirror.asked) == 6 and mirror.asked.count(labels) == 3
    assert f"downloading {mirror.url}/mnist/{FIRST}" in capsys.readouterr().err
    # a file may also lie there unpacked; only the one that isn't there at all is downloaded
    packed = cache / "mnist" / "t10k-images-idx3-ubyte.gz"
    packed.with_suffix("").write_bytes(gzip.decompress(packed.read_bytes()))
    packed.unlink()
    (cache / "mnist" / "t10k-labels-idx1-ubyte.gz").unlink()
    mirror.asked.clear()
    again = load_source("mnist")
    assert mirror.asked == [labels]
    assert (again.test_images == source.test_images).all()
    assert capsys.readouterr().err == ""


@needs_real
def test_several_download_at_once(mirror, cache):
    mirror.serve("mnist")
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
    mirror.answers[f"/copies/mnist/{FIRST}"] = body
    with pytest.raises(UserError, match=rf"{FIRST} is not the mnist file .*not kept.*idx:DIR"):
        load_source("mnist")
    assert kept(cache) == [] and len(mirror.asked) == 1


@pytest.mark.parametrize(
    ("answer", "message", "tries"),
    [
        (404, "HTTP 404 Not Found", 1),
        (500, "HTTP 500 Internal Server Error, 3 tries", 3),
        (b"halfCUT", "IncompleteRead.*3 tries", 3),
    ],
)
def test_failing_mirrors(mirror, cache, answer, message, tries):
    mirror.answers[f"/copies/fashion-mnist/{FIRST}"] = answer
    with pytest.raises(UserError) as caught:
        load_source("fashion-mnist")
    assert caught.match(rf"cannot download {mirror.url}/fashion-mnist/{FIRST} \({message}\): give")
    assert caught.match(r"`--source idx:DIR`.*\$SGAN_DATA/fashion-mnist$")
    assert len(mirror.asked) == tries and kept(cache) == []


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
    with pytest.raises(UserError, match=r"cannot download not a mirror/mnist/.*unknown url type"):
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
    assert not mirror.asked


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
    monkeypatch.setattr(download, "_fetch", lambda url: (asked.append(url), (None, "HTTP 4"))[1])
    for name in download.MIRRORS:
        with pytest.raises(UserError, match="cannot download"):
            load_source(name)
    assert asked == [
        f"https://ossci-datasets.s3.amazonaws.com/mnist/{FIRST}",
        f"http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/{FIRST}",
    ]
