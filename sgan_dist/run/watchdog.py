"""A rank that hangs: every rank prints its stacks and ends, so that a batch system restarts the run.

If one rank hangs, all others wait for it in a collective, so each rank watches itself. It prints its
stacks first; then collectives fail and name themselves; last the kernel ends the process, even in
the middle of C code.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import threading
import time

from sgan_dist.parallel.collectives import limit_waits, rank

COLLECTIVES_AFTER = 5  # seconds from the stacks to the failure of the collectives
KILL_AFTER = 15  # seconds from the stacks to the end of the process
STDERR = 2  # not sys.stderr: the thread that hangs may hold its lock
STARTUP = 1800.0  # seconds that a collective may wait outside the loop: torch's default on CPU


class Watchdog:
    """Watches the loop in its `with` block, from the first `step_done` on."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._step, self._due = 0, float("inf")
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        return self

    def step_done(self, step: int) -> None:
        """Gives the next step, with its evaluation and save, `seconds` from now on."""
        self._step, self._due = step, time.monotonic() + self._seconds
        if self._thread.ident is None:
            limit_waits(self._seconds + COLLECTIVES_AFTER)
            # dumps the stacks once more at the end, also if the thread below could not
            faulthandler.register(signal.SIGALRM, file=STDERR, chain=True)
            self._thread.start()
        signal.setitimer(signal.ITIMER_REAL, self._seconds + KILL_AFTER)

    def __exit__(self, *exception: object) -> None:
        """Stops watching: what follows the loop may take longer."""
        if self._thread.ident is not None:
            self._closed.set()
            signal.setitimer(signal.ITIMER_REAL, 0)
            faulthandler.unregister(signal.SIGALRM)
            limit_waits(STARTUP)

    def _watch(self) -> None:
        reported = 0.0  # after a step that was only slow, the next one is watched as before
        while not self._closed.wait(min(1.0, self._seconds / 10)):
            due = self._due
            if time.monotonic() > due != reported:
                reported = due
                message = (
                    f"rank {rank()} hangs: {self._seconds:g} s without a step since step {self._step}"
                    " (machine.step_timeout); its stacks:\n"
                )
                os.write(STDERR, message.encode())
                faulthandler.dump_traceback(STDERR)
