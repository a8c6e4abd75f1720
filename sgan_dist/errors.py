"""Errors that a user can act on, and the wording that they share."""


class UserError(Exception):
    """Something the user can fix. The message is one clear sentence that says how.

    Commands print it without a traceback and exit with 2.
    """


class TransientError(UserError):
    """A UserError that may pass by itself, such as an unreachable server: retry the same command.

    Commands exit with 75 (EX_TEMPFAIL).
    """


class NonFiniteLoss(UserError):
    """A loss or gradient became NaN or infinite, and its update was left out. Raised on every rank."""


class OutOfMemory(UserError):
    """The GPU's memory is used up. Raised on this rank alone: the others may wait for it."""


class StopRequested(Exception):
    """The run was asked to stop, and has saved a checkpoint: the same call resumes it.

    `by_hand`: by the file STOP, so a batch script must not start it again.
    """

    def __init__(self, reason: str, by_hand: bool) -> None:
        super().__init__(reason)
        self.by_hand = by_hand


def plural(number: int, noun: str) -> str:
    """`1 shard`, `2 shards`, `2 processes`."""
    return f"{number} {noun}{('es' if noun.endswith('s') else 's') * (number != 1)}"
