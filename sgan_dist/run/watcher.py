"""The process beside a rank that watches it: `python watcher.py PID RANK SECONDS`.

It reads the number of each step that is done, one a line, from its standard input, and ends with it.
Run by its path, with the standard library alone: it starts in a few milliseconds.
"""

import contextlib
import os
import signal
import sys
import time

KILL_AFTER = 10.0  # seconds from the stacks to the end of the process


def watch(pid: int, rank: str, seconds: float) -> None:
    """Returns when the rank is done or has ended.

    A rank that takes `seconds` for a step gets USR2, by which it prints its stacks; if it takes
    KILL_AFTER more, ALRM, which ends it in the middle of C code too.
    """
    tick = min(1.0, seconds / 10)
    step, idle, reported = "", 0.0, False
    os.set_blocking(0, False)
    while True:
        time.sleep(tick)
        with contextlib.suppress(BlockingIOError):
            lines = os.read(0, 2**16).decode()
            if not lines:
                return
            step, idle, reported = lines.split()[-1], 0.0, False
        idle += 0.0 if _suspended(pid) else tick  # by ticks: this process may be suspended too
        if idle >= seconds and not reported:
            reported = True
            message = (
                f"rank {rank} hangs: {seconds:g} s without a step since step {step}"
                " (machine.step_timeout); its stacks:\n"
            )
            with contextlib.suppress(OSError):  # nobody reads the output
                os.write(2, message.encode())
            os.kill(pid, signal.SIGUSR2)
        if idle >= seconds + KILL_AFTER:
            os.kill(pid, signal.SIGUSR2)  # where it is now
            time.sleep(tick)
            os.kill(pid, signal.SIGALRM)
            return


def _suspended(pid: int) -> bool:
    """Whether a process is stopped by a signal or a debugger; False where there is no /proc."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] in ("T", "t")
    except OSError:
        return False


if __name__ == "__main__":
    # a rank that has ended meanwhile
    with contextlib.suppress(ProcessLookupError):
        watch(int(sys.argv[1]), sys.argv[2], float(sys.argv[3]))
