"""Locations of files: local paths, and http(s)://, s3://, gs:// and pipe: locations."""

from __future__ import annotations

import posixpath
import re
import shlex
from pathlib import Path
from urllib.parse import quote, urlsplit

from sgan_dist.errors import UserError

PREFIXES = ("http://", "https://", "s3://", "gs://", "pipe:")


def is_remote(location: str) -> bool:
    """Returns whether the location has one of PREFIXES. UserError for a URL of another kind."""
    if location.startswith(PREFIXES):
        return True
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", location):
        raise UserError(
            f"cannot read {redact_url(location)}: give the path of a local file, or a location that"
            f" begins with one of {' '.join(PREFIXES)}"
        )
    return False


def join(root: str, name: str) -> str:
    """Returns the location of `name` from `root` on, or `name` if it is remote or an absolute path.

    http(s): the name is percent-encoded and goes before the root's query string. A name may lead out of
    the root (`../tars/0.tar`), not out of its server or bucket. pipe: the name,
    quoted for the shell, is appended to the command: `pipe:ssh host cat /data` gives
    `pipe:ssh host cat /data/unlabeled/000000.tar`.
    """
    if is_remote(name) or Path(name).is_absolute():
        return name
    if not is_remote(root):
        return str(Path(root) / name)
    if root.startswith("pipe:"):
        return f"{root.rstrip('/')}/{shlex.quote(name)}"
    parts = urlsplit(root)
    if root.startswith("http"):
        name = quote(name)
    path = posixpath.normpath(f"{parts.path.rstrip('/')}/{name}")
    return parts._replace(path=path).geturl()


def redact_url(location: str) -> str:
    """Returns the location without the parts of a URL that may be secret: user, password, query."""
    if location.startswith("pipe:"):
        return location
    try:
        parts = urlsplit(location)
    except ValueError:  # not a valid URL: opening it will fail with a message
        return location
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()
