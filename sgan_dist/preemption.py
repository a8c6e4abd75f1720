"""Being told to stop: TERM, Ctrl-C, a file named STOP in the run directory, a launcher's death, and
what a batch system says: the file that $SGAN_PREEMPTED names, the end of the job's time. And telling
a batch script how the run ended.

Imports nothing heavy: scripts install the handlers before torch is loaded.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType

TRY_AGAIN = 75  # EX_TEMPFAIL of sysexits.h: the same command goes on
SPARE = 30.0  # seconds of a job's time for the way from the last step to the end of the process

_received: int | None = None
_stop_file: Path | None = None
# torchrun, accelerate and deepspeed leave these to their workers
_MARKS = {"TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION", "CROSS_RANK"}
_launched = _MARKS & os.environ.keys()
_launcher: int | None = os.getppid() if _launched else None
_notice = os.environ.get("SGAN_PREEMPTED")  # a file that a batch script makes
_end_time = float(os.environ.get("SLURM_JOB_END_TIME") or "inf")  # seconds since the epoch
_save_seconds = 0.0


def catch_signals() -> None:
    """From now on TERM and the first Ctrl-C only set a flag; a second one ends the process."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _note)


def _note(number: int, frame: FrameType | None) -> None:
    global _received
    if _received is not None:
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)
    _received = number


def watch(run: Path) -> None:
    """Takes a file named STOP in `run` as a request too."""
    global _stop_file
    _stop_file = run / "STOP"


def reckon_with(save_seconds: float) -> None:
    """A job's time is over when SPARE and twice the time of a save, the slowest so far, are left."""
    global _save_seconds
    _save_seconds = save_seconds


def stop_requested() -> str | None:
    """Why this process is to stop; None while it isn't."""
    if _received is not None:
        return f"signal {_received}"
    if stopped_by_hand():
        return "a file STOP"
    if _launcher is not None and os.getppid() != _launcher:
        return "the launcher's death"
    if _notice is not None and os.path.exists(_notice):  # noqa: PTH110 - every step
        return "the batch system"
    if time.time() > _end_time - SPARE - 2 * _save_seconds:
        return "the end of the job's time"
    return None


def stopped_by_hand() -> bool:
    """Whether there is a file named STOP: the run is to end, and not to be started again."""
    return _stop_file is not None and _stop_file.exists()


def forget_stop() -> None:
    """Takes the file named STOP away: it was obeyed, or came too late."""
    if _stop_file is not None:
        _stop_file.unlink(missing_ok=True)


def tell(outcome: str) -> None:
    """Tells a batch script how the run ended, in the file that it has named in $SGAN_OUTCOME:

    `done`, `stopped` (by STOP), `preempted`, `try again`, or `failed: ` and why. One that can't be
    written is as one of a run that was killed.
    """
    if "SGAN_OUTCOME" in os.environ:
        try:
            Path(os.environ["SGAN_OUTCOME"]).write_text(outcome + "\n")
        except OSError as error:
            print(f"can't tell the batch script of {outcome}: {error}", file=sys.stderr)


def exit_code(by_hand: bool) -> int:
    """Of a run that saved and stopped: 128 + signal, or TRY_AGAIN without one.

    0 where it was stopped by hand, and where a batch script is told by `tell`: launchers make a page
    of alarm of any other code, and end the other nodes' processes.
    """
    if by_hand or "SGAN_OUTCOME" in os.environ:
        return 0
    return TRY_AGAIN if _received is None else 128 + _received
