"""A rank that hangs: every rank prints its stacks and ends, so that a batch system restarts the run.

If one rank hangs, all others wait for it in a collective, so each rank is watched by a small process of
its own. The time for which a rank is suspended, by Ctrl-Z, SIGSTOP or a closed laptop, does not count.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import subprocess
import sys

from sgan_dist.parallel.agreement import limit_waits
from sgan_dist.parallel.collectives import rank
from sgan_dist.run import watcher

STDERR = 2  # not sys.stderr: the thread that hangs may hold its lock
STARTUP = 1800.0  # seconds that a collective may wait outside the loop: torch's default on CPU
PATIENT = 10 * 86400.0  # inside: the watchers end a hang, and all ranks may be suspended


class Watchdog:
    """Watches the loop in its `with` block, from the first `step_done` on."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._watcher: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Watchdog:
        return self

    def step_done(self, step: int) -> None:
        """Gives the next step, with its evaluation and save, `seconds` from now on."""
        if self._watcher is None or self._watcher.poll() is not None:
            self._watcher = self._start()
        assert self._watcher.stdin is not None
        self._watcher.stdin.write(b"%d\n" % step)

    def __exit__(self, *exception: object) -> None:
        """Stops watching: what follows the loop may take longer."""
        if self._watcher is not None:
            self._watcher.kill()
            self._watcher.wait()
            faulthandler.unregister(signal.SIGUSR2)
            limit_waits(STARTUP)

    def _start(self) -> subprocess.Popen[bytes]:
        limit_waits(PATIENT)
        faulthandler.register(signal.SIGUSR2, file=STDERR)
        arguments = str(os.getpid()), str(rank()), str(self._seconds)
        return subprocess.Popen(
            [sys.executable, "-ES", watcher.__file__, *arguments],
            stdin=subprocess.PIPE,
            bufsize=0,
            start_new_session=True,  # the signals of a terminal are for the run
        )
