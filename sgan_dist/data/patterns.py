"""Patterns of shards, as webdataset's users write them, to the locations that they stand for."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Sequence
from pathlib import Path

import braceexpand

from sgan_dist.data.remote import is_remote
from sgan_dist.errors import UserError


def expand(patterns: Sequence[str], split: str) -> tuple[str, ...]:
    """The shards of a split in the patterns' order: absolute paths and remote locations.

    A pattern has brace ranges (`{000000..000099}`) and lists (`{a,b}`), `*`, `?` and `[...]` for
    local files, s3:// and gs://, whose matches are sorted, and joins others by `::`.

    Raises:
        UserError: a pattern matches nothing or can't be listed, a local shard isn't there, or one
            comes twice.
    """
    found: list[str] = []
    for pattern in patterns:
        for part in re.split(r"::(?![^\[]*\])", pattern):
            try:
                names = list(braceexpand.braceexpand(part))
            except ValueError:
                raise UserError(f"the {split} pattern {part} has unbalanced braces") from None
            for name in names:
                found += _matches(name, split)
    if not found:
        raise UserError(f"no {split} shards: give at least one pattern")
    seen: set[str] = set()
    for name in found:
        if name in seen:
            raise UserError(f"the {split} patterns name the shard {name} twice: once is enough")
        seen.add(name)
    return tuple(found)


def _matches(name: str, split: str) -> list[str]:
    if not name:
        raise UserError(f"an empty {split} pattern: give a path or a URL")
    if not is_remote(name):
        path = os.path.abspath(name)  # noqa: PTH100 - links keep their names, as users know them
        if Path(path).is_file():  # a name may have brackets of its own
            return [path]
        matches = sorted(glob.glob(path)) if glob.has_magic(path) else []  # noqa: PTH207
        if not matches:
            raise UserError(f"no {split} shard {name}: check the path")
        return matches
    if name.startswith(("s3:", "gs:")) and glob.has_magic(name):
        return _listed(name, split)
    if name.startswith("http") and "*" in name:
        raise UserError(f"web servers cannot list {name}: write a brace range, {{000000..000099}}")
    return [name]


def _listed(pattern: str, split: str) -> list[str]:
    """Matches in an object store, with credentials as remote.py finds them."""
    import fsspec

    try:
        store = fsspec.filesystem(pattern[:2])
        matches = sorted(store.unstrip_protocol(name) for name in store.glob(pattern))
    except Exception as error:  # noqa: BLE001 - the stores' libraries have errors of their own
        why = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"cannot list the {split} shards {pattern}: {why}") from None
    if not matches:
        raise UserError(f"no {split} shard matches {pattern}: check it")
    return matches
