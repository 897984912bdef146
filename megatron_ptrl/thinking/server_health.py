"""What is known of each server that answers requests: how busy it is, and when it is worth another try.

One that fails three times in a row is out for a second, twice as long after each further failure, up to half a minute;
then one request tries it. One that has said nothing but status 500 since the start is broken, not busy.
"""

import asyncio
from urllib.parse import urlsplit

FAILURES_UNTIL_OUT = 3
# Seven seconds, where each comes at once.
FAILURES_UNTIL_BROKEN = 6
LONGEST_PAUSE = 30.0


class Server:
    """One server."""

    def __init__(self, url: str, limit: int) -> None:
        self.url = url if urlsplit(url).path.strip("/") else url.rstrip("/") + "/v1"
        self.url = self.url.rstrip("/")
        self.limit = limit
        self.in_flight = 0
        self.failures = 0
        self.answered = False
        self.breaks = False
        """Whether its last failure was status 500: what is loading is not there, or says 503."""
        self.accepts = False
        """Whether it has taken a request with these settings, so that what it refuses is the document."""
        self.asking = asyncio.Lock()
        self.out_since = self.in_again = 0.0

    @property
    def broken(self) -> bool:
        """Whether it has answered nothing but errors since the start."""
        return self.breaks and not self.answered and self.failures >= FAILURES_UNTIL_BROKEN

    def room(self, now: float) -> bool:
        """Whether it takes one more request."""
        return now >= self.in_again and self.in_flight < (1 if self.failures >= FAILURES_UNTIL_OUT else self.limit)

    def fail(self, started: float, now: float) -> None:
        """A request that was sent at `started` has failed in a way that speaks against the server."""
        if self.failures >= FAILURES_UNTIL_OUT and started < self.out_since:
            return  # sent before it went out, so nothing new
        self.failures += 1
        if self.failures >= FAILURES_UNTIL_OUT:
            self.out_since = now
            self.in_again = now + min(LONGEST_PAUSE, 2.0 ** min(self.failures - FAILURES_UNTIL_OUT, 10))
