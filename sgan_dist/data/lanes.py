"""A rank's lanes of the windowed splits, read in this process or by workers that own some each."""

from __future__ import annotations

import atexit
import contextlib
import itertools
import multiprocessing
import signal
import time
from collections.abc import Generator, Iterator
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from typing import NamedTuple

import torch
import torch.multiprocessing  # teaches multiprocessing to send tensors as shared memory

from sgan_dist.config import Config
from sgan_dist.data.index import DatasetIndex
from sgan_dist.data.reader import Skip
from sgan_dist.data.stream import Samples, WindowedStream, open_storage
from sgan_dist.errors import UserError
from sgan_dist.parallel.random import share

KILL_AFTER_SECONDS = 3.0  # workers that have not ended by then at close() are killed


class LaneStep(NamedTuple):
    """What some lanes give one step: samples by split, and all damaged records found so far."""

    samples: dict[str, Samples]
    skips: list[Skip]


def windowed_batches(index: DatasetIndex, config: Config) -> dict[str, int]:
    """Returns the global batch of each split that is read in windowed order."""
    batches = config.batches.items()
    return {split: batch for split, batch in batches if index.split(split).order == "windowed"}


def read_lanes(
    index: DatasetIndex, config: Config, lanes: range, start_step: int
) -> Generator[LaneStep, None, None]:
    """Yields every step of these lanes of the windowed splits, from `start_step` on."""
    with open_storage(config) as storage:
        streams = {
            split: WindowedStream(storage, index, split, config, batch, lanes)
            for split, batch in windowed_batches(index, config).items()
        }
        for step in itertools.count(start_step):
            samples = {split: stream.take(step) for split, stream in streams.items()}
            yield LaneStep(samples, [skip for s in streams.values() for skip in s.skips])


class LaneWorkers:
    """Worker processes that share a rank's lanes. They end at `close`, or with this process."""

    def __init__(self, index: DatasetIndex, config: Config, lanes: range, start_step: int) -> None:
        # forkserver, because this process has threads, which fork does not survive; preloaded
        # modules are imported once, not by every worker
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["__main__", __name__])
        # The fork server and its children inherit the mask: a TERM or INT to the whole group is
        # for this process alone. The tracker comes first, because starting it clears the mask.
        resource_tracker.ensure_running()
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGINT))
        workers = config.stream.workers
        self.processes, self._pipes = [], list[Connection]()
        try:
            for worker in range(workers):
                own = share(len(lanes), worker, workers)
                pipe, worker_end = context.Pipe(duplex=False)
                arguments = worker_end, index, config, lanes[own.start : own.stop], start_step
                process = context.Process(target=_send_lanes, args=arguments)
                process.start()
                worker_end.close()  # else the end of the worker would not end the pipe
                self.processes.append(process)
                self._pipes.append(pipe)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        atexit.register(self.close)  # before multiprocessing waits for them

    def steps(self) -> Iterator[list[LaneStep]]:
        """Yields for every step what the workers read, in the order of their lanes.

        Raises:
            UserError: a worker died, or cannot read a shard.
        """
        while True:
            yield [self._receive(worker) for worker in range(len(self._pipes))]

    def kill(self) -> None:
        """Kills the workers; a thread that reads from them then gets a UserError."""
        for process in self.processes:
            process.kill()

    def close(self) -> None:
        """Ends the workers: their pipes are closed, and they are killed after a few seconds."""
        atexit.unregister(self.close)
        for pipe in self._pipes:
            pipe.close()
        deadline = time.monotonic() + KILL_AFTER_SECONDS
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
            process.kill()

    def _receive(self, worker: int) -> LaneStep:
        process = self.processes[worker]
        try:
            message = self._pipes[worker].recv()
        except (EOFError, OSError):
            process.join(1)  # its exit code arrives a moment later
            if not process.exitcode:
                raise
            raise UserError(
                f"data worker {process.pid} died (exit code {process.exitcode}): if it printed no"
                " error, it was killed or ran out of memory or of /dev/shm; start again, with fewer"
                " stream.workers or a smaller stream.lane_window_mib if it happens again"
            ) from None
        if isinstance(message, UserError):
            raise message
        samples, skips = message
        views = {
            split: Samples(images.numpy(), labels, ids)
            for split, (images, labels, ids) in samples.items()
        }
        return LaneStep(views, skips)


def _send_lanes(
    pipe: Connection, index: DatasetIndex, config: Config, lanes: range, start_step: int
) -> None:
    """Sends every step of a worker's lanes, or a UserError, until the reader of the pipe ends."""
    with contextlib.suppress(BrokenPipeError):
        try:
            for samples, skips in read_lanes(index, config, lanes, start_step):
                # tensors are sent as shared memory, several times as fast as through the pipe
                tensors = {
                    split: (torch.from_numpy(images), labels, ids)
                    for split, (images, labels, ids) in samples.items()
                }
                pipe.send((tensors, skips))
        except UserError as error:
            pipe.send(error)
