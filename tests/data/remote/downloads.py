"""A file to download, and processes that download it."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sgan_dist.config import RemoteConfig
from sgan_dist.data.remote.transfer import fetch
from tests.ranks import REPOSITORY
from tests.servers import FolderServer

BODY = np.random.default_rng(0).integers(0, 256, 300_000, np.uint8).tobytes()
SHA256 = hashlib.sha256(BODY).hexdigest()
PATIENT = RemoteConfig(tries=3, read_timeout=30.0)
HASTY = RemoteConfig(tries=3, read_timeout=1.0)  # for servers that stall


class Place(NamedTuple):
    """BODY on a server: its location, and its path on the server."""

    server: FolderServer
    location: str
    path: str


def is_clean(target: Path) -> bool:
    """Whether a failed download left nothing in its folder."""
    return list(target.parent.iterdir()) == []


def run_code(code: str, *arguments: object) -> str:
    """What a Python process prints; it must succeed, without a word on standard error."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def fetch_in_child(location: str, target: Path) -> None:
    """The work of a child process."""
    fetch(location, target, PATIENT, sha256=SHA256)
