"""Files that are written whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path


def write_whole(path: Path, content: str | bytes, fsync: bool = False) -> None:
    """Replaces the file at `path` by `content`; a reader, or a crash, never sees a part of it.

    With `fsync`, file and folder are flushed to disk, so that it survives a loss of power.

    Raises:
        OSError: it cannot be written; what was there before is unchanged.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            if fsync:
                file.flush()
                os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    if fsync:
        flush_folder(path.parent)


def flush_folder(folder: Path) -> None:
    """Flushes the names in a folder to disk: what was created in it or renamed into it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
