"""Locks: the kernel's, or on file systems without them a file's existence."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from filelock import Timeout

from sgan_dist.files import locked

# flock as Lustre without its `flock` option answers it, and NFS without its lock daemon
WITHOUT_LOCKS = """
import errno, fcntl, os, sys
from pathlib import Path
def flock(*_): raise OSError(getattr(errno, sys.argv[2]), "no locks")
fcntl.flock = flock
from sgan_dist.files import locked
with locked(Path(sys.argv[1]), timeout=0):
    print("locked", flush=True)
    sys.stdin.read()
"""


def holder(path: Path, error: str) -> subprocess.Popen[str]:
    """A process that holds the lock until its input ends, where the kernel has no locks."""
    command = [sys.executable, "-c", WITHOUT_LOCKS, str(path), error]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True)


def test_a_lock_is_held_once(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with locked(path, timeout=0), pytest.raises(Timeout), locked(path, timeout=0):
        pass
    with locked(path, timeout=0):
        pass


@pytest.mark.process
@pytest.mark.parametrize("error", ["ENOSYS", "ENOLCK", "EOPNOTSUPP"])
def test_without_locks_a_file_is_one(error: str, tmp_path: Path) -> None:
    path = tmp_path / "lock"
    first, second = holder(path, error), None
    try:
        assert first.stdout is not None and first.stdout.readline() == "locked\n"
        assert (tmp_path / "lock.held").exists()
        second = holder(path, error)
        _, errors = second.communicate(timeout=60)
        assert second.returncode == 1 and "Timeout" in errors
        first.kill()  # it leaves the file behind
        first.communicate(timeout=60)
        third = holder(path, error)
        output, errors = third.communicate(timeout=60)
        assert (third.returncode, output) == (0, "locked\n"), errors
        assert "is on a file system without locks: lock.held is used instead" in errors
        assert not (tmp_path / "lock.held").exists()
    finally:
        for process in (first, second):
            if process is not None and process.poll() is None:
                process.kill()
                process.communicate()
