"""Requests to stop: TERM, HUP, USR1 and Ctrl-C, a file named STOP in the run directory, the launcher's
exit, the file that $SGAN_PREEMPTED names, and a SLURM job's time limit. Also the file that
$SGAN_OUTCOME names, in which a batch script reads how the run ended.

Imports nothing heavy: the handlers are installed before torch is loaded.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from sgan_dist.parallel.launcher import STOP_SIGNALS, launcher_pid

log = logging.getLogger(__name__)

TRY_AGAIN = 75  # EX_TEMPFAIL of sysexits.h: the same command may succeed later
LOOK_SECONDS = 1.0  # how often one process of a node looks for files that ask it to stop
EXIT_SECONDS = 30.0  # of a job's time, reserved for what follows the last step and its save

_received: signal.Signals | None = None
_file_reason: str | None = None  # what a file asks for
_launcher_pid = launcher_pid(os.environ)
_preempted_file = os.environ.get("SGAN_PREEMPTED")  # created by a batch script
_end_time = float(os.environ.get("SLURM_JOB_END_TIME") or "inf")  # seconds since the epoch
_save_seconds = 0.0


def catch_signals() -> None:
    """Makes the first of STOP_SIGNALS set a flag, and a second TERM or Ctrl-C end the process.

    HUP stays ignored under nohup.
    """
    for number in STOP_SIGNALS:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _on_signal)


def _on_signal(number: int, frame: FrameType | None) -> None:
    global _received
    if _received is not None and number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)
    _received = _received or signal.Signals(number)


@contextlib.contextmanager
def watching_files(run: Path) -> Iterator[None]:
    """Makes a file named STOP in `run`, and that of the batch script, requests to stop.

    One process of a node looks for them, in a thread, once every LOOK_SECONDS: a shared file system
    would not bear more.
    """
    global _file_reason
    _file_reason = None
    if os.environ.get("LOCAL_RANK", "0") != "0":
        yield
        return
    ended = threading.Event()

    def look() -> None:
        global _file_reason
        if stopped_by_hand(run):
            _file_reason = "a STOP file"
        elif _preempted_file is not None and _exists(_preempted_file):
            _file_reason = "the batch system"

    def look_on() -> None:
        while not ended.wait(LOOK_SECONDS):
            look()

    look()  # a file that is there already counts before the first step
    thread = threading.Thread(target=look_on, name="stop files", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def set_save_time(save_seconds: float) -> None:
    """Sets the time of the slowest save so far.

    A run stops when EXIT_SECONDS and twice this are left of the job's time.
    """
    global _save_seconds
    _save_seconds = save_seconds


def stop_requested() -> str | None:
    """Returns the reason why this process should stop; None if it should not."""
    if _received is not None:
        return _received.name
    if _file_reason is not None:
        return _file_reason
    if _launcher_pid is not None and os.getppid() != _launcher_pid:
        return "the launcher's exit"
    if time.time() > _end_time - EXIT_SECONDS - 2 * _save_seconds:
        return "the job's time limit"
    return None


def stopped_by_hand(run: Path) -> bool:
    """Returns whether there is a STOP file, after which a batch script must not restart the run."""
    return _exists(run / "STOP")


def _exists(path: str | Path) -> bool:
    return os.path.exists(path)  # noqa: PTH110 - False where a file system fails for a moment


def remove_stop_file(run: Path) -> None:
    """Removes the STOP file: the run has ended."""
    (run / "STOP").unlink(missing_ok=True)


def write_outcome(outcome: str) -> None:
    """Writes how the run ended to the file that a batch script has named in $SGAN_OUTCOME.

    `done`, `stopped` (by a STOP file), `preempted`, `try again`, or `failed: ` and the reason. Without
    the file a batch script takes the run for one that was killed.
    """
    if "SGAN_OUTCOME" in os.environ:
        try:
            Path(os.environ["SGAN_OUTCOME"]).write_text(outcome + "\n")
        except OSError as error:
            log.warning(f"cannot write the outcome {outcome!r} for the batch script: {error}")


def exit_code(by_hand: bool) -> int:
    """Returns the exit code of a stopped run: 128 + signal, or TRY_AGAIN without a signal.

    0 if it was stopped by hand, or if a batch script reads its outcome: on any other code launchers
    print a long error report and end the processes of the other nodes.
    """
    if by_hand or "SGAN_OUTCOME" in os.environ:
        return 0
    return TRY_AGAIN if _received is None else 128 + _received
