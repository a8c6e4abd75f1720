"""This rank's slice of every global batch, from any step on: SemiSupervisedLoader.

What step s trains on is decided without knowing ranks or workers. Splits held in memory are served
in this process; windowed ones by workers, if there are any, each of which owns some lanes.
"""

from __future__ import annotations

import atexit
import itertools
import math
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing import connection, resource_tracker
from types import TracebackType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from sgan_dist.config import DataConfig
from sgan_dist.data.index import DatasetIndex
from sgan_dist.data.stream import FullStream, Samples, WindowedStream
from sgan_dist.errors import UserError

KILL_AFTER_SECONDS = 3.0  # workers that have not ended by then at close() are killed
# torch passes a worker's message on as shared memory (/dev/shm), which costs milliseconds whatever
# its size, so a message carries several steps
MESSAGE_BYTES = 8 * 2**20
MESSAGE_STEPS = 8


@dataclass(frozen=True)
class SemiSupervisedBatch:
    """This rank's contiguous slice of the global batches of one step, on the CPU.

    labeled: uint8 (b_l, H, W, C); labels: int64 (b_l,); unlabeled: uint8 (b_u, H, W, C), b_u = 0
    without an unlabeled stream; ids: int64, a sample's number in its split. Pinned under CUDA.
    """

    step: int
    labeled: Tensor
    labels: Tensor
    unlabeled: Tensor
    labeled_ids: Tensor
    unlabeled_ids: Tensor


# images, labels (empty for unlabeled), ids
_Part = tuple[Tensor, Tensor, Tensor]


class SemiSupervisedLoader:
    """Labeled and unlabeled streams of a prepared dataset, as one endless sequence of batches.

    Raises:
        UserError: the world size, lanes, workers and batches don't fit together, or a shard can't
            be read, or (from `batches`) a worker process died.
    """

    def __init__(
        self, index: DatasetIndex, config: DataConfig, seed: int, rank: int, world_size: int
    ) -> None:
        check_shares(index, config, world_size)
        self._batches = _batches(config)
        self._windowed = _windowed(index, config)
        self._index, self._config, self._seed = index, config, seed
        self._rank, self._world_size = rank, world_size
        self._full = {
            split: FullStream(config.root, index, split, seed, batch)
            for split, batch in self._batches.items()
            if split not in self._windowed
        }
        # out of pinned (page-locked) memory a GPU copies while this process goes on
        self._pin = torch.cuda.is_available()
        self._iterator: Any = None
        self._processes: list[Any] = []

    def batches(self, start_step: int) -> Iterator[SemiSupervisedBatch]:
        """Batches from `start_step` on, without end; a later call ends earlier workers."""
        self.close()
        lanes = self._config.lanes // self._world_size
        dataset = _LaneParts(
            self._index,
            self._config,
            self._seed,
            {split: self._batches[split] for split in self._windowed},
            self._rank * lanes,
            lanes,
            start_step,
        )
        workers = self._config.workers if self._windowed else 0
        if workers:
            self._start(dataset, workers)
        parts = self._worker_parts(dataset, workers) if workers else map(_as_single, dataset)
        return (self._batch(step, next(parts)) for step in itertools.count(start_step))

    def close(self) -> None:
        """End the workers: they are asked to, and killed after a few seconds. May be repeated."""
        if self._iterator is None:
            return
        atexit.unregister(self.close)
        iterator, self._iterator = self._iterator, None
        processes, self._processes = self._processes, []
        killer = threading.Timer(KILL_AFTER_SECONDS, lambda: [p.kill() for p in processes])
        killer.daemon = True
        killer.start()
        # what torch itself calls when the iterator is collected, whenever that is; no public name
        iterator._shutdown_workers()
        killer.cancel()

    def __enter__(self) -> SemiSupervisedLoader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _batch(self, step: int, windowed: list[dict[str, _Part]]) -> SemiSupervisedBatch:
        """One step's batch: slices of the splits in memory, parts of the windowed ones joined."""
        height, width, channels = self._index.image_shape
        empty = torch.empty(0, dtype=torch.int64)
        found = {"unlabeled": (torch.empty(0, height, width, channels).byte(), empty, empty)}
        for split, batch in self._batches.items():
            if split in self._full:
                share = batch // self._world_size
                start = self._rank * share
                parts = [_tensors(self._full[split].take(step, start, start + share))]
            else:
                parts = [part[split] for part in windowed]
            images, labels, ids = zip(*parts, strict=True)
            found[split] = self._joined(images), self._joined(labels), self._joined(ids)
        labeled, classes, labeled_ids = found["labeled"]
        unlabeled, _, unlabeled_ids = found["unlabeled"]
        return SemiSupervisedBatch(step, labeled, classes, unlabeled, labeled_ids, unlabeled_ids)

    def _joined(self, parts: tuple[Tensor, ...]) -> Tensor:
        """The parts end to end, in pinned memory under CUDA."""
        if len(parts) == 1 and not self._pin:
            return parts[0]
        shape = (sum(len(part) for part in parts), *parts[0].shape[1:])
        joined = torch.empty(shape, dtype=parts[0].dtype, pin_memory=self._pin)
        # by numpy: torch would copy with all its threads, which wait on one another and on workers
        np.concatenate([part.numpy() for part in parts], out=joined.numpy())
        return joined

    def _start(self, dataset: _LaneParts, workers: int) -> None:
        # forkserver: this process has threads, which fork doesn't survive; what is preloaded is
        # imported once, not by every worker
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["__main__", __name__])
        loader = DataLoader(
            dataset,
            batch_size=None,  # what the dataset yields is passed on as it is
            num_workers=workers,
            multiprocessing_context=context,
            worker_init_fn=_prepare_worker,
        )
        # the fork server and its children inherit the mask: a TERM or INT to the whole group is
        # for this process alone. The tracker comes first, as starting it clears the mask
        resource_tracker.ensure_running()
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGINT))
        try:
            self._iterator = iter(loader)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        self._processes = list(self._iterator._workers)
        # at exit, multiprocessing would TERM them and wait, and they ignore that
        atexit.register(self.close)

    def _worker_parts(self, dataset: _LaneParts, workers: int) -> Iterator[list[dict[str, _Part]]]:
        """For every step, the parts of all workers, in the order of their lanes."""
        iterator, processes = self._iterator, self._processes
        while True:
            messages = []
            # the iterator gives one message of each worker by turns, in the workers' order
            for worker in range(workers):
                if self._iterator is not iterator:
                    raise RuntimeError("this iterator's loader was closed")
                _check_alive(processes)
                try:
                    message = next(iterator)
                except (RuntimeError, OSError, EOFError):
                    # a moment for the news of its death, when it is a worker's that broke the pipe
                    connection.wait([process.sentinel for process in processes], timeout=1)
                    _check_alive(processes)
                    raise
                if isinstance(message, str):
                    raise UserError(message)
                messages.append(dataset.views(message.numpy(), worker, workers))
            for number in range(dataset.message_steps):
                yield [
                    {split: _tensors(tuple(a[number] for a in part)) for split, part in m.items()}
                    for m in messages
                ]


class _LaneParts(IterableDataset[Any]):
    """A rank's lanes of the windowed splits: for every step, from `start_step` on, its parts.

    In a worker: messages of several steps of the worker's share of the lanes, as one uint8 array
    each (see `views`); a UserError comes as its text, since torch would wrap it in a traceback.
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
            for part in self._parts(0, 1):
                yield {split: _tensors(samples) for split, samples in part.items()}
            return
        try:
            yield from self._messages(worker.id, worker.num_workers)
        except UserError as error:
            yield str(error)

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

    def _messages(self, worker: int, workers: int) -> Iterator[Tensor]:
        size = self._fields(worker, workers)[-1][-1].stop
        parts = self._parts(worker, workers)
        while True:
            message = np.empty(size, np.uint8)
            views = self.views(message, worker, workers)
            for number, part in enumerate(itertools.islice(parts, self.message_steps)):
                for split, samples in part.items():
                    for view, array in zip(views[split], samples, strict=True):
                        if array is not None:
                            view[number] = array
            yield torch.from_numpy(message)

    def _share(self, worker: int, workers: int) -> tuple[int, int]:
        """The worker's lanes [first, stop)."""
        first = self._first_lane + self._lanes * worker // workers
        return first, self._first_lane + self._lanes * (worker + 1) // workers

    def _parts(self, worker: int, workers: int) -> Iterator[dict[str, Samples]]:
        config = self._config
        streams = {
            split: WindowedStream(
                config.root,
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
        for step in itertools.count(self._start_step):
            yield {split: stream.take(step) for split, stream in streams.items()}


def _as_single(part: Any) -> list[dict[str, _Part]]:
    return [part]


def _tensors(samples: tuple[Any, ...]) -> _Part:
    images, labels, ids = samples
    labels = np.empty(0, np.int64) if labels is None else labels
    return torch.from_numpy(images), torch.from_numpy(labels), torch.from_numpy(ids)


def _prepare_worker(worker: int) -> None:
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


def _check_alive(processes: list[Any]) -> None:
    for process in processes:
        if not process.is_alive():
            raise UserError(
                f"data worker {process.pid} died (exit code {process.exitcode}): it was killed or "
                "ran out of memory or of /dev/shm; start again, with fewer data.workers or a "
                "smaller data.window_mib if it happens again"
            )


def _batches(config: DataConfig) -> dict[str, int]:
    """The global batch of each split that is trained on."""
    batches = {"labeled": config.labeled_batch, "unlabeled": config.unlabeled_batch}
    return {split: batch for split, batch in batches.items() if batch}


def _windowed(index: DatasetIndex, config: DataConfig) -> tuple[str, ...]:
    return tuple(split for split in _batches(config) if index.split(split).order == "windowed")


def check_shares(index: DatasetIndex, config: DataConfig, world_size: int) -> None:
    """Raise UserError unless batches, lanes and workers can be shared out; reads no data."""
    batches, windowed = _batches(config), _windowed(index, config)
    for split, batch in batches.items():
        if index.split(split).samples == 0:
            raise UserError(
                f"data.{split}_batch is {batch}, but the dataset has no {split} samples"
            )
        if batch % world_size:
            raise UserError(
                f"data.{split}_batch is {batch}, which {world_size} processes can't share "
                f"equally: start {_choices(_divisors(batch))} processes, or choose a multiple "
                f"of {world_size}"
            )
    if not windowed:
        return
    lanes, common = config.lanes, math.gcd(*(batches[split] for split in windowed))
    if lanes % world_size or common % lanes:
        allowed = [lanes for lanes in _divisors(common) if lanes % world_size == 0]
        named = " and ".join(f"data.{split}_batch = {batches[split]}" for split in windowed)
        raise UserError(
            f"data.lanes is {lanes}: it must be a multiple of the {world_size} process(es) and "
            f"divide {named}; choose {_choices(allowed)}"
        )
    if config.workers > lanes // world_size:
        raise UserError(
            f"data.workers is {config.workers}, but each of the {world_size} process(es) has only "
            f"{lanes // world_size} of the {lanes} lanes: choose at most that many workers"
        )


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def _choices(numbers: list[int]) -> str:
    *rest, last = map(str, numbers)
    return f"{', '.join(rest)} or {last}" if rest else last
