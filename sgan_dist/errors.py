"""The errors that are meant for the person who runs the program."""


class UserError(Exception):
    """Something the user can mend: the message is one clear sentence with the fix.

    Scripts print it without a traceback and exit with 2.
    """


class NonFiniteLoss(UserError):
    """A loss or a gradient became NaN or infinite; raised before the optimizer step, on every rank."""
