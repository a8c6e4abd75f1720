"""What a command prints: lines of a log on stderr, and output whose reader may end."""

from __future__ import annotations

import contextlib
import errno
import io
import logging
import os
import sys
from collections.abc import Iterator

from sgan_dist.parallel import launcher


def set_up_logging() -> None:
    """Sends the package's log to stderr."""
    logger = logging.getLogger("sgan_dist")
    logger.handlers = [_Handler()]
    logger.propagate = False
    logger.setLevel(logging.INFO)


def outlive_readers() -> None:
    """Lets a run continue where nobody reads its output any more, or where that is closed."""
    for number, name in ((1, "stdout"), (2, "stderr")):
        try:
            os.fstat(number)
        except OSError:  # `2>&-`: the next file would take its place
            os.dup2(os.open(os.devnull, os.O_WRONLY), number)
        stream = getattr(sys, name)
        if stream is None or stream is getattr(sys, f"__{name}__"):
            raw = open(number, "wb", closefd=False)
            setattr(sys, name, _Output(raw, write_through=number == 2, line_buffering=True))


class _Handler(logging.Handler):
    """Plain lines on stderr, above a progress bar: all those of rank 0, warnings of other ranks."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        if launcher.is_main_process(os.environ) or record.levelno >= logging.WARNING:
            tqdm.write(self.format(record), file=sys.stderr)
            sys.stderr.flush()


class _Output(io.TextIOWrapper):
    """Standard output or error, which a command outlives: its reader may end, as `head` does."""

    def write(self, text: str) -> int:
        with self._surviving():
            return super().write(text)
        return len(text)

    def flush(self) -> None:
        with self._surviving():
            super().flush()

    @contextlib.contextmanager
    def _surviving(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):  # a pipe, a terminal
                raise
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)
