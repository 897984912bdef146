"""Requests to servers that all hold the same weights: the least busy one is asked, again where that may help.

    request --acquire--> a server that is in --ask--> reply
                                 |
                                 +--> 429, 5xx, no reply in time: another attempt, later
                                 +--> connection lost: is it up, with the same weights? else it is out
                                 +--> anything else: InputError

A server that was restarted has the weights that it was started with, so one that was lost stays out until it says that
it has those that it was given last, or is given new ones.
"""

import asyncio
import json
import os
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import aiohttp

from megatron_ptrl.config import RolloutServerConfig
from megatron_ptrl.errors import InputError

LONGEST_PAUSE = 30.0


class Failed(Exception):
    """A request brought no reply, and another one may."""


class Lost(Failed):
    """The server is not there, or is another process than before."""


class Server:
    """One of the servers."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        self.out: str | None = None
        """Why nothing is asked of it."""
        self.in_flight = 0


class Fleet:
    """The servers, as one rank knows them. `opened` for a series of requests, within one event loop."""

    def __init__(self, urls: Sequence[str], config: RolloutServerConfig) -> None:
        self.servers = [Server(url) for url in urls]
        self.failures = 0
        """Requests that had to be repeated."""
        self._config = config
        self._key = os.environ.get(config.api_key_env, "").strip()
        if not self._key.isprintable() or not self._key.isascii():
            raise InputError(f"the environment variable {config.api_key_env} holds what no HTTP header may")

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[None]:
        """Connections for the requests within."""
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        timeout = aiohttp.ClientTimeout(total=self._config.timeout, sock_connect=LONGEST_PAUSE)
        self._changed = asyncio.Condition()
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout, headers=headers) as self._session:
            yield

    async def ask(self, server: Server, path: str, body: dict[str, Any] | None = None) -> Any:
        """The JSON of the reply, None for an empty one; POST with a body, GET without.

        Raises Lost, Failed, or InputError for a reply that no repetition would change.
        """
        method, where = "GET" if body is None else "POST", server.url + path
        try:
            async with self._session.request(method, where, json=body, allow_redirects=False) as reply:
                status, content = reply.status, await reply.read()
        except (TimeoutError, asyncio.TimeoutError):
            raise Failed(f"{where}: no reply within {self._config.timeout:g} s") from None
        except (aiohttp.ClientError, OSError) as error:
            raise Lost(f"{where}: no connection ({type(error).__name__})") from None
        said = content.decode("utf-8", "replace")
        shown = (said.replace(self._key, "***") if self._key else said)[:300]
        if status == 429 or status >= 500 or status in (408, 425):
            raise Failed(f"{where}: status {status}: {shown}")
        if status != 200:
            raise InputError(f"{where} answers with status {status}: {shown}")
        if not said.strip():
            return None
        try:
            return json.loads(said)
        except ValueError:
            raise Failed(f"{where}: not JSON: {shown!r}") from None

    async def ask_any(
        self, path: str, body: dict[str, Any], confirm: Callable[[Server], Awaitable[str | None]]
    ) -> tuple[Any, Server]:
        """The reply of one of the servers that are in.

        confirm: why a server that was lost is not to be asked any more, or None
        Raises InputError when no server is left, or after so many attempts as the settings allow.
        """
        attempt = 0
        while True:
            server = await self._acquire()
            try:
                return await self.ask(server, path, body), server
            except Failed as failed:
                self.failures += 1
                attempt += 1
                if isinstance(failed, Lost) and server.out is None:
                    server.out = await confirm(server)
                if attempt >= self._config.attempts and any(s.out is None for s in self.servers):
                    raise InputError(f"{failed}; given up after {attempt} attempts") from None
            finally:
                server.in_flight -= 1
                async with self._changed:
                    self._changed.notify_all()
            await asyncio.sleep(self.pause(attempt))

    def pause(self, attempt: int) -> float:
        """Seconds to wait after a number of attempts that failed."""
        return min(LONGEST_PAUSE, self._config.backoff * 2.0 ** (attempt - 1)) * random.uniform(0.5, 1.5)

    async def _acquire(self) -> Server:
        async with self._changed:
            while True:
                known = [server for server in self.servers if server.out is None]
                if not known:
                    reasons = "; ".join(f"{server.url}: {server.out}" for server in self.servers)
                    raise InputError(f"no server is left to ask ({reasons}); see to them, and start the same command")
                server = min(known, key=lambda server: server.in_flight)
                if server.in_flight < self._config.in_flight:
                    server.in_flight += 1
                    return server
                await self._changed.wait()
