"""Expands patterns of shards, as users of webdataset write them, to locations."""

from __future__ import annotations

import glob
import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import braceexpand

from sgan_dist.data.remote.urls import is_remote
from sgan_dist.errors import UserError


def expand(patterns: Sequence[str], split: str) -> tuple[str, ...]:
    """Returns the shards of a split in the patterns' order: absolute paths and remote locations.

    A pattern may hold brace ranges (`{000000..000099}`) and lists (`{a,b}`); for local files,
    s3:// and gs:// also `*`, `?`, `[...]` and `**` (folders at any depth), whose matches are sorted;
    `::` joins patterns.

    Raises:
        UserError: a pattern matches nothing or cannot be listed, or a shard is missing or named
            twice.
    """
    shards: list[str] = []
    for pattern in patterns:
        for part in re.split(r"::(?![^\[]*\])", pattern):
            try:
                names = list(braceexpand.braceexpand(part))
            except ValueError:
                raise UserError(f"the {split} pattern {part} has unbalanced braces") from None
            for name in names:
                shards += _matches(name, split)
    if not shards:
        raise UserError(f"no {split} shards: give at least one pattern")
    name, count = Counter(shards).most_common(1)[0]
    if count > 1:
        raise UserError(f"the {split} patterns name the shard {name} twice: name it once")
    return tuple(shards)


def _matches(name: str, split: str) -> list[str]:
    if not name:
        raise UserError(f"an empty {split} pattern: give a path or a URL")
    if not is_remote(name):
        path = os.path.abspath(os.path.expanduser(name))  # noqa: PTH100, PTH111 - links keep the names that users know
        if Path(path).is_file():  # its name may have brackets
            return [path]
        matches = sorted(glob.glob(path, recursive=True)) if glob.has_magic(path) else []  # noqa: PTH207
        if not matches:
            raise UserError(f"no {split} shard {name}: check the path")
        return matches
    if name.startswith(("s3:", "gs:")) and glob.has_magic(name):
        return _listed(name, split)
    if name.startswith("http") and "*" in name:
        raise UserError(f"web servers cannot list {name}: write a brace range, {{000000..000099}}")
    return [name]


def _listed(pattern: str, split: str) -> list[str]:
    """Returns matches in an object store, with the same credentials as downloads."""
    import fsspec

    try:
        store = fsspec.filesystem(pattern[:2])
        matches = sorted(store.unstrip_protocol(name) for name in store.glob(pattern))
    except Exception as error:  # noqa: BLE001 - each store's library has its own errors
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"cannot list the {split} shards {pattern}: {reason}") from None
    if not matches:
        raise UserError(f"no {split} shard matches {pattern}: check it")
    return matches
