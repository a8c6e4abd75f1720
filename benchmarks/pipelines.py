"""The pipelines that are compared: each gives the same images as endless uint8 batches."""

from __future__ import annotations

import io
import math
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset
from images import Bytes, Kind, encoded_tars
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset

from sgan_dist.config import BatchConfig, Config, DataConfig, StreamConfig
from sgan_dist.data.index import load_index
from sgan_dist.data.loader import SemiSupervisedLoader

FULL = "ours, packed, full"
WINDOWED = "ours, packed, windowed"
MANY_LANES = "ours, packed, windowed, 8 a lane"
PER_SAMPLE = "ours, per sample, windowed"
USUAL = "webdataset, per sample"
RAW = "webdataset, per sample, raw"
TENSORS = "DataLoader over TensorDataset"
LITDATA = "LitData"
PLAIN = "tarfile + numpy.frombuffer"

LANES = 8
SAMPLES_A_LANE = 8  # in a step, for the row of many lanes
SHUFFLED = 1000  # samples in webdataset's shuffle buffer
NPY_HEADER = 128


@dataclass(frozen=True)
class Pipeline:
    """One row: `batches(workers)` opens it, for up to `max_workers`.

    An epoch is `epoch` images. `files` is the folder that it reads while it runs, None if it holds
    its images in memory. `cycle(workers)` is the number of batches after which every worker has
    made equally many.
    """

    name: str
    batches: Callable[[int], Iterator[Any]]
    epoch: int
    files: Path | None
    cycle: Callable[[int], int]
    max_workers: int = 2


def pipelines(folder: Path, kind: Kind, images: Bytes) -> list[Pipeline]:
    """Returns the rows of a kind of images that can be run on this machine."""

    def ours(name: str, root: Path, lanes: int, epoch: int, files: Path) -> Pipeline:
        batches = partial(_ours, root, kind.batch, lanes)
        return Pipeline(name, batches, epoch, files, lambda workers: 1)

    def other(name: str, batches: Any, epoch: int, files: Path | None) -> Pipeline:
        return Pipeline(name, batches, epoch, files, lambda workers: max(workers, 1))

    rows = []
    packed, tars = folder / "packed", encoded_tars(folder, kind)
    if kind.packed:
        full = partial(_ours, folder / "full", kind.batch, LANES)
        plain = partial(_plain, packed / "unlabeled", kind)
        many = kind.batch // SAMPLES_A_LANE
        rows = [
            Pipeline(FULL, full, kind.packed, None, lambda workers: 1, max_workers=0),
            ours(WINDOWED, packed, LANES, kind.packed, packed),
            ours(MANY_LANES, packed, many, kind.packed, packed),
            Pipeline(PLAIN, plain, kind.packed, packed, lambda workers: 1, max_workers=0),
        ]
    raw = folder / "raw"
    rows += [
        ours(f"{PER_SAMPLE}, {kind.format}", folder / "encoded", LANES, kind.encoded, tars),
        other(f"{USUAL}, {kind.format}", partial(_usual, tars, kind), kind.encoded, tars),
        other(RAW, partial(_raw, raw, kind), kind.encoded, raw),
        other(TENSORS, partial(_tensors, torch.from_numpy(images), kind.batch), kind.batch, None),
    ]
    stored = folder / "litdata"
    if stored.exists():
        rows.append(other(LITDATA, partial(_litdata, stored, kind), kind.encoded, stored))
    return rows


def _ours(root: Path, batch: int, lanes: int, workers: int) -> Iterator[torch.Tensor]:
    config = Config(
        data=DataConfig(root=str(root)),
        batch=BatchConfig(labeled=1, unlabeled=batch),  # one labeled image costs next to nothing
        stream=StreamConfig(lanes=lanes, workers=workers),
    )
    with SemiSupervisedLoader(load_index(root), config, 0, 1) as loader:
        for step in loader.batches(0):
            yield step.unlabeled


def _usual(tars: Path, kind: Kind, workers: int) -> Iterator[Any]:
    """The pipeline of webdataset's examples."""
    spec = "l8" if kind.shape[2] == 1 else "rgb8"
    return _loaded(_shards(tars).decode(spec).to_tuple(kind.suffix), kind, workers)


def _raw(tars: Path, kind: Kind, workers: int) -> Iterator[Any]:
    """The same without decoding: an image's file holds its pixels."""

    def pixels(data: bytes) -> Bytes:
        return np.frombuffer(data, np.uint8).reshape(kind.shape)

    return _loaded(_shards(tars).to_tuple("bin").map_tuple(pixels), kind, workers)


def _shards(tars: Path) -> webdataset.WebDataset:
    names = sorted(map(str, tars.glob("*.tar")))
    return webdataset.WebDataset(names, shardshuffle=len(names)).repeat().shuffle(SHUFFLED)


def _loaded(dataset: Any, kind: Kind, workers: int) -> Iterator[Any]:
    batched = dataset.batched(kind.batch, partial=False)
    for (images,) in webdataset.WebLoader(batched, batch_size=None, num_workers=workers):
        yield images


def _tensors(images: torch.Tensor, batch: int, workers: int) -> Iterator[torch.Tensor]:
    loader = DataLoader(
        TensorDataset(images),
        batch,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        persistent_workers=workers > 0,
    )
    while True:
        for (batch_images,) in loader:
            yield batch_images


def _litdata(stored: Path, kind: Kind, workers: int) -> Iterator[torch.Tensor]:
    import litdata

    class Images(litdata.StreamingDataset):
        def __getitem__(self, index: Any) -> Any:
            image = super().__getitem__(index)["image"]
            return image if kind.packed else np.array(Image.open(io.BytesIO(image)))

    dataset = Images(str(stored), shuffle=True, drop_last=True)
    loader = litdata.StreamingDataLoader(dataset, batch_size=kind.batch, num_workers=workers)
    while True:
        yield from loader


def _plain(tars: Path, kind: Kind, workers: int) -> Iterator[Bytes]:
    """The bytes of packed records, record after record: not shuffled, not in batches."""
    while True:
        for path in sorted(tars.glob("*.tar")):
            with tarfile.open(path, "r:") as tar:
                for member in tar:
                    file = tar.extractfile(member)
                    assert file is not None
                    pixels = np.frombuffer(file.read(), np.uint8, offset=NPY_HEADER)
                    yield pixels.reshape(len(pixels) // math.prod(kind.shape), *kind.shape)
