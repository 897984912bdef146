"""The one exception that means "the input is wrong", told in one line; and what the disk refuses, told alike."""

import errno

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Of an OSError that means there is no more room: on the disk, in a quota, in one file."""

DENIED = (errno.EACCES, errno.EPERM, errno.EROFS)
"""Of an OSError that means this user may not read or write the file that it names."""


class InputError(ValueError):
    """What was wrong, where, what was expected, what to do. The command line prints it without a traceback."""

    rank: int | None = None
    """The rank that found it, where the others may not have."""
