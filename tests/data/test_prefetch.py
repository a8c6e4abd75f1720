"""Batches ahead: which, how many, and what is known of their errors when."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sgan_dist.data.index import load_index
from sgan_dist.data.loader import AHEAD, KNOWN, Prefetcher, SemiSupervisedLoader
from sgan_dist.errors import TransientError, UserError
from tests.data.datasets import data_config, in_windowed_order


class Loader:
    """Gives step numbers as batches, and fails at one step."""

    def __init__(self, bad: int | None = None, error: Exception | None = None) -> None:
        self.bad, self.error = bad, error
        self.made: list[int] = []
        self.threads: set[str] = set()
        self.closed = 0

    def batches(self, start: int) -> Iterator[int]:
        step = start
        while True:
            self.threads.add(threading.current_thread().name)
            if step == self.bad:
                assert self.error is not None
                raise self.error
            self.made.append(step)
            yield step
            step += 1

    def close(self) -> None:
        self.closed += 1


def settled(loader: Loader) -> list[int]:
    """What has been made once nothing more is."""
    made = -1
    while made != len(loader.made):
        made = len(loader.made)
        time.sleep(0.05)
    return loader.made


def test_a_thread_makes_no_more_than_three_ahead() -> None:
    loader: Any = Loader()
    prefetcher: Any = Prefetcher(loader, 5, 10)
    assert settled(loader) == list(range(5, 5 + AHEAD))
    assert prefetcher.first() == (5, None)
    taken = [prefetcher.take()]
    assert settled(loader) == list(range(5, 6 + AHEAD))
    taken += [prefetcher.take() for _ in range(4)]
    assert taken == [5, 6, 7, 8, 9]
    assert settled(loader) == taken and prefetcher.error() is None  # none beyond the end
    assert loader.threads == {"loader_0"}
    prefetcher.close()
    prefetcher.close()
    assert loader.closed == 2


@pytest.mark.parametrize(
    ("error", "kind"), [(UserError("bad"), UserError), (OSError(5, "broken"), TransientError)]
)
def test_an_error_is_known_before_the_batches_before_it_are_used_up(
    error: Exception, kind: type[UserError]
) -> None:
    loader: Any = Loader(bad=4, error=error)
    prefetcher = Prefetcher(loader, 0, 100)
    known = []
    for _ in range(4):
        prefetcher.take()
        known.append(type(prefetcher.error()))
    # after batch s was taken, an error at s + KNOWN is known, and stays so
    assert known == [type(None)] * (4 - KNOWN) + [kind] * KNOWN
    with pytest.raises(kind):
        prefetcher.take()
    prefetcher.close()


def test_a_bug_keeps_its_traceback() -> None:
    loader: Any = Loader(bad=1, error=ZeroDivisionError("own code"))
    prefetcher = Prefetcher(loader, 0, 100)
    with pytest.raises(ZeroDivisionError, match="own code") as caught:
        prefetcher.error()
    assert "batches" in [entry.name for entry in caught.traceback]
    prefetcher.close()


@pytest.mark.process
def test_close_ends_a_wait_for_a_worker_that_hangs(digits: Path) -> None:
    index = in_windowed_order(load_index(digits), "unlabeled")
    loader = SemiSupervisedLoader(index, data_config(digits, workers=2), 0, 1)
    prefetcher = Prefetcher(loader, 0, 10**6)
    batch = prefetcher.take()
    assert batch.step == 0 and len(batch.unlabeled) == 96
    lanes: Any = loader._lanes
    os.kill(lanes.processes[0].pid, signal.SIGSTOP)
    while prefetcher._made[0].done():  # what the worker has sent already
        prefetcher.take()
    prefetcher.close()
    for process in lanes.processes:
        process.join(10)  # it has been killed
        assert not process.is_alive()
