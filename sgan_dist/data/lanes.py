"""A rank's lanes of the windowed splits, read in this process or by workers that own some each."""

from __future__ import annotations

import itertools
import math
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from multiprocessing import connection
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from sgan_dist.config import DataConfig
from sgan_dist.data.index import DatasetIndex
from sgan_dist.data.reader import Skip
from sgan_dist.data.stream import Samples, WindowedStream, open_storage
from sgan_dist.errors import UserError

# torch passes a worker's message on as shared memory (/dev/shm), which costs milliseconds whatever
# its size, so a message carries several steps
MESSAGE_BYTES = 8 * 2**20
MESSAGE_STEPS = 8


# images, labels (empty for unlabeled), ids
Part = tuple[Tensor, Tensor, Tensor]
# one step's parts by split, and the damaged records newly met
Parts = tuple[dict[str, Part], list[Skip]]


class LaneParts(IterableDataset[Any]):
    """A rank's lanes of the windowed splits: for every step, from `start_step` on, its parts.

    In a worker: messages of several steps of the worker's share of the lanes, as one uint8 array
    each (see `views`) beside each step's newly met skips; a UserError comes as an item, since
    torch would wrap it in a traceback.
    """

    def __init__(
        self,
        index: DatasetIndex,
        config: DataConfig,
        seed: int,
        batches: dict[str, int],
        first_lane: int,
        lanes: int,
        start_step: int,
    ) -> None:
        self._index, self._config, self._seed = index, config, seed
        self._batches = batches
        self._first_lane, self._lanes = first_lane, lanes
        self._start_step = start_step
        step_bytes = sum(batches.values()) * lanes // config.lanes * math.prod(index.image_shape)
        self.message_steps = min(MESSAGE_STEPS, max(1, MESSAGE_BYTES // max(1, step_bytes)))

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        if worker is None:  # not in a worker
            for part, skips in self._parts(0, 1):
                yield {split: tensors(samples) for split, samples in part.items()}, skips
            return
        try:
            yield from self._messages(worker.id, worker.num_workers)
        except UserError as error:
            while True:  # whenever it is looked at: a worker that ends is taken for one that died
                yield error

    def views(
        self, message: NDArray[np.uint8], worker: int, workers: int
    ) -> dict[str, list[NDArray[Any]]]:
        """A message's images, labels (none of unlabeled) and ids, each with one row a step."""
        found: dict[str, list[NDArray[Any]]] = {split: [] for split in self._batches}
        for split, dtype, shape, place in self._fields(worker, workers):
            found[split].append(message[place].view(dtype).reshape(shape))
        return found

    def _fields(
        self, worker: int, workers: int
    ) -> list[tuple[str, type[Any], tuple[int, ...], slice]]:
        """Of every array in a message: its split, type, shape, and place in bytes."""
        first, stop = self._share(worker, workers)
        fields = []
        at = 0
        for split, batch in self._batches.items():
            samples = batch // self._config.lanes * (stop - first)
            labels = samples if split == "labeled" else 0
            arrays: tuple[tuple[type[Any], tuple[int, ...]], ...] = (
                (np.uint8, (samples, *self._index.image_shape)),
                (np.int64, (labels,)),
                (np.int64, (samples,)),
            )
            for dtype, row in arrays:
                shape = (self.message_steps, *row)
                size = math.prod(shape) * np.dtype(dtype).itemsize
                fields.append((split, dtype, shape, slice(at, at + size)))
                at += -(-size // 8) * 8  # int64 needs aligned places
        return fields

    def _messages(self, worker: int, workers: int) -> Iterator[tuple[Tensor, list[list[Skip]]]]:
        size = self._fields(worker, workers)[-1][-1].stop
        parts = self._parts(worker, workers)
        while True:
            message = np.empty(size, np.uint8)
            views = self.views(message, worker, workers)
            met = []
            for number, (part, skips) in enumerate(itertools.islice(parts, self.message_steps)):
                met.append(skips)
                for split, samples in part.items():
                    for view, array in zip(views[split], samples, strict=True):
                        if array is not None:
                            view[number] = array
            yield torch.from_numpy(message), met

    def _share(self, worker: int, workers: int) -> tuple[int, int]:
        """The worker's lanes [first, stop)."""
        first = self._first_lane + self._lanes * worker // workers
        return first, self._first_lane + self._lanes * (worker + 1) // workers

    def _parts(self, worker: int, workers: int) -> Iterator[tuple[dict[str, Samples], list[Skip]]]:
        config = self._config
        storage = open_storage(config)
        streams = {
            split: WindowedStream(
                storage,
                self._index,
                split,
                self._seed,
                batch,
                config.lanes,
                config.window_mib,
                *self._share(worker, workers),
            )
            for split, batch in self._batches.items()
        }
        told = 0
        try:
            for step in itertools.count(self._start_step):
                part = {split: stream.take(step) for split, stream in streams.items()}
                skips = [skip for stream in streams.values() for skip in stream.skips]
                new, told = len(skips) - told, len(skips)
                yield part, skips if new else []
        finally:
            storage.close()


def tensors(samples: tuple[Any, ...]) -> Part:
    images, labels, ids = samples
    labels = np.empty(0, np.int64) if labels is None else labels
    return torch.from_numpy(images), torch.from_numpy(labels), torch.from_numpy(ids)


def prepare_worker(worker: int) -> None:
    """In a new worker: only the parent decides when it ends, and it ends with its parent."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        # torch watches the process that forked this one, which is the fork server
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def check_alive(processes: list[Any]) -> None:
    for process in processes:
        if not process.is_alive() and process.exitcode:
            raise UserError(
                f"data worker {process.pid} died (exit code {process.exitcode}): it was killed or "
                "ran out of memory or of /dev/shm; start again, with fewer data.workers or a "
                "smaller data.window_mib if it happens again"
            )
