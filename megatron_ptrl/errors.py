"""The one exception that means "the input is wrong", told in one line; and what the disk refuses, told alike."""

import errno

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Of an OSError that means there is no more room: on the disk, in a quota, in one file."""

DENIED = (errno.EACCES, errno.EPERM, errno.EROFS)
"""Of an OSError that means this user may not read or write the file that it names."""


class InputError(ValueError):
    """What was wrong, where, what was expected, what to do. The command line prints it without a traceback.

    `str` of it is one line that a terminal shows and does not obey, whatever the input holds that it quotes.
    """

    rank: int | None = None
    """The rank that found it, where the others may not have."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


def printable(text: str) -> str:
    """`text` with what is no character to look at, such as line ends and escapes of a terminal, as `repr` writes it."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)
