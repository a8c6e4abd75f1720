"""The command line in processes of its own, and the files that it leaves."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

from tests.ranks import REPOSITORY

SGAN_DIST = [sys.executable, "-m", "sgan_dist"]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(REPOSITORY)}


def run(command: list[str]) -> tuple[int, str, str]:
    """Exit code, standard output and standard error."""
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout, done.stderr


def file_sums(root: Path) -> dict[str, str]:
    """The sha256 of all files below a folder, by path."""
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }
