"""A rank that hangs: every rank's stacks in the log, then the end, so that a batch system goes on.

A hang of one rank is a wait of all the others, so each watches itself. Stacks come first; collectives
fail a little later, with their names; what is left the kernel ends, even in the middle of C code.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import threading
import time
from types import TracebackType

from sgan_dist.distributed import limit_waits, rank

STACKS_FIRST = 5  # seconds between the stacks and the failure of the collectives
LAST_CHANCE = 15  # and the end of the process
STDERR = 2  # not sys.stderr, which may be held by who hangs
STARTUP = 1800.0  # seconds that a collective may wait outside the loop: torch's default on CPU


class Watchdog:
    """Watches over the loop in its `with` block, from the first `step_done` on."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._step, self._due = 0, float("inf")
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        return self

    def step_done(self, step: int) -> None:
        """The next step, with its evaluation and save, has `seconds` from now on."""
        self._step, self._due = step, time.monotonic() + self._seconds
        if self._thread.ident is None:
            limit_waits(self._seconds + STACKS_FIRST)
            # dumps the stacks once more at the end, also where the thread below came to nothing
            faulthandler.register(signal.SIGALRM, file=STDERR, chain=True)
            self._thread.start()
        signal.setitimer(signal.ITIMER_REAL, self._seconds + LAST_CHANCE)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """The loop has ended: what follows may take its time."""
        if self._thread.ident is not None:
            self._closed.set()
            signal.setitimer(signal.ITIMER_REAL, 0)
            faulthandler.unregister(signal.SIGALRM)
            limit_waits(STARTUP)

    def _watch(self) -> None:
        told = 0.0  # a step that was only slow goes on, and the next one is watched as before
        while not self._closed.wait(min(1.0, self._seconds / 10)):
            due = self._due
            if time.monotonic() > due != told:
                told = due
                said = (
                    f"rank {rank()} hangs: {self._seconds:g} s without a step since step {self._step}"
                    " (train.timeout); its stacks:\n"
                )
                os.write(STDERR, said.encode())
                faulthandler.dump_traceback(STDERR)
