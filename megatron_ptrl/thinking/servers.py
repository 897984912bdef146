"""OpenAI-compatible servers behind the seam: load spread over them, the sick ones left out until they are well.

    generate  ->  _acquire (the least busy server that is in)  ->  POST /chat/completions  ->  Reply
        ^                                                              |
        +---- wait, then another attempt  <---- what may pass --------+----> what will not: GenerationError

A server that fails is left out for a while (server_health.py); then one request tries it. No probe of its own:
/v1/models may fail on a server that generates, and succeed on one that does not.

The API key is in no attribute that is printed, no exception and no reply: whatever a server says has it struck out. It
goes to no other host: redirects are not followed, and proxies of the environment not used.
"""

import asyncio
import html
import json
import os
import random
from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import Any
from urllib.parse import quote

import aiohttp

from megatron_ptrl.config import ServerConfig
from megatron_ptrl.thinking.generators import GenerationError, GeneratorUnusable, Reply, Request
from megatron_ptrl.thinking.server_health import LONGEST_PAUSE, Server

# A server that is only too busy says so as often as it likes, but not to one document for ever.
BUSY_PER_ATTEMPT = 20
# Far beyond any thinking, and 64 of them at a time still fit into a machine.
LONGEST_REPLY = 1 << 24
# What is shorter ("EMPTY", "token") stands in for a key, and may well be a word of the thinking.
SHORTEST_SECRET = 12
END_OF_THINKING = "</think>"
_ABSENT = "no connection"


class _Failed(Exception):
    """One attempt had no reply.

    counts: it is one of the document's attempts     sick: it speaks against the server
    pause: seconds that the server asks for     breaks: what is loading does not say such a thing
    """

    def __init__(
        self,
        reason: str,
        detail: str,
        *,
        counts: bool = True,
        sick: bool = True,
        pause: float | None = None,
        breaks: bool = False,
    ) -> None:
        super().__init__(detail)
        self.reason, self.detail, self.counts, self.sick, self.pause = reason, detail, counts, sick, pause
        self.breaks = breaks


class Servers:
    """Chat completions from a list of servers, all with the same model."""

    name = "openai"

    def __init__(self, urls: Sequence[str], config: ServerConfig) -> None:
        if not urls:
            raise GeneratorUnusable("servers is empty; expected URLs such as http://localhost:8000/v1")
        self.counts: Counter[str] = Counter()
        """Attempts that failed, by reason."""
        self._config = config
        self._model = config.model
        self._servers = [Server(url, config.in_flight) for url in urls]
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._key = os.environ.get(config.api_key_env, "").strip()
        if not self._key.isprintable() or not self._key.isascii():
            raise GeneratorUnusable(f"the environment variable {config.api_key_env} holds what no HTTP header may")
        self._spellings = _spellings(self._key)
        self._session: aiohttp.ClientSession | None = None
        self._asking_model = asyncio.Lock()
        self._last_reply = self._idle_since = 0.0
        self._asking = 0
        self._last_failure = "none has been asked"

    async def model_name(self) -> str:
        """The model's name as the servers know it."""
        return self._model or await self._ask_model()

    async def generate(self, request: Request) -> Reply:
        """The reply of one of the servers, after as many attempts as it takes and the settings allow."""
        loop = asyncio.get_running_loop()
        if not self._asking:
            self._last_reply += loop.time() - self._idle_since  # nobody waited meanwhile
        self._asking += 1
        try:
            return await self._generate(request)
        finally:
            self._asking -= 1
            self._idle_since = loop.time()

    async def _generate(self, request: Request) -> Reply:
        model = await self.model_name()
        body = {
            "model": model,
            "messages": request.messages,
            "max_tokens": request.max_tokens,
            "temperature": request.temperature,
            "top_p": request.top_p,
            "seed": request.seed,
            **({"stop": request.stop} if request.stop else {}),
            **self._config.extra_body,
        }
        payload = json.dumps(body).encode()
        attempts = busy = 0
        while True:
            server = await self._acquire()
            try:
                return _reply(await self._post(server, payload), model, request.stop, self._struck_from_reply)
            except _Failed as failed:
                self.counts[failed.reason] += 1
                attempts += failed.counts
                busy += not failed.counts
                tries = attempts if failed.counts else min(busy, 6)
                if attempts >= self._config.attempts or busy >= BUSY_PER_ATTEMPT * self._config.attempts:
                    raise GenerationError(
                        failed.reason, f"{failed.detail}, after {attempts + busy} requests", retryable=True
                    ) from None
                wait = min(LONGEST_PAUSE, self._config.backoff * 2 ** (tries - 1)) * random.uniform(0.5, 1.5)
                await self._pause(wait)

    async def _pause(self, seconds: float) -> None:
        """Wait before another attempt, but not beyond the patience."""
        loop = asyncio.get_running_loop()
        end = loop.time() + seconds
        while (now := loop.time()) < end:
            await asyncio.sleep(min(end - now, self._check_patience(now)))

    async def close(self) -> None:
        """Close the connections."""
        if self._session is not None:
            await self._session.close()

    def _open(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._last_reply = asyncio.get_running_loop().time()
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0),
                timeout=aiohttp.ClientTimeout(total=self._config.timeout, sock_connect=LONGEST_PAUSE),
                # A packed body can be a thousand times as long as what was read of it.
                auto_decompress=False,
                headers={
                    "Content-Type": "application/json",
                    "Accept-Encoding": "identity",
                    **({"Authorization": f"Bearer {self._key}"} if self._key else {}),
                },
            )
        return self._session

    async def _ask_model(self) -> str:
        """The first model of the first server that names one; servers that are not up yet are waited for."""
        loop = asyncio.get_running_loop()
        async with self._asking_model:
            deadline = loop.time() + self._config.patience
            while self._model is None:
                said = [await self._model_of(server) for server in self._servers]
                self._model = next((name for name, _ in said if name), None)
                if self._model is None and (loop.time() > deadline or any(why != _ABSENT for _, why in said)):
                    raise GeneratorUnusable(
                        f"no server tells its model's name (at {self._servers[0].url}/models: {said[0][1]}); "
                        "start one, or set server.model"
                    )
                if self._model is None:
                    left = max(deadline - loop.time(), 0.05)
                    await asyncio.sleep(min(LONGEST_PAUSE, self._config.patience / 10, left))
        return self._model

    async def _model_of(self, server: Server) -> tuple[str | None, str]:
        """The name, or why there is none."""
        limit = aiohttp.ClientTimeout(total=LONGEST_PAUSE)
        try:
            async with self._open().get(server.url + "/models", timeout=limit, allow_redirects=False) as response:
                status, content = response.status, await _body(response)
            return self._struck_from_reply(str(json.loads(content)["data"][0]["id"])), ""
        except aiohttp.ClientConnectorError:
            return None, _ABSENT
        except (aiohttp.ClientError, TimeoutError, asyncio.TimeoutError) as error:
            return None, type(error).__name__
        except (_Failed, ValueError, LookupError, TypeError, RecursionError):
            return None, f"status {status} and no list of models"

    async def _acquire(self) -> Server:
        loop = asyncio.get_running_loop()
        self._open()
        while True:
            now = loop.time()
            ready = [server for server in self._servers if server.room(now)]
            if ready:
                server = min(ready, key=lambda server: server.in_flight)
                server.in_flight += 1
                return server
            left = self._check_patience(now)
            turn = loop.create_future()
            self._waiting.append(turn)
            soonest = min(max(server.in_again - now, 0.0) for server in self._servers)
            # A server that is in but full wakes the next in line itself.
            try:
                await asyncio.wait([turn], timeout=min(max(soonest, 0.05) if soonest else 1.0, left))
            finally:  # cancelled, it must take no other's turn
                if turn in self._waiting:
                    self._waiting.remove(turn)

    def _check_patience(self, now: float) -> float:
        """Seconds until it may be over. Raises GeneratorUnusable when it is."""
        silent, config = now - self._last_reply, self._config
        told = f"the last failure being: {self._last_failure}; what is done is kept, repeat the command when one is up"
        if all(server.broken for server in self._servers):
            raise GeneratorUnusable(f"no server has ever answered with anything but an error, {told}")
        # What is still being written is waited for, once: of several sick servers one is always being tried.
        in_flight = any(server.in_flight for server in self._servers)
        if silent > config.patience + (config.timeout if in_flight else 0.0):
            raise GeneratorUnusable(
                f"no server has answered for {silent:.0f} s (server.patience {config.patience:g}), {told}"
            )
        return config.patience - silent + 0.05 if silent <= config.patience else 1.0

    def _release(self, server: Server) -> None:
        server.in_flight -= 1
        if self._waiting:
            self._waiting.popleft().set_result(None)

    async def _post(self, server: Server, payload: bytes) -> dict[str, Any]:
        """The JSON object of a 200. Raises _Failed, GenerationError (400) or GeneratorUnusable; releases the server."""
        loop = asyncio.get_running_loop()
        started = loop.time()
        try:
            return await self._exchange(server, payload)
        except GenerationError:
            await self._check_settings(server, payload)
            raise
        except _Failed as failed:
            self._last_failure = f"{server.url}: {failed.detail}"
            server.breaks = failed.breaks
            if failed.sick:
                server.fail(started, loop.time())
            if failed.pause:
                server.in_again = max(server.in_again, loop.time() + min(failed.pause, 2 * LONGEST_PAUSE))
            raise
        finally:
            self._release(server)

    async def _check_settings(self, server: Server, refused: bytes) -> None:
        """Raise GeneratorUnusable where the server would refuse a short question too: a model that it does not have, a
        field that it does not know or more tokens than it can write would put the whole corpus aside.
        """
        async with server.asking:
            if server.accepts:
                return
            question = json.loads(refused) | {"messages": [{"role": "user", "content": "What is thinking?"}]}
            try:
                await self._exchange(server, json.dumps(question).encode())
            except GenerationError as error:
                raise GeneratorUnusable(
                    f"{server.url}/chat/completions refuses even a short question with {error.detail}; check "
                    "server.model, server.extra_body and sampling"
                ) from None

    async def _exchange(self, server: Server, payload: bytes) -> dict[str, Any]:
        try:
            url = server.url + "/chat/completions"
            async with self._open().post(url, data=payload, allow_redirects=False) as response:
                status, content = response.status, await _body(response)
                pause = _seconds(response.headers.get("Retry-After"))
        except aiohttp.ConnectionTimeoutError:
            raise _Failed("server_error", f"no connection within {LONGEST_PAUSE:g} s", counts=False) from None
        except (TimeoutError, asyncio.TimeoutError):
            raise _Failed("timeout", f"no reply within {self._config.timeout:g} s") from None
        except aiohttp.ClientConnectorError as error:
            raise _Failed("server_error", f"no connection: {error.strerror or 'refused'}", counts=False) from None
        except (aiohttp.ClientError, OSError) as error:
            raise _Failed("server_error", f"connection lost: {type(error).__name__}") from None
        said = f"status {status}: {self._struck(content)}"
        if status == 429:
            raise _Failed("server_error", said, counts=False, sick=False, pause=pause)
        if status in (400, 413, 422):
            self._heard(server)
            raise GenerationError("bad_request", said)
        passing = status >= 500 or status in (408, 409, 425)
        # What worked before may be a gateway's hiccup, a key that was taken back is none.
        if passing or (status != 200 and server.answered and status not in (401, 403)):
            raise _Failed("server_error", said, pause=pause, breaks=status == 500)
        if status != 200:
            raise GeneratorUnusable(
                f"{server.url}/chat/completions answers with {said}; check the URL, server.model and "
                f"the environment variable {self._config.api_key_env}"
            )
        self._heard(server)
        server.accepts = True
        try:
            reply = json.loads(content)
        except (ValueError, RecursionError):
            reply = None
        if not isinstance(reply, dict):
            raise _Failed("malformed_reply", f"not a JSON object: {self._struck(content)!r}", sick=False)
        return reply

    def _heard(self, server: Server) -> None:
        server.answered, server.failures = True, 0
        self._last_reply = asyncio.get_running_loop().time()

    def _struck(self, content: bytes) -> str:
        """What a server said, without the key and not too long for an error."""
        said = content.decode("utf-8", "replace")
        try:
            # Any letter of the key may have come as its number.
            said = json.dumps(json.loads(said), ensure_ascii=False)
        except (ValueError, RecursionError):
            pass
        return self._strike(said)[:300]

    def _strike(self, said: str) -> str:
        for spelling in self._spellings:
            said = said.replace(spelling, "***")
        return said

    def _struck_from_reply(self, said: str) -> str:
        return self._strike(said) if len(self._key) >= SHORTEST_SECRET else said


def _spellings(key: str) -> list[str]:
    """The key as it is and as JSON, JSON within JSON, HTML and URLs have it, the longest first."""
    once = json.dumps(key)[1:-1]
    spelt = {key, once, json.dumps(once)[1:-1], html.escape(key), quote(key), quote(key, safe="")}
    spelt |= {spelling.replace("/", "\\/") for spelling in spelt}
    return sorted(spelt - {""}, key=len, reverse=True)


async def _body(response: aiohttp.ClientResponse) -> bytes:
    """All that follows the headers. Raises _Failed for more than a reply can be."""
    body = bytearray()
    while chunk := await response.content.readany():
        body += chunk
        if len(body) > LONGEST_REPLY:
            raise _Failed("malformed_reply", f"a body of more than {LONGEST_REPLY >> 20} MB", sick=False)
    return bytes(body)


def _seconds(header: str | None) -> float | None:
    try:
        return float(header) if header else None
    except ValueError:
        return None  # a date, which only a proxy would send


def _reply(body: dict[str, Any], model: str, stop: list[str], strike: Callable[[str], str]) -> Reply:
    try:
        choice = body["choices"][0]
        message = choice["message"]
        # vLLM has called it by either name.
        thinking = message.get("reasoning_content") or message.get("reasoning") or None
        text = message.get("content") or ""
        usage = body.get("usage")
        usage = usage if isinstance(usage, dict) else {}
        for part in (text, thinking or ""):
            part.encode("utf-8")
        # The stop string is cut off; vLLM and SGLang say which one it was.
        stopped = choice.get("stop_reason") or choice.get("matched_stop")
        if stopped == END_OF_THINKING and stopped in stop and thinking is None and stopped not in text:
            text += END_OF_THINKING
        # `transformers serve` leaves it where it is, with the rest of its last token.
        for end in (end for end in stop if end != END_OF_THINKING):
            text = text.partition(end)[0]
            thinking = thinking and thinking.partition(end)[0]
        return Reply(
            strike(text),
            strike(str(choice.get("finish_reason") or "unknown")),
            _count(usage.get("prompt_tokens")),
            _count(usage.get("completion_tokens")),
            strike(str(body.get("model") or model)),
            None if thinking is None else strike(thinking),
        )
    except (LookupError, TypeError, AttributeError, UnicodeEncodeError) as error:
        raise _Failed("malformed_reply", f"not a chat completion ({type(error).__name__})", sick=False) from None


def _count(said: Any) -> int | None:
    """A number of tokens, if it is one."""
    return int(said) if type(said) in (int, float) and 0 <= said < 2**53 else None
