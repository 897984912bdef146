"""E-mail addresses and public IP addresses -> stand-ins, by datatrove's expressions.

Its block takes stand-ins in turn, so that what a document gets depends on those before it; here it is always the same.
"""

import re
from collections.abc import Iterator

from datatrove.pipeline.formatters.pii import PIIFormatter

EMAIL, IP = "email@example.com", "22.214.171.124"
# Longer than any address (RFC 5321: 64 before the sign, 255 behind it).
_REACH = 320

# Part of all that datatrove's expression finds, which begins with a choice and is slow at saying no. It begins with a
# character of its own, which is looked for fastest.
_MAYBE_IP = re.compile(r"\.[0-9]{1,3}\.[0-9]{1,3}\.[0-9]")

_formatter = PIIFormatter(email_replacement=EMAIL, ip_replacement=IP)


def mask(text: str) -> str:
    """`text` with the stand-ins."""
    if "@" in text:
        text = "".join(_masked_emails(text))
    return _formatter.ip_replacer.replace(text) if _MAYBE_IP.search(text) else text


def _masked_emails(text: str) -> Iterator[str]:
    """Pieces of `text`. The expression is tried near the signs only: on a long run without one it takes for ever."""
    done = 0
    while (sign := text.find("@", done)) >= 0:
        begin = max(sign - _REACH, done)
        end = sign + _REACH
        # An address that begins within reach of this one is not cut in two.
        while 0 <= (further := text.find("@", sign + 1, end + _REACH)):
            sign, end = further, further + _REACH
        yield text[done:begin]
        yield _formatter.emails_replacer.replace(text[begin:end])
        done = end
    yield text[done:]
