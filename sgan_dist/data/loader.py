"""This rank's slice of every global batch, from any step on: SemiSupervisedLoader.

What step s trains on is decided without knowing ranks or workers. Splits held in memory are served
in this process; windowed ones by workers, if there are any, each of which owns some lanes.
"""

from __future__ import annotations

import atexit
import itertools
import math
import multiprocessing
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing import connection, resource_tracker
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from sgan_dist.config import DataConfig
from sgan_dist.data.index import DatasetIndex
from sgan_dist.data.lanes import (
    LaneParts,
    Parts,
    check_alive,
    prepare_worker,
    tensors,
)
from sgan_dist.data.reader import Skip
from sgan_dist.data.stream import FullStream, open_storage
from sgan_dist.errors import UserError

KILL_AFTER_SECONDS = 3.0  # workers that have not ended by then at close() are killed


@dataclass(frozen=True)
class SemiSupervisedBatch:
    """This rank's contiguous slice of the global batches of one step, on the CPU.

    labeled: uint8 (b_l, H, W, C); labels: int64 (b_l,); unlabeled: uint8 (b_u, H, W, C), b_u = 0
    without an unlabeled stream; ids: int64, a sample's number in its split. Pinned under CUDA.
    skips: damaged records that this rank met for the first time.
    """

    step: int
    labeled: Tensor
    labels: Tensor
    unlabeled: Tensor
    labeled_ids: Tensor
    unlabeled_ids: Tensor
    skips: tuple[Skip, ...] = ()


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
        self._batches = split_batches(config)
        self._windowed = _windowed(index, config)
        self._index, self._config, self._seed = index, config, seed
        self._rank, self._world_size = rank, world_size
        storage = open_storage(config)
        try:
            self._full = {
                split: FullStream(
                    storage, index, split, seed, batch, config.balanced and split == "labeled"
                )
                for split, batch in self._batches.items()
                if split not in self._windowed
            }
        finally:
            storage.close()
        nothing = torch.empty(0, dtype=torch.int64)
        self._empty = torch.empty((0, *index.image_shape), dtype=torch.uint8), nothing, nothing
        # out of pinned (page-locked) memory a GPU copies while this process goes on
        self._pin = torch.cuda.is_available()
        self._iterator: Any = None
        self._inline: Any = None
        self._told: set[Skip] = set()
        self._processes: list[Any] = []

    def batches(self, start_step: int) -> Iterator[SemiSupervisedBatch]:
        """Batches from `start_step` on, without end; a later call ends earlier workers."""
        self.close()
        self._told.clear()
        lanes = self._config.lanes // self._world_size
        dataset = LaneParts(
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
        self._inline = None if workers else iter(dataset)
        parts = (
            self._worker_parts(dataset, workers) if workers else ([part] for part in self._inline)
        )
        return (self._batch(step, next(parts)) for step in itertools.count(start_step))

    def close(self) -> None:
        """End the workers: they are asked to, and killed after a few seconds. May be repeated."""
        if self._inline is not None:
            self._inline.close()
            self._inline = None
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

    def _batch(self, step: int, windowed: list[Parts]) -> SemiSupervisedBatch:
        """One step's batch: slices of the splits in memory, parts of the windowed ones joined."""
        found = {"unlabeled": self._empty}
        for split, batch in self._batches.items():
            if split in self._full:
                share = batch // self._world_size
                start = self._rank * share
                parts = [tensors(self._full[split].take(step, start, start + share))]
            else:
                parts = [part[split] for part, _ in windowed]
            images, labels, ids = zip(*parts, strict=True)
            found[split] = self._joined(images), self._joined(labels), self._joined(ids)
        labeled, classes, labeled_ids = found["labeled"]
        unlabeled, _, unlabeled_ids = found["unlabeled"]
        met = [skip for stream in self._full.values() for skip in stream.skips]
        met += [skip for _, skips in windowed for skip in skips]
        new = tuple(skip for skip in dict.fromkeys(met) if skip not in self._told)
        self._told.update(new)
        return SemiSupervisedBatch(
            step, labeled, classes, unlabeled, labeled_ids, unlabeled_ids, new
        )

    def _joined(self, parts: tuple[Tensor, ...]) -> Tensor:
        """The parts end to end, in pinned memory under CUDA."""
        if len(parts) == 1 and not self._pin:
            return parts[0]
        shape = (sum(len(part) for part in parts), *parts[0].shape[1:])
        joined = torch.empty(shape, dtype=parts[0].dtype, pin_memory=self._pin)
        # by numpy: torch would copy with all its threads, which wait on one another and on workers
        np.concatenate([part.numpy() for part in parts], out=joined.numpy())
        return joined

    def _start(self, dataset: LaneParts, workers: int) -> None:
        # forkserver: this process has threads, which fork doesn't survive; what is preloaded is
        # imported once, not by every worker
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["__main__", __name__])
        loader = DataLoader(
            dataset,
            batch_size=None,  # what the dataset yields is passed on as it is
            num_workers=workers,
            multiprocessing_context=context,
            worker_init_fn=prepare_worker,
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

    def _worker_parts(self, dataset: LaneParts, workers: int) -> Iterator[list[Parts]]:
        """For every step, the parts of all workers, in the order of their lanes."""
        iterator, processes = self._iterator, self._processes
        while True:
            messages = []
            # the iterator gives one message of each worker by turns, in the workers' order
            for worker in range(workers):
                if self._iterator is not iterator:
                    raise RuntimeError("this iterator's loader was closed")
                check_alive(processes)
                try:
                    message = next(iterator)
                except (RuntimeError, OSError, EOFError):
                    # a moment for the news of its death, when it is a worker's that broke the pipe
                    connection.wait([process.sentinel for process in processes], timeout=1)
                    check_alive(processes)
                    raise
                if isinstance(message, UserError):
                    raise message
                array, skips = message
                messages.append((dataset.views(array.numpy(), worker, workers), skips))
            for number in range(dataset.message_steps):
                yield [
                    (
                        {s: tensors(tuple(a[number] for a in part)) for s, part in views.items()},
                        skips[number],
                    )
                    for views, skips in messages
                ]


def split_batches(config: DataConfig) -> dict[str, int]:
    """The global batch of each split that is trained on."""
    batches = {"labeled": config.labeled_batch, "unlabeled": config.unlabeled_batch}
    return {split: batch for split, batch in batches.items() if batch}


def _windowed(index: DatasetIndex, config: DataConfig) -> tuple[str, ...]:
    return tuple(split for split in split_batches(config) if index.split(split).order == "windowed")


def check_shares(index: DatasetIndex, config: DataConfig, world_size: int) -> None:
    """Raise UserError unless batches, lanes and workers can be shared out; reads no data."""
    batches, windowed = split_batches(config), _windowed(index, config)
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
    if config.balanced and "labeled" in windowed:
        raise UserError(
            "data.balanced needs the labeled split in memory, and it is read in the windowed order: "
            "set data.balanced to false"
        )
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
