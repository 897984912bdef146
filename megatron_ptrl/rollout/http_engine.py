"""Servers with a copy of the weights as the rollout engine. One rank of each model-parallel group speaks to them.

    generate:  requests --that rank, many at a time--> responses --broadcast--> the ranks of its group
    sync:      export --rank 0--> a new folder --> every server loads it --probe--> or the run stops

The probe is the log-probabilities of a fixed text, by each server and by the trainer. A mean distance above
`probe_tolerance` is another model. A server that says the same to the last bit while the trainer has moved on has not
taken the weights, however close it still is.
"""

import asyncio
import logging
import math
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
from megatron.core import parallel_state

from megatron_ptrl.config import RolloutServerConfig
from megatron_ptrl.errors import InputError
from megatron_ptrl.rollout.engine import Generation, Request, check_request
from megatron_ptrl.rollout.http_api import Api, Malformed, Reply
from megatron_ptrl.rollout.http_fleet import Failed, Fleet, Server
from megatron_ptrl.rollout.weight_folders import WeightFolders

logger = logging.getLogger(__name__)

T = TypeVar("T")
OnDone = Callable[[int, Generation], None]

MOVED = 1e-3
"""Nats by which a token's log-probability by the trainer has to change for an unchanged server to be a stale one."""
COLD = 0.01
"""A temperature, and a top_p, under which a token that is drawn has a probability near 1."""


class HttpEngine:
    """A `RolloutEngine` on servers of the kind that `api` knows.

    window: tokens of prompt and response together   eod: ends a response   vocab_size: of the tokenizer
    weights: folder in which each version gets a folder of its own
    probe_ids: the fixed text   score: the trainer's log-probabilities of all its tokens but the first, on all ranks

    trains: with a temperature or top_p other than 1, refuse a server that reports probabilities without them

    Raises InputError for what no repetition can change; the same on all ranks of the group, or of the run in `sync`.
    """

    def __init__(
        self,
        api: Api,
        urls: Sequence[str],
        config: RolloutServerConfig,
        *,
        window: int,
        eod: int,
        vocab_size: int,
        weights: Path,
        probe_ids: list[int],
        score: Callable[[list[int]], list[float]],
        trains: bool,
    ) -> None:
        self.name = api.name
        self.weight_version = 0
        self._api, self._config = api, config
        self._fleet = Fleet(urls, config)
        self._window, self._eod, self._vocab_size = window, eod, vocab_size
        self._folders = WeightFolders(weights)
        # Twice, because a prompt may be a single token; vLLM writes one more behind the text.
        self._probe_ids, self._score = (probe_ids * 2)[: min(config.probe_tokens, window - 1)], score
        self._named: str | None = None
        """The version as servers know it; None before the first one."""
        self._seen: dict[str, tuple[list[float], list[float]]] = {}
        """By URL: the probe by the server and by the trainer, when the server's last changed."""
        self._trains, self._as_drawn = trains, {(1.0, 1.0)}

    def generate(
        self, requests: Sequence[Request], *, temperature: float, top_p: float, on_done: OnDone | None = None
    ) -> list[Generation]:
        """As `RolloutEngine.generate`. Temperature 0 gives each token a log-probability of 0.

        Raises InputError, on all ranks of the group, when a response cannot be had.
        """
        if not temperature >= 0 or not 0 < top_p <= 1:
            raise InputError(f"temperature {temperature}, top_p {top_p}; expected temperature >= 0 and 0 < top_p <= 1")
        for number, request in enumerate(requests):
            check_request(number, request, self._window, self._vocab_size)
        speaks = dist.get_rank() == parallel_state.get_model_parallel_src_rank()
        told = on_done if speaks else None
        work = partial(self._ask_for_all, requests, temperature, top_p, told)
        source, group = parallel_state.get_model_parallel_src_rank(), parallel_state.get_model_parallel_group()
        found = _share(lambda: self._in_time(work), source, group)
        if on_done is not None and not speaks:
            for number, generation in enumerate(found):
                on_done(number, generation)
        return found

    def sync(self, version: int, export: Callable[[Path], None]) -> None:
        """Have `export` write the weights, all servers load them, and make sure that they did. Collective over all.

        A server that cannot be reached is left out from now on; one that answers wrongly stops the run.
        """
        partial_folder = _share(lambda: self._folders.begin(version), 0, None)
        problem: list[str] = []
        try:
            export(partial_folder)
        except InputError as error:
            problem.append(str(error))
        expected = self._score(self._probe_ids)

        def hand_over() -> tuple[str, dict[str, str | None]]:
            if problem:
                raise InputError(problem[0])
            folder = self._folders.finish(partial_folder)
            self._in_time(partial(self._load_everywhere, folder, expected))
            return folder.name, {server.url: server.out for server in self._fleet.servers}

        before = {server.url: server.out for server in self._fleet.servers}
        self._named, states = _share(hand_over, 0, None)
        for server in self._fleet.servers:
            server.out = states[server.url]
            if server.out != before[server.url] and dist.get_rank() == 0:
                logger.warning("%s is %s", server.url, f"left out: {server.out}" if server.out else "back")
        self.weight_version = version

    def close(self) -> None:
        """Connections are open during calls only."""

    def _in_time(self, work: Callable[[], Awaitable[T]]) -> T:
        """The result of `work` within the deadline."""

        async def run() -> T:
            async with self._fleet.opened():
                return await asyncio.wait_for(work(), self._config.deadline)

        try:
            return asyncio.run(run())
        except (TimeoutError, asyncio.TimeoutError):
            raise InputError(
                f"the {self.name} servers took longer than rollout.server.deadline {self._config.deadline:g} s"
            ) from None

    async def _ask_for_all(
        self, requests: Sequence[Request], temperature: float, top_p: float, on_done: OnDone | None
    ) -> list[Generation]:
        if self._trains and (temperature, top_p) not in self._as_drawn and temperature > 0:
            await self._check_as_drawn(requests[0].prompt_ids, temperature, top_p)

        async def one(number: int) -> Generation:
            generation = await self._ask_for(number, requests[number], temperature, top_p)
            if on_done is not None:
                on_done(number, generation)
            return generation

        return await _all_or_none([one(number) for number in range(len(requests))])

    async def _ask_for(self, number: int, request: Request, temperature: float, top_p: float) -> Generation:
        room = self._window - len(request.prompt_ids)
        request = Request(request.prompt_ids, min(request.max_tokens, room), request.seed)
        body = self._api.generation(request, temperature, top_p, self._eod)
        for _ in range(self._config.attempts):
            told, server = await self._fleet.ask_any(self._api.generate_path, body, self._confirm)
            where = f"request {number}, answered by {server.url}"
            try:
                reply = self._api.read(told)
            except Malformed as error:
                raise InputError(f"{where}: {error}") from None
            if reply.finish_reason in ("stop", "length"):
                self._check(where, request, reply)
                logprobs = [0.0] * len(reply.token_ids) if temperature == 0 else reply.logprobs
                return Generation(reply.token_ids, logprobs, reply.finish_reason)
        raise InputError(f"{where}: finish_reason {reply.finish_reason} each time; expected stop or length")

    def _check(self, where: str, request: Request, reply: Reply) -> None:
        ids, count = reply.token_ids, len(reply.token_ids)
        if reply.version not in (None, self._named):
            raise InputError(
                f"{where}: it was written with weights {reply.version!r}, and the server was given {self._named!r}"
            )
        if len(reply.logprobs) != count or not all(_is_logprob(value) for value in reply.logprobs):
            raise InputError(
                f"{where}: {count} tokens with log-probabilities {str(reply.logprobs)[:200]}; expected one number of "
                "at most 0 for each"
            )
        if not all(isinstance(token, int) and 0 <= token < self._vocab_size for token in ids):
            raise InputError(f"{where}: token ids {str(ids)[:200]}; expected ids from 0 to {self._vocab_size - 1}")
        if count > request.max_tokens or self._eod in ids[:-1]:
            raise InputError(
                f"{where}: {count} tokens, {self._eod} at {ids.index(self._eod) if self._eod in ids else 'none'}; "
                f"expected at most {request.max_tokens}, and the end-of-document token {self._eod} nowhere but last"
            )
        if reply.finish_reason == "stop" and ids[-1] != self._eod:
            raise InputError(
                f"{where}: it stopped at token {ids[-1]}; expected the end-of-document token {self._eod}: start the "
                "server from a folder whose config.json and generation_config.json have that as eos_token_id"
            )

    async def _confirm(self, server: Server) -> str | None:
        try:
            version = await self._api.version(partial(self._fleet.ask, server))
        except (Failed, Malformed, InputError) as error:
            return str(error)
        return None if version == self._named else f"it came back with weights {version!r}, not {self._named!r}"

    async def _load_everywhere(self, folder: Path, expected: list[float]) -> None:
        await _all_or_none([self._load(server, folder, expected) for server in self._fleet.servers])
        if all(server.out for server in self._fleet.servers):
            reasons = "; ".join(str(server.out) for server in self._fleet.servers)
            raise InputError(
                f"no server could be given the weights ({reasons}); start one with the model in {folder}, then "
                "the same command"
            )

    async def _load(self, server: Server, folder: Path, expected: list[float]) -> None:
        ask = partial(self._fleet.ask, server)
        server.out = None
        for attempt in range(1, self._config.attempts + 1):
            try:
                await self._api.load(ask, str(folder.resolve()), folder.name)
                version = await self._api.version(ask)
                found = self._api.read_scores(
                    await ask(self._api.generate_path, self._api.scoring(self._probe_ids)), self._probe_ids
                )
                break
            except Failed as failed:
                server.out = str(failed)
                if attempt < self._config.attempts:
                    await asyncio.sleep(self._fleet.pause(attempt))
            except Malformed as error:
                raise InputError(f"{server.url}: after it was given the weights: {error}") from None
        else:
            return
        server.out = None
        if version != folder.name:
            raise InputError(f"{server.url} has weights {version!r} after it was given {folder.name!r}")
        self._check_probe(server.url, found, expected)

    def _check_probe(self, url: str, found: list[float], expected: list[float]) -> None:
        if not all(_is_logprob(value) for value in found):
            raise InputError(f"{url}: the probe's log-probabilities are {str(found)[:200]}; expected numbers below 0")
        away = sum(abs(a - b) for a, b in zip(found, expected, strict=True)) / len(found)
        if not away <= self._config.probe_tolerance:
            raise InputError(
                f"{url}: its log-probabilities of a text are {away:.3g} nats from the trainer's on average, more than "
                f"rollout.server.probe_tolerance {self._config.probe_tolerance:g}: other weights, or another model"
            )
        before, trainers = self._seen.get(url, ([], []))
        if before != found:
            self._seen[url] = (found, expected)
        elif (moved := max(abs(a - b) for a, b in zip(trainers, expected, strict=True))) > MOVED:
            raise InputError(
                f"{url}: its log-probabilities of a text are to the last bit what they were, while the trainer's moved "
                f"by up to {moved:.3g} nats: it has not taken the new weights"
            )

    async def _check_as_drawn(self, prompt: list[int], temperature: float, top_p: float) -> None:
        """InputError for a server whose log-probabilities do not know of the temperature, or of top_p."""
        asked = {"temperature": (COLD, 1.0)} if temperature != 1 else {}
        asked |= {"top_p": (1.0, COLD)} if top_p != 1 else {}
        for server in [server for server in self._fleet.servers if server.out is None]:
            ask = partial(self._fleet.ask, server, self._api.generate_path)
            for name, (cold, narrow) in asked.items():
                body = self._api.generation(Request(prompt, 1, 0), cold, narrow, self._eod)
                try:
                    reply = self._api.read(await ask(body))
                    text = prompt + reply.token_ids[:1]
                    plain = self._api.read_scores(await ask(self._api.scoring(text)), text)[-1]
                except (Malformed, Failed) as error:
                    raise InputError(f"{server.url}: {error}") from None
                # Of one token that is nearly certain anyway nothing can be learnt.
                if plain < -0.05 and abs(reply.logprobs[0] - plain) < 0.01:
                    raise InputError(
                        f"{server.url}: its log-probabilities are those at {name} 1 while it draws by another; set "
                        f"rollout.{name} 1, or start the server so that it reports them as drawn (vLLM: "
                        "--logprobs-mode processed_logprobs)"
                    )
        self._as_drawn.add((temperature, top_p))


def _is_logprob(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value) and value <= 1e-3


async def _all_or_none(work: list[Awaitable[T]]) -> list[T]:
    """The results in order; the first error ends the others."""
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _share(work: Callable[[], T], source: int, group: Any) -> T:
    """What `work` gives on rank `source`, on all ranks of the group; its InputError too."""
    answer: list[Any] = [None, f"rank {source}, which speaks to the servers, failed"]
    try:
        if dist.get_rank() == source:
            answer = [work(), None]
    except InputError as error:
        answer = [None, str(error)]
    finally:  # whatever happened here, the others wait for it
        if dist.get_world_size(group) > 1:
            dist.broadcast_object_list(answer, src=source, group=group)
    if answer[1] is not None:
        raise InputError(answer[1])
    return answer[0]
