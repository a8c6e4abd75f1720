"""Batches made ahead, so that training need not wait, and knows early that one cannot be made."""

from __future__ import annotations

import itertools
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor, wait

from sgan_dist.data.batch import SemiSupervisedBatch
from sgan_dist.data.loader import SemiSupervisedLoader
from sgan_dist.errors import UserError
from sgan_dist.parallel.agreement import catch

AHEAD = 3  # batches, as far as memory is concerned
KNOWN = 2  # of these, whose errors are known before training continues
END_SECONDS = 3.0  # for which `close` waits for the batch that is being made


class Prefetcher:
    """The loader's batches of the steps [start, stop), made by a thread, at most AHEAD in advance.

    Errors are UserErrors, or OSErrors as TransientErrors; what else goes wrong is raised by `take`.
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
