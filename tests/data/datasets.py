"""Small datasets for tests: configs for them, their tars as bytes, and changes to their shards."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sgan_dist.config import (
    BatchConfig,
    Config,
    DataConfig,
    RemoteConfig,
    StreamConfig,
    TrainConfig,
)
from sgan_dist.data.index import SPLITS, DatasetIndex, with_fingerprint

LAYOUTS = ("packed", "per-sample")


def data_config(
    root: Path | str,
    *,
    labeled: int = 48,
    unlabeled: int = 96,
    lanes: int = 24,
    window_mib: float = 1,
    workers: int = 0,
    cache: Path | str | None = None,
    tries: int = 6,
    supervised_only: bool = False,
    seed: int = 0,
) -> Config:
    """A config that matters to the loader alone."""
    return Config(
        seed=seed,
        data=DataConfig(root=str(root)),
        batch=BatchConfig(labeled=labeled, unlabeled=unlabeled),
        stream=StreamConfig(lanes=lanes, lane_window_mib=window_mib / lanes, workers=workers),
        remote=RemoteConfig(cache=None if cache is None else str(cache), tries=tries),
        train=TrainConfig(supervised_only=supervised_only),
    )


def in_windowed_order(index: DatasetIndex, *splits: str) -> DatasetIndex:
    """The index with these splits in windowed order."""
    for split in splits:
        index = with_split(index, split, order="windowed")
    return with_fingerprint(index)


def with_split(index: DatasetIndex, split: str, **fields: Any) -> DatasetIndex:
    """The index with other values in one split; its fingerprint is left as it is."""
    changed = {split: dataclasses.replace(index.split(split), **fields)}
    return dataclasses.replace(index, **changed)  # type: ignore[arg-type]


def without_sidecars(index: DatasetIndex) -> DatasetIndex:
    """The index of the same dataset as 0.1.0 made it."""
    for split in SPLITS:
        shards = [
            dataclasses.replace(shard, sidecar_bytes=0, sidecar_sha256="")
            for shard in index.split(split).shards
        ]
        index = with_split(index, split, shards=tuple(shards))
    return index


def tar_bytes(
    files: Mapping[str, bytes | None] | Sequence[tuple[str, bytes | None]],
    form: int = tarfile.USTAR_FORMAT,
    mtime: float = 0,
) -> bytes:
    """A tar of these files; content of None makes a directory."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
        for name, content in files.items() if isinstance(files, Mapping) else files:
            member = tarfile.TarInfo(name)
            member.mtime = mtime  # a fraction makes a pax header
            if content is None:
                member.type = tarfile.DIRTYPE
            member.size = len(content or b"")
            tar.addfile(member, io.BytesIO(content or b""))
    return buffer.getvalue()


def tar_files(path: Path) -> dict[str, bytes]:
    """The files of a tar by name."""
    files = {}
    with tarfile.open(path) as tar:
        for member in tar:
            file = tar.extractfile(member)
            assert file is not None
            files[member.name] = file.read()
    return files


def rewrite_shard(
    root: Path, index: DatasetIndex, split: str, number: int, files: Mapping[str, bytes]
) -> DatasetIndex:
    """Replaces the files of a shard; returns the index of the changed dataset.

    The shard has no sidecar then, as in datasets of 0.1.0.
    """
    shard = index.split(split).shards[number]
    data = tar_bytes(files)
    (root / shard.name).write_bytes(data)
    shards = list(index.split(split).shards)
    shards[number] = dataclasses.replace(
        shard,
        bytes=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
        sidecar_bytes=0,
        sidecar_sha256="",
    )
    return with_split(index, split, shards=tuple(shards))


def npy_bytes(array: np.ndarray[Any, Any]) -> bytes:
    """The array as a .npy file."""
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def png_bytes(array: np.ndarray[Any, Any], **options: Any) -> bytes:
    """uint8 (H, W) or (H, W, 3) as a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG", **options)
    return buffer.getvalue()
