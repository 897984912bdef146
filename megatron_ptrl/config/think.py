"""Documents -> documents with thinking (TPT, arXiv:2509.20186)."""

from dataclasses import dataclass, field
from typing import Any, Literal
from urllib.parse import urlsplit

from megatron_ptrl.config.assemble import AssembleConfig
from megatron_ptrl.config.checks import require
from megatron_ptrl.errors import InputError


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How the thinking is sampled; the paper's settings."""

    max_tokens: int = 8192
    """Tokens of thinking at most; what needs more is cut off there, with finish_reason length."""
    temperature: float = 0.6
    """Of the softmax; 0 takes the most likely token."""
    top_p: float = 0.9
    """Sample among the likeliest tokens that make up this much probability."""
    stop: list[str] = field(default_factory=lambda: ["</think>"])
    """Stop at these; an answer behind the thinking is not needed."""
    untagged: Literal["reject", "thinking"] = "reject"
    """A reply without tags or reasoning_content. "thinking" takes all of it, which is right for a chat template that
    opens the tag itself on a server that leaves the closing one out; "reject" puts the document aside."""

    def __post_init__(self) -> None:
        require(self.max_tokens >= 1, f"sampling.max_tokens is {self.max_tokens}; expected >= 1")
        require(self.temperature >= 0, f"sampling.temperature is {self.temperature}; expected >= 0")
        require(all(self.stop), "sampling.stop has an empty string; expected strings to stop at, or an empty list")
        require(0 < self.top_p <= 1, f"sampling.top_p is {self.top_p}; expected above 0, at most 1")


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """OpenAI-compatible servers, and what to put up with from them."""

    model: str | None = None
    """The model's name as the servers know it; null to ask the first that answers."""
    api_key_env: str = "OPENAI_API_KEY"
    """Environment variable that holds the key, if it is set. The key itself goes into no file, log or error."""
    in_flight: int = 64
    """Requests at a time to each server, from each process. `transformers serve` has one random state for all of them:
    it writes the same again only at 1."""
    timeout: float = 600.0
    """Seconds for a whole reply."""
    attempts: int = 6
    """Requests for a document before it is rejected. Refused connections and 429 do not count."""
    backoff: float = 0.5
    """Seconds before the second attempt, doubled for each further one up to 30."""
    patience: float = 900.0
    """Seconds without a reply from any server after which the run stops, to be continued by the same command."""
    extra_body: dict[str, Any] = field(default_factory=dict)
    """Further fields of each request, for instance {"chat_template_kwargs": {"enable_thinking": true}}."""

    def __post_init__(self) -> None:
        for name in ("in_flight", "attempts"):
            require(getattr(self, name) >= 1, f"server.{name} is {getattr(self, name)}; expected >= 1")
        for name in ("timeout", "backoff", "patience"):
            require(getattr(self, name) > 0, f"server.{name} is {getattr(self, name)}; expected > 0 seconds")


@dataclass(frozen=True, kw_only=True)
class GeneratorConfig:
    """The outside model."""

    generator: Literal["openai", "embedded"] = "openai"
    """"openai" for servers, "embedded" for a run of `ptrl pretrain` in this process."""
    checkpoint: str = ""
    """The embedded generator: a run directory, or one of its checkpoints."""
    batch: int = 16
    """Rows that the embedded generator writes at a time."""
    servers: list[str] = field(default_factory=list)
    """URLs of OpenAI-compatible servers, such as http://localhost:8000/v1, all with the same model."""
    server: ServerConfig = field(default_factory=ServerConfig)

    def __post_init__(self) -> None:
        require(self.batch >= 1, f"batch is {self.batch}; expected >= 1")
        for url in self.servers:
            try:
                parts, _ = urlsplit(url), urlsplit(url).port
            except ValueError as error:
                raise InputError(f"servers: {_bare(url)}: {error}") from None
            require(
                parts.scheme in ("http", "https") and bool(parts.hostname),
                f"servers: {_bare(url)} is no URL; expected one such as http://localhost:8000/v1",
            )
            require(
                "@" not in parts.netloc and not parts.query and not parts.fragment,
                f"servers: {_bare(url)} carries credentials or a query; put the key into {self.server.api_key_env}",
            )


@dataclass(frozen=True, kw_only=True)
class ExecutorConfig:
    """Where the processes run, by datatrove's executors."""

    kind: Literal["local", "slurm"] = "local"
    """"slurm" submits an array job and returns; the same command again shows what is left, or assembles."""
    tasks: int = 1
    """Shards of the corpus; no more are used than it has parts. The output does not depend on it."""
    workers: int = 1
    """Tasks at a time."""
    partition: str | None = None
    """Slurm's partition; needed there."""
    time: str = "24:00:00"
    """Slurm's time limit of a task."""
    qos: str = "normal"
    """Slurm's quality of service."""
    cpus_per_task: int = 2
    """Slurm's CPUs for a task."""
    mem_per_cpu_gb: int = 2
    """Slurm's memory for a CPU, in GB."""
    env_command: str | None = None
    """Shell command of the job that makes Python and this package available; null for this interpreter's folder."""

    def __post_init__(self) -> None:
        require(self.tasks >= 1, f"executor.tasks is {self.tasks}; expected >= 1")
        require(self.workers >= 1, f"executor.workers is {self.workers}; expected >= 1")
        require(self.kind != "slurm" or bool(self.partition), "executor.kind is slurm; set executor.partition")


@dataclass(frozen=True, kw_only=True)
class ThinkConfig(GeneratorConfig):
    """Documents -> documents with thinking -> `.bin/.idx`."""

    input: list[str] = field(default_factory=list)
    """Files or folders, local or fsspec URLs: .txt (one document a file), .jsonl or .json (one a line), any of them .gz
    or .zst, .parquet."""
    output: str = ""
    """Folder for thoughts/, rejects/ and the training set."""
    text_field: str = "text"
    """Field of a JSONL line or Parquet column that holds the document."""
    id_field: str = "id"
    """Field with the document's id, unique in its file; where it is missing, file and line make one."""
    prompt: str = "default"
    """default, random_focus, back_thinking (fields question and answer), or a text file with {{CONTEXT}}."""
    prompt_tokens: int = 2048
    """The prompt shows this much of the document, in tokens."""
    tokenizer: str | None = None
    """tokenizer.json that counts the prompt's tokens and encodes the training set; null counts 4 bytes as one token,
    and trains a vocabulary on the training set."""
    seed: int = 0
    """A document's seed follows from this and its id."""
    part_megabytes: float = 64.0
    """Files are taken together up to this size on disk; each such part has one file in thoughts/."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    executor: ExecutorConfig = field(default_factory=ExecutorConfig)
    then_assemble: bool = True
    """Go on to OUTPUT/train.bin, .idx, as `ptrl assemble` does, once every part is there."""
    assemble: AssembleConfig = field(default_factory=AssembleConfig)
    """Thinking -> training set; input and output follow from `output`, the tokenizer is `tokenizer` unless set here."""

    def __post_init__(self) -> None:
        GeneratorConfig.__post_init__(self)
        require(self.prompt_tokens >= 1, f"prompt_tokens is {self.prompt_tokens}; expected >= 1")
        require(self.part_megabytes > 0, f"part_megabytes is {self.part_megabytes}; expected > 0")
        require(
            not (self.assemble.input or self.assemble.output),
            "assemble.input and assemble.output follow from output; set that, or use `ptrl assemble`",
        )


def _bare(url: str) -> str:
    """Without what may be a secret."""
    return url.partition("?")[0].partition("#")[0].rpartition("@")[2]
