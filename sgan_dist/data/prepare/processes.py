"""Work in several processes, which end with this one, however it ends."""

from __future__ import annotations

import concurrent.futures
import contextlib
import itertools
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import Connection, wait
from typing import TypeVar

from sgan_dist.errors import UserError

QUEUED = 2  # jobs per process that are made in advance: they may hold images

Job = TypeVar("Job")
Result = TypeVar("Result")


def map_in_processes(
    work: Callable[[Job], Result], jobs: Iterable[Job], processes: int | None, large: bool = True
) -> Generator[tuple[Job, Result]]:
    """Yields each job with its result, as they are done.

    Args:
        work: a function of a module, or a partial of one.
        jobs: made while others are worked on.
        processes: None takes one per core, or this process alone for work that is not `large`.

    Raises:
        UserError: a process was killed. Errors of `work` are raised as they are; jobs that are being
            worked on are then not waited for.
    """
    count = processes or (len(os.sched_getaffinity(0)) if large else 1)
    if count == 1:
        for job in jobs:
            yield job, work(job)
        return
    context = multiprocessing.get_context("spawn")  # fsspec runs a thread, which a fork loses
    lifeline, own_end = context.Pipe(duplex=False)
    executor = concurrent.futures.ProcessPoolExecutor(count, context, _end_with, (lifeline,))
    waiting = iter(jobs)
    futures: dict[Future[Result], Job] = {}
    try:
        with lifeline, executor, own_end:  # own_end is closed first, which ends the processes
            while True:
                for job in itertools.islice(waiting, QUEUED * count - len(futures)):
                    with _signals_blocked():
                        futures[executor.submit(work, job)] = job
                if not futures:
                    return
                done, _ = concurrent.futures.wait(futures, return_when="FIRST_COMPLETED")
                for future in done:
                    yield futures.pop(future), future.result()
    except BrokenProcessPool:
        raise UserError(
            "a process was killed, probably out of memory: run the same command again with fewer"
            f" --jobs than {count}; it continues where this one stopped"
        ) from None


@contextlib.contextmanager
def _signals_blocked() -> Generator[None]:
    """Ctrl-C waits, and is not for the new processes, which inherit the mask.

    A terminal sends it to them too, and one that is still importing would print a traceback, as would
    one whose start is interrupted here. A library's thread may take the signal in spite of the mask.
    """
    came: list[int] = []
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    is_main = threading.current_thread() is threading.main_thread()
    if is_main:
        handler = signal.signal(signal.SIGINT, lambda number, _: came.append(number))
    try:
        yield
    finally:
        if is_main:
            signal.signal(signal.SIGINT, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for number in came[:1]:
            signal.raise_signal(number)


def _end_with(lifeline: Connection) -> None:
    """Ends this process when the parent closes the pipe, however it dies."""

    def watch() -> None:
        wait([lifeline])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
