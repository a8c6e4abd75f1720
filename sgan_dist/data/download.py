"""MNIST and Fashion-MNIST by name: where their files lie, and downloading those that are missing.

SGAN_DATA names a folder of folders of files, SGAN_MIRROR a site's own copy of the web's.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import secrets
import sys
import time
import zlib
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import urlopen

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
TRIES = 3
BACKOFF_SECONDS = 1.0  # before the second try; doubled before the third
TIMEOUT_SECONDS = 30.0


def dataset_folder(name: str, progress: bool = False) -> Path:
    """The folder of the four files: $SGAN_DATA/NAME if there, else the user's cache, filled first.

    With `progress`, a line on stderr for each download. Raises UserError where one is in vain.
    """
    given = os.environ.get("SGAN_DATA")
    if given and (Path(given) / name).is_dir():
        return Path(given) / name
    folder = _cache() / "sgan_dist" / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for file, sha256 in SHA256[name].items():
            if not (folder / f"{file}.gz").exists() and not (folder / file).exists():
                _write(folder / f"{file}.gz", _download(name, f"{file}.gz", sha256, progress))
    except OSError as error:
        raise UserError(
            f"cannot write {folder}: {error.strerror}; set XDG_CACHE_HOME to another folder"
        ) from None
    return folder


def _cache() -> Path:
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    try:
        # the XDG specification: a relative path is to be ignored
        return given if given.is_absolute() else Path.home() / ".cache"
    except RuntimeError:
        raise UserError("this user has no home folder: set XDG_CACHE_HOME to a folder") from None


def _write(path: Path, data: bytes) -> None:
    """Whole or not at all, whoever else is writing the same file."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _download(name: str, file: str, sha256: str, progress: bool) -> bytes:
    """The packed file; UserError unless it is the one that is known."""
    mirror = os.environ.get("SGAN_MIRROR", "").rstrip("/")
    url = f"{mirror}/{name}/{file}" if mirror else f"{MIRRORS[name]}/{file}"
    instead = (
        f"give a folder of the four {name} files as `--source idx:DIR`, or put it at "
        f"$SGAN_DATA/{name}"
    )
    if progress:
        print(f"downloading {url}", file=sys.stderr)
    for attempt in range(TRIES):
        time.sleep(BACKOFF_SECONDS * attempt)
        data, why = _fetch(url)
        if data is not None:
            break
        if why.startswith("HTTP 4"):  # what isn't there won't be there in a second
            raise UserError(f"cannot download {url} ({why}): {instead}")
    else:
        raise UserError(f"cannot download {url} ({why}, {TRIES} tries): {instead}")
    try:
        genuine = hashlib.sha256(gzip.decompress(data)).hexdigest() == sha256
    except (OSError, EOFError, zlib.error):
        genuine = False
    if not genuine:
        raise UserError(
            f"{url} is not the {name} file (the sha256 of its content differs), and was not "
            f"kept: try another mirror (SGAN_MIRROR), or {instead}"
        )
    return data


def _fetch(url: str) -> tuple[bytes | None, str]:
    """What is at the URL, or None and why not."""
    try:
        with urlopen(url, timeout=TIMEOUT_SECONDS) as response:
            return response.read(), ""
    except HTTPError as error:
        return None, f"HTTP {error.code} {error.reason}"
    except (OSError, HTTPException, ValueError) as error:
        return None, str(getattr(error, "reason", error))
