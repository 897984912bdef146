"""The one exception that means "the input is wrong", told in one line."""


class InputError(ValueError):
    """What was wrong, where, what was expected, what to do. The command line prints it without a traceback."""

    rank: int | None = None
    """The rank that found it, where the others may not have."""
