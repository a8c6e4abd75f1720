"""This rank's slice of every global batch, from any step on, and a thread that makes them ahead.

What step s trains on is decided without knowing ranks or workers. Splits held in memory are served
by this process; windowed ones by workers, if there are any, each of which owns some lanes.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sgan_dist.config import Config
from sgan_dist.data.index import DatasetIndex
from sgan_dist.data.lanes import LaneStep, LaneWorkers, read_lanes, windowed_batches
from sgan_dist.data.reader import Skip
from sgan_dist.data.stream import FullStream, Samples, open_storage
from sgan_dist.errors import UserError
from sgan_dist.parallel.agreement import catch
from sgan_dist.parallel.random import share

AHEAD = 3  # batches that are made in advance
KNOWN = 2  # of these, whose errors are known before training continues
END_SECONDS = 3.0  # for which `close` waits for the batch that is being made


@dataclass(frozen=True)
class SemiSupervisedBatch:
    """This rank's contiguous slice of the global batches of one step, on the CPU.

    rows: which rows of the global batch these are, of each split that is trained on.
    labeled: uint8 (b_l, H, W, C); labels: int64 (b_l,); unlabeled: uint8 (b_u, H, W, C), b_u = 0
    without an unlabeled stream; ids: int64, a sample's number in its split. In pinned memory for a
    GPU. skips: damaged records that this rank has not reported before.
    """

    step: int
    rows: Mapping[str, range]
    labeled: Tensor
    labels: Tensor
    unlabeled: Tensor
    labeled_ids: Tensor
    unlabeled_ids: Tensor
    skips: tuple[Skip, ...] = ()


class SemiSupervisedLoader:
    """Labeled and unlabeled streams of a prepared dataset, as one endless sequence of batches.

    With `pin`, batches are in pinned (page-locked) memory, from which a GPU copies while this process
    continues.

    Raises:
        UserError: world size, lanes, workers and batches do not fit together, or a shard cannot be
            read, or (from `batches`) a worker process died.
    """

    def __init__(
        self, index: DatasetIndex, config: Config, rank: int, world_size: int, pin: bool = False
    ) -> None:
        check_shares(index, config, world_size)
        self._index, self._config = index, config
        self._windowed = windowed_batches(index, config)
        self._own_lanes = share(config.stream.lanes, rank, world_size)
        self._rows = {
            split: batch_rows(index, config, split, rank, world_size) for split in config.batches
        }
        with open_storage(config) as storage:
            self._full = {
                split: FullStream(storage, index, split, config, batch)
                for split, batch in config.batches.items()
                if split not in self._windowed
            }
        self._pin = pin
        self._reported: set[Skip] = set()
        self._lanes: LaneWorkers | Generator[LaneStep, None, None] | None = None

    def batches(self, start_step: int) -> Iterator[SemiSupervisedBatch]:
        """Returns batches from `start_step` on, without end; ends those of an earlier call."""
        self.close()
        self._reported.clear()
        lane_steps: Iterator[list[LaneStep]] = itertools.repeat([])
        if self._windowed:
            arguments = self._index, self._config, self._own_lanes, start_step
            if self._config.stream.workers:
                self._lanes = LaneWorkers(*arguments)
                lane_steps = self._lanes.steps()
            else:
                self._lanes = read_lanes(*arguments)
                lane_steps = ([step] for step in self._lanes)
        return (self._batch(step, next(lane_steps)) for step in itertools.count(start_step))

    def kill(self) -> None:
        """Kills the workers, which ends a thread's wait for them; `close` is still to be called."""
        if isinstance(self._lanes, LaneWorkers):
            self._lanes.kill()

    def close(self) -> None:
        """Ends the workers: they are asked to, and killed after a few seconds. May be repeated."""
        if self._lanes is not None:
            self._lanes.close()
            self._lanes = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _batch(self, step: int, lane_steps: list[LaneStep]) -> SemiSupervisedBatch:
        """Returns one step's batch: slices of the splits in memory, joined lanes of the others."""
        labeled, unlabeled = (
            self._pieces(split, step, lane_steps) for split in ("labeled", "unlabeled")
        )
        streams = [stream.skips for stream in self._full.values()]
        skips = itertools.chain(*streams, *(lanes.skips for lanes in lane_steps))
        new_skips = tuple(dict.fromkeys(skip for skip in skips if skip not in self._reported))
        self._reported.update(new_skips)
        return SemiSupervisedBatch(
            step=step,
            rows=self._rows,
            labeled=self._join([piece.images for piece in labeled]),
            labels=self._join([piece.labels for piece in labeled if piece.labels is not None]),
            unlabeled=self._join([piece.images for piece in unlabeled]),
            labeled_ids=self._join([piece.ids for piece in labeled]),
            unlabeled_ids=self._join([piece.ids for piece in unlabeled]),
            skips=new_skips,
        )

    def _pieces(self, split: str, step: int, lane_steps: list[LaneStep]) -> list[Samples]:
        """Returns the pieces of this rank's slice of a split's global batch, in order."""
        if split in self._full:
            rows = self._rows[split]
            return [self._full[split].take(step, rows.start, rows.stop)]
        if split in self._windowed:
            return [lanes.samples[split] for lanes in lane_steps]
        no_images = np.empty((0, *self._index.image_hwc), np.uint8)
        return [Samples(no_images, None, np.empty(0, np.int64))]

    def _join(self, arrays: Sequence[NDArray[Any]]) -> Tensor:
        """Returns the arrays end to end, in pinned memory if `pin` asks for it."""
        if len(arrays) == 1 and not self._pin:
            return torch.from_numpy(arrays[0])
        shape = (sum(len(array) for array in arrays), *arrays[0].shape[1:])
        dtype = torch.from_numpy(arrays[0]).dtype
        joined = torch.empty(shape, dtype=dtype, pin_memory=self._pin)
        # by numpy, because torch would copy with all its threads, which wait for one another
        np.concatenate(arrays, out=joined.numpy())
        return joined


class Prefetcher:
    """The loader's batches of the steps [start, stop), made by a thread, AHEAD in advance.

    Errors are UserErrors, or OSErrors as TransientErrors; other exceptions are raised as they are.
    """

    def __init__(self, loader: SemiSupervisedLoader, start: int, stop: int) -> None:
        self._loader = loader
        self._batches = itertools.islice(loader.batches(start), stop - start)
        self._thread = ThreadPoolExecutor(1, "loader")
        self._made: deque[Future[tuple[SemiSupervisedBatch | None, UserError | None]]] = deque()
        self._refill()

    def first(self) -> tuple[SemiSupervisedBatch | None, UserError | None]:
        """The next batch, which stays the next one, or the error that it met."""
        return self._made[0].result()

    def take(self) -> SemiSupervisedBatch:
        """The next batch. Raises the error that it met."""
        batch, error = self._made.popleft().result()
        self._refill()
        if error is not None:
            raise error
        assert batch is not None
        return batch

    def error(self) -> UserError | None:
        """The error that the next batch has met, or one of the KNOWN next ones; waits for these."""
        results = [future.result() for future in itertools.islice(self._made, KNOWN)]
        return next((error for _, error in results if error is not None), None)

    def close(self) -> None:
        """Ends the thread, then the loader's workers. May be repeated."""
        self._thread.shutdown(wait=False, cancel_futures=True)
        running = [future for future in self._made if not future.cancelled()]
        if wait(running, END_SECONDS).not_done:
            self._loader.kill()  # a worker for which the thread waits
            wait(running)
        self._loader.close()

    def _refill(self) -> None:
        while len(self._made) < AHEAD:
            self._made.append(self._thread.submit(catch, lambda: next(self._batches, None)))


def batch_rows(
    index: DatasetIndex, config: Config, split: str, rank: int, world_size: int
) -> range:
    """The rows of a split's global batch that a rank has: those of its lanes, if it is windowed."""
    batch = config.batches[split]
    if index.split(split).order == "full":
        return share(batch, rank, world_size)
    lanes, each = share(config.stream.lanes, rank, world_size), batch // config.stream.lanes
    return range(lanes.start * each, lanes.stop * each)


def check_shares(index: DatasetIndex, config: Config, world_size: int) -> None:
    """Raises UserError unless ranks can share batches, lanes and workers; reads no data."""
    windowed = windowed_batches(index, config)
    for split, batch in config.batches.items():
        if index.split(split).samples == 0:
            raise UserError(f"batch.{split} is {batch}, but the dataset has no {split} samples")
    if not windowed:
        return
    if config.batch.balanced and "labeled" in windowed:
        raise UserError(
            "batch.balanced needs the labeled split in memory, and it is read in windowed order: set"
            " batch.balanced to false"
        )
    lanes, workers = config.stream.lanes, config.stream.workers
    common = math.gcd(*windowed.values())
    if common % lanes:
        batches = " and ".join(f"batch.{split} = {batch}" for split, batch in windowed.items())
        raise UserError(
            f"stream.lanes is {lanes}: it must divide {batches}; choose {_choices(_divisors(common))}"
        )
    if workers > lanes // world_size:
        raise UserError(
            f"stream.workers is {workers}, but of the {world_size} process(es) one has only"
            f" {lanes // world_size} of the {lanes} lanes: choose at most that many workers"
        )


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def _choices(numbers: list[int]) -> str:
    *rest, last = map(str, numbers)
    return f"{', '.join(rest)} or {last}" if rest else last
