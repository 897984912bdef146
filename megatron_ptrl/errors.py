"""The one exception that means "the input is wrong", told in one line; and a full disk, told alike."""

import errno

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Of an OSError that means there is no more room: on the disk, in a quota, in one file."""


class InputError(ValueError):
    """What was wrong, where, what was expected, what to do. The command line prints it without a traceback."""

    rank: int | None = None
    """The rank that found it, where the others may not have."""
