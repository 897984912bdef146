"""`ptrl score`: a checkpoint and `.bin/.idx` -> the log-probability of every token, as a side-car (data/sidecar.py).

    lengths  ->  Windows  ->  chunks  --data-parallel ranks in turn-->  Scorer  ->  OUTPUT.parts/  ->  OUTPUT.*

Run it alone or under torchrun, in any layout of tensor, pipeline, expert and data parallelism; the same command goes on
where one was killed, with the chunks that were whole. What is scored, and in which rows, follows from the data and the
settings alone.
"""

import contextlib
import dataclasses
import hashlib
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import torch.distributed as dist
from megatron.core import parallel_state

from megatron_ptrl.config import DataConfig, LossConfig, PretrainConfig, ScoreConfig, TrainConfig
from megatron_ptrl.data.indexed import open_indexed, resolve_tokenizer
from megatron_ptrl.data.scored_chunks import ScoredChunks
from megatron_ptrl.data.sidecar import SideCar, SideCarMeta, hash_file, identify, publish, read_sidecar_meta
from megatron_ptrl.data.windows import Windows
from megatron_ptrl.errors import InputError
from megatron_ptrl.training import checkpoint, layers, mcore
from megatron_ptrl.training.frozen import check_padding, check_vocabulary, load_frozen_model, model_of
from megatron_ptrl.training.layout import check_launched, check_layout
from megatron_ptrl.training.rank_zero import from_rank_0
from megatron_ptrl.training.resume import find_source
from megatron_ptrl.training.scorer import Scorer

# Rank 0 reads all of the data, which the others wait for.
WAIT_MINUTES = 240
SECONDS_BETWEEN_LINES = 10.0


def run(config: ScoreConfig) -> None:
    """Score `config.data` with `config.checkpoint`; prints progress and a summary.

    Raises InputError for a reference of another tokenizer, an output that is of something else, data that change
    meanwhile, a layout that cannot work, a log-probability that is not finite.
    """
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    for name in ("checkpoint", "data"):
        if not getattr(config, name):
            expected = (
                "a run directory of `ptrl pretrain`" if name == "checkpoint" else "the prefix of a .bin/.idx pair"
            )
            raise InputError(f"{name} is empty; expected {expected}")
    if config.output == config.data:
        raise InputError(f"output {config.output} is the data themselves; choose another prefix")
    check_launched(world_size)
    mcore.join_ranks(timeout_minutes=WAIT_MINUTES)
    try:
        Scoring(config).run()
    finally:
        mcore.shutdown()


class Scoring:
    """One scoring on this rank. Making it starts Megatron's process groups and refuses what cannot work."""

    def __init__(self, config: ScoreConfig) -> None:
        self.config = config
        self.output = config.output or config.data + ".logprob"
        self.checkpoint, notes = find_source(config.checkpoint, "checkpoint")
        manifest = checkpoint.read_manifest(self.checkpoint)
        self.tokenizer = resolve_tokenizer(DataConfig(train=[config.data], tokenizer=config.tokenizer))
        check_vocabulary(self.checkpoint, manifest, self.tokenizer, "checkpoint")
        self.indexed, _ = open_indexed(config.data)
        self.settings = model_settings(config, manifest, dist.get_world_size())
        check_layout(self.settings, dist.get_world_size())
        check_padding(self.checkpoint, manifest, self.settings, "checkpoint")
        layers.check_supported(self.settings)
        mcore.initialize(self.settings, timeout_minutes=WAIT_MINUTES)
        window = self.settings.data.seq_length
        overlap = window // 2 if config.overlap is None else config.overlap
        if overlap >= window:
            raise InputError(f"overlap is {overlap}; expected less than the window, {window}")
        self.windows = Windows(self.indexed.sequence_lengths, window=window, overlap=overlap, chunk=config.chunk)
        digest = digest_of(self.checkpoint, manifest)
        self.meta = from_rank_0(lambda: self._describe(manifest, digest, overlap))
        self.parts = ScoredChunks(Path(self.output + ".parts"), config.storage)
        self._lock: IO[str] | None = None  # of the parts, on rank 0
        for note in notes:
            self.say(note)

    def run(self) -> None:
        """Score what is missing, merge, tell."""
        missing = from_rank_0(self._missing)
        if missing is None:
            self.say(f"{self.output} is finished; nothing to do")
            return
        if len(missing) < len(self.windows):
            self.say(f"{len(self.windows) - len(missing)} of {len(self.windows)} chunks are there already")
        try:
            rate = self._score(missing) if missing else 0.0
        except InputError:
            if dist.get_rank() == 0:
                self.parts.remove_if_empty()  # it would refuse the settings that the error asks for
            raise
        dist.barrier()
        if dist.get_rank() == 0:
            self._merge(rate)

    def say(self, text: str) -> None:
        """A line on the terminal, from rank 0."""
        if dist.get_rank() == 0:
            print(text, flush=True)

    def _describe(self, manifest: dict[str, Any], digest: str, overlap: int) -> SideCarMeta:
        train = self.settings.train
        reference = {"sha256": digest, "precision": train.precision, "step": manifest["step"]}
        lengths = self.indexed.sequence_lengths
        return SideCarMeta(
            storage=self.config.storage,
            data=identify(self.config.data),
            data_sha256=hash_file(self.config.data + ".bin"),
            tokenizer_sha256=self.tokenizer.sha256,
            reference={"checkpoint": str(self.checkpoint), **reference, "model": manifest["model"]},
            window=self.windows.window,
            overlap=overlap,
            documents=len(lengths),
            tokens=int(lengths.sum(dtype="int64")),
            mean_logprob=math.nan,
        )

    def _missing(self) -> list[int] | None:
        """Numbers of the chunks to score; None when the side-car is finished."""
        plan = _identity(self.meta)
        finished = read_sidecar_meta(self.output)
        if finished is not None:
            found = _identity(finished)
            different = [name for name in plan if found[name] != plan[name]]
            if different:
                raise InputError(
                    f"{self.output}.json is of a side-car with another {', '.join(different)}; remove it, or use "
                    "another output"
                )
            SideCar.open(self.output)
            if self.parts.folder.exists():
                self.parts.remove()
            return None
        if not self.parts.folder.exists():
            for suffix in (".bin", ".idx", ".json"):
                if Path(self.output + suffix).exists():
                    raise InputError(f"{self.output}{suffix} exists and is of no scoring; use another output")
        with _writing(self.output):
            self._lock = self.parts.begin({**plan, "chunk": self.config.chunk})
        return [n for n in range(len(self.windows)) if not self.parts.is_whole(self.windows.chunk(n))]

    def _score(self, missing: list[int]) -> float:
        """Tokens/s over all ranks."""
        chunks = load_frozen_model(self.settings, self.checkpoint, self.tokenizer.vocab_size)
        scorer = Scorer(self.settings, chunks, self.indexed, self.windows)
        scorer.score_first_tokens(self.tokenizer.eod, self.tokenizer.vocab_size)
        sizes = {n: self.windows.chunk(n).end_token - self.windows.chunk(n).first_token for n in missing}
        done, start, said = 0, time.perf_counter(), 0.0
        dp = parallel_state.get_data_parallel_world_size()
        for begin in range(0, len(missing), dp):
            at_once = missing[begin : begin + dp]
            try:
                self._score_one(scorer, at_once)
            except InputError as error:
                error.rank = dist.get_rank()
                raise
            done += sum(sizes[number] for number in at_once)
            seconds = time.perf_counter() - start
            if seconds - said > SECONDS_BETWEEN_LINES or begin + dp >= len(missing):
                said, total = seconds, sum(sizes.values())
                left = f"{(total - done) * seconds / max(done, 1):.0f} s to go"
                self.say(f"{done:,} of {total:,} tokens  {done / seconds:,.0f} tokens/s  {left}")
        return done / (time.perf_counter() - start)

    def _score_one(self, scorer: Scorer, at_once: list[int]) -> None:
        """The chunk of this rank among those that the data-parallel ranks score side by side, if there is one left."""
        rank, together = parallel_state.get_data_parallel_rank(), self.settings.parallel.ep > 1
        if rank >= len(at_once) and not together:
            return
        # Experts are shared between data-parallel ranks, so those run as often as the one with the most rows.
        packed = {number: scorer.pack(number) for number in (at_once if together else at_once[rank : rank + 1])}
        count = max(scorer.num_microbatches(rows) for rows in packed.values())
        mine = at_once[rank] if rank < len(at_once) else at_once[0]
        values = scorer.score(packed[mine], count)
        writes = rank < len(at_once) and parallel_state.get_tensor_model_parallel_rank() == 0
        if values is not None and writes:
            with _writing(self.output):
                self.parts.write(self.windows.chunk(mine), values[0])

    def _merge(self, rate: float) -> None:
        config = self.config
        now = (identify(config.data), hash_file(config.data + ".bin"))
        if now != (self.meta.data, self.meta.data_sha256):
            raise InputError(
                f"{config.data} has changed while it was scored; when nothing writes to it any more, remove "
                f"{self.parts.folder} and repeat the command"
            )
        numbers = range(len(self.windows))
        total = sum(self.parts.sum_of(self.windows.chunk(n)) for n in numbers)
        meta = dataclasses.replace(self.meta, mean_logprob=total / self.meta.tokens)
        with _writing(self.output):
            publish(self.output, config.data, (self.parts.read(self.windows.chunk(n)) for n in numbers), meta)
            self.parts.remove()
        ce, size = -meta.mean_logprob, os.path.getsize(self.output + ".bin")
        self.say(
            f"{self.output}: {meta.tokens:,} tokens of {meta.documents:,} documents, cross entropy {ce:.4f} nats a "
            f"token, perplexity {math.exp(min(ce, 700.0)):.2f}, {rate:,.0f} tokens/s, {size:,} bytes"
        )


def model_settings(config: ScoreConfig, manifest: dict[str, Any], world_size: int) -> PretrainConfig:
    """The settings under which the reference of a checkpoint's manifest is built and run."""
    trained, parallel = manifest["settings"], config.parallel
    ranks = max(world_size // (parallel.tp * parallel.pp), 1)
    return PretrainConfig(
        model=model_of(manifest),
        parallel=parallel,
        data=DataConfig(seq_length=config.window or trained["data.seq_length"], isolate_documents=True),
        # Only the plain log-probability is read, so the ranking that comes with it is made as small as it can be.
        loss=LossConfig(impl="linear" if trained["loss.impl"] == "linear" else "reward_shaped", top_k=1),
        train=TrainConfig(
            global_batch=config.micro_batch * ranks * (parallel.pp if parallel.vpp else 1),
            micro_batch=config.micro_batch,
            precision=config.precision or trained["train.precision"],
        ),
    )


def _identity(meta: SideCarMeta) -> dict[str, Any]:
    """What two scorings with the same values have in common, as JSON holds it."""
    plan = dataclasses.asdict(meta)
    del plan["mean_logprob"], plan["values"]
    plan["reference"] = {name: plan["reference"].get(name) for name in ("sha256", "precision")}
    return plan


def digest_of(path: Path, manifest: dict[str, Any]) -> str:
    """SHA-256 over those of all files of a checkpoint, which the ranks read in turn. Collective."""
    names, world_size = sorted(manifest["files"]), dist.get_world_size()
    every: list[dict[str, str]] = [{} for _ in range(world_size)]
    dist.all_gather_object(every, {name: hash_file(path / name) for name in names[dist.get_rank() :: world_size]})
    digests = {name: digest for part in every for name, digest in part.items()}
    return hashlib.sha256("".join(f"{name} {digests[name]}\n" for name in names).encode()).hexdigest()


@contextlib.contextmanager
def _writing(output: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(f"{output}: {error.strerror}: {error.filename or output}") from error
