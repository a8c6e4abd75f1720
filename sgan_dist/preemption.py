"""Being told to stop: TERM, Ctrl-C, a file named STOP in the run directory, a launcher's death.

Imports nothing heavy: scripts install the handlers before torch is loaded.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from types import FrameType

_received: int | None = None
_stop_file: Path | None = None
# torchrun, accelerate and deepspeed leave these to their workers
_MARKS = {"TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION", "CROSS_RANK"}
_launched = _MARKS & os.environ.keys()
_launcher: int | None = os.getppid() if _launched else None


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


def stop_requested() -> bool:
    """Whether this process was told to stop, or is the orphan of a launcher that was killed."""
    return (
        _received is not None
        or (_stop_file is not None and _stop_file.exists())
        or (_launcher is not None and os.getppid() != _launcher)
    )


def exit_code() -> int:
    """The code of a run that saved and stopped: 128 + signal, 0 for a STOP file (which is used up)."""
    if _stop_file is not None:
        _stop_file.unlink(missing_ok=True)
    return 0 if _received is None else 128 + _received
