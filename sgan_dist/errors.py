"""What is meant for the person who runs the program: errors to mend, and words."""


class UserError(Exception):
    """Something the user can mend: the message is one clear sentence with the fix.

    Scripts print it without a traceback and exit with 2.
    """


class Outage(UserError):
    """What may be over later, as a network that is away is: the same command is worth another try."""


class NonFiniteLoss(UserError):
    """A loss or a gradient became NaN or infinite; raised before the optimizer step, on every rank."""


def plural(number: int, noun: str) -> str:
    """`1 shard`, `2 shards`, `2 processes`."""
    return f"{number} {noun}{('es' if noun.endswith('s') else 's') * (number != 1)}"
