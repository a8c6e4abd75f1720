"""MNIST and Fashion-MNIST by name: where their files lie, and downloading those that are missing.

SGAN_DATA names a folder of folders of files, SGAN_MIRROR a site's own copy of the web's.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import sys
import tempfile
import zlib
from pathlib import Path

from sgan_dist.data.remote import Transport, fetch
from sgan_dist.errors import UserError

MIRRORS = {
    "mnist": "https://ossci-datasets.s3.amazonaws.com/mnist",
    "fashion-mnist": "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com",
}
# of the unpacked files, as the same content is packed in more than one way
SHA256 = {
    "mnist": {
        "train-images-idx3-ubyte": (
            "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db"
        ),
        "train-labels-idx1-ubyte": (
            "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5"
        ),
        "t10k-images-idx3-ubyte": (
            "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7"
        ),
        "t10k-labels-idx1-ubyte": (
            "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2"
        ),
    },
    "fashion-mnist": {
        "train-images-idx3-ubyte": (
            "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888"
        ),
        "train-labels-idx1-ubyte": (
            "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9"
        ),
        "t10k-images-idx3-ubyte": (
            "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b"
        ),
        "t10k-labels-idx1-ubyte": (
            "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34"
        ),
    },
}


def dataset_folder(name: str, progress: bool = False) -> Path:
    """The folder of the four files: $SGAN_DATA/NAME if there, else the user's cache, filled first.

    With `progress`, a line on stderr for each download. Raises UserError where one is in vain.
    """
    given = os.environ.get("SGAN_DATA")
    if given and (Path(given) / name).is_dir():
        return Path(given) / name
    folder = cache_home() / "sgan_dist" / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for file, sha256 in SHA256[name].items():
            if not (folder / f"{file}.gz").exists() and not (folder / file).exists():
                _download(name, folder / f"{file}.gz", sha256, progress)
    except OSError as error:
        raise UserError(
            f"cannot write {folder}: {error.strerror}; set XDG_CACHE_HOME to another folder"
        ) from None
    return folder


def cache_home() -> Path:
    """The folder for what may be fetched again: $XDG_CACHE_HOME, else ~/.cache."""
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    try:
        # the XDG specification: a relative path is to be ignored
        return given if given.is_absolute() else Path.home() / ".cache"
    except RuntimeError:
        raise UserError("this user has no home folder: set XDG_CACHE_HOME to a folder") from None


def _download(name: str, target: Path, sha256: str, progress: bool) -> None:
    """Bring the packed file; UserError unless it is the one that is known."""
    mirror = os.environ.get("SGAN_MIRROR", "").rstrip("/")
    url = f"{mirror}/{name}/{target.name}" if mirror else f"{MIRRORS[name]}/{target.name}"
    instead = (
        f"give a folder of the four {name} files as `--source idx:DIR`, or put it at "
        f"$SGAN_DATA/{name}"
    )
    if progress:
        print(f"downloading {url}", file=sys.stderr)
    with tempfile.TemporaryDirectory(prefix=".", dir=target.parent) as folder:
        packed = Path(folder) / target.name
        try:
            fetch(url, packed, Transport())
        except UserError as error:
            raise type(error)(f"{error}; or {instead}") from None
        try:
            genuine = hashlib.sha256(gzip.decompress(packed.read_bytes())).hexdigest() == sha256
        except (OSError, EOFError, zlib.error):
            genuine = False
        if not genuine:
            raise UserError(
                f"{url} is not the {name} file (the sha256 of its content differs), and was not "
                f"kept: try another mirror (SGAN_MIRROR), or {instead}"
            )
        packed.replace(target)
