"""Raw text -> next-segment prompts (RLPT, arXiv:2509.19249)."""

from dataclasses import dataclass, field
from typing import Literal
from urllib.parse import urlsplit

from megatron_ptrl.config.checks import require
from megatron_ptrl.config.think import ExecutorConfig, ServerConfig


@dataclass(frozen=True, kw_only=True)
class CleanConfig:
    """Which documents are left out before they are segmented, and what is masked in the others."""

    near_duplicates: bool = True
    """Of documents that are nearly the same, keep the first of the corpus: MinHash over 5 words, 14 buckets of 8, as in
    datatrove, which finds a pair of Jaccard similarity 0.8 with probability 0.92. Reads the corpus once more."""
    pii: bool = True
    """Mask e-mail addresses and public IP addresses, by datatrove's expressions."""
    rules: bool = True
    """Gopher's rules on length, words, symbols and lines (arXiv:2112.11446). They are for text with blanks between its
    words: turn them off for Chinese or Japanese."""
    min_words: int = 50
    """The rules' shortest document."""
    max_words: int = 100_000
    """The rules' longest document."""
    min_stop_words: int = 2
    """How many of the eight words the, be, to, of, and, that, have, with the rules want; 0 for other languages."""
    decontaminate: list[str] = field(default_factory=list)
    """Files or folders of evaluation data: .jsonl (every string of every line counts), .parquet, .txt. A document that
    shares a run of words with them is left out."""
    decontaminate_words: int = 12
    """How long a shared run must be, case and punctuation aside. A shorter evaluation text is not looked for."""

    def __post_init__(self) -> None:
        require(
            0 <= self.min_words <= self.max_words,
            f"clean.min_words {self.min_words} and clean.max_words {self.max_words}; expected 0 <= min <= max",
        )
        require(
            0 <= self.min_stop_words <= 8,
            f"clean.min_stop_words is {self.min_stop_words}; expected 0 to 8",
        )
        require(
            self.decontaminate_words >= 1, f"clean.decontaminate_words is {self.decontaminate_words}; expected >= 1"
        )


@dataclass(frozen=True, kw_only=True)
class QualityConfig:
    """A language model that says how good a document is."""

    servers: list[str] = field(default_factory=list)
    """URLs of OpenAI-compatible servers, such as http://localhost:8000/v1; none for no such score."""
    server: ServerConfig = field(default_factory=ServerConfig)
    prompt: str = "default"
    """default, or a text file with {context} that asks for a line "Score: 0" to "Score: 5"."""
    document_tokens: int = 2048
    """The prompt shows this much of the document's beginning, in tokens."""
    max_tokens: int = 512
    """Tokens of the reply at most."""
    min_score: float = 3.0
    """Documents below it are left out."""

    def __post_init__(self) -> None:
        for name in ("document_tokens", "max_tokens"):
            require(getattr(self, name) >= 1, f"quality.{name} is {getattr(self, name)}; expected >= 1")
        require(0 <= self.min_score <= 5, f"quality.min_score is {self.min_score}; expected 0 to 5")
        for url in self.servers:
            parts = urlsplit(url)
            bare = url.partition("?")[0].rpartition("@")[2]
            require(parts.scheme in ("http", "https") and bool(parts.hostname), f"quality.servers: {bare} is no URL")
            require(
                "@" not in parts.netloc and not parts.query,
                f"quality.servers: {bare} carries credentials or a query; put the key into {self.server.api_key_env}",
            )


@dataclass(frozen=True, kw_only=True)
class SplitConfig:
    """Where a document is cut. The segments are slices of it and make it up again."""

    unit: Literal["sentence", "paragraph", "steps"] = "sentence"
    """sentence (the paper's), paragraph (what blank lines part), or steps of a fixed number of sentences or words."""
    step: int = 3
    """Sentences or words of a step."""
    step_of: Literal["sentences", "words"] = "sentences"
    """What a step is counted in."""
    sentences: Literal["punkt", "sentencex"] = "punkt"
    """NLTK's Punkt (the paper's), or sentencex, which is an extra, some three times faster and better at English."""
    language: str = "en"
    """Two letters: which installed punkt_tab is taken, and which of sentencex's rules."""
    punkt: str | None = None
    """A JSON file of parameters, such as another output's punkt.json. Null takes an installed punkt_tab, else a shipped
    list of English abbreviations and what Punkt learns from a sample of the corpus; the list alone where the sample is
    small, or its sentences end alike."""
    punkt_megabytes: float = 2.0
    """That sample's size; learning from 2 MB takes some 4 s, and more than linearly longer from more."""

    def __post_init__(self) -> None:
        require(self.step >= 1, f"split.step is {self.step}; expected >= 1")
        require(self.punkt_megabytes > 0, f"split.punkt_megabytes is {self.punkt_megabytes}; expected > 0")


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """What prompts are made of the segments."""

    tasks: list[Literal["asr", "msr"]] = field(default_factory=lambda: ["asr", "msr"])
    """asr: predict the next segment. msr: fill in a segment, the one that follows being shown."""
    context_tokens: int = 2048
    """Text that a prompt shows, its beginning dropped at a segment's edge; the words around it come on top, some
    hundred tokens. The paper does not say."""
    tokenizer: str | None = None
    """tokenizer.json that counts them; null counts 4 bytes as one."""
    min_words: int = 4
    """A segment with fewer words is no target; it stays where it is in the context. The paper drops such, and does not
    say how short they are."""
    max_words: int = 200
    """A segment with more is no target: tables and lists that no sentence end was found in."""
    reference_segments: int = 4
    """The target and what follows it, for the prefix reward of asr. The reference of msr ends where the segment begins
    that the prompt shows."""
    targets_per_document: int | None = None
    """Of each task at most so many, drawn by the seed; null for all (the paper's)."""
    asr_prompt: str = "default"
    """The paper's, or a text file with {context}."""
    msr_prompt: str = "default"
    """The paper's, or a text file with {prompt} and {next_step}."""

    def __post_init__(self) -> None:
        require(
            0 < len(self.tasks) == len(set(self.tasks)), f"task.tasks is {self.tasks}; expected asr, msr or both, once"
        )
        for name in ("context_tokens", "reference_segments", "min_words"):
            require(getattr(self, name) >= 1, f"task.{name} is {getattr(self, name)}; expected >= 1")
        require(
            self.max_words >= self.min_words,
            f"task.max_words {self.max_words} is below task.min_words {self.min_words}",
        )
        require(
            self.targets_per_document is None or self.targets_per_document >= 1,
            f"task.targets_per_document is {self.targets_per_document}; expected >= 1 or null",
        )


@dataclass(frozen=True, kw_only=True)
class SegmentConfig:
    """Documents -> asr.jsonl and msr.jsonl, prompts for `ptrl rl`."""

    input: list[str] = field(default_factory=list)
    """Files or folders, local or fsspec URLs: .txt (one document a file), .jsonl or .json (one a line), any of them .gz
    or .zst, .parquet."""
    output: str = ""
    """Folder for asr.jsonl, msr.jsonl, rejects.jsonl, summary.json and punkt.json."""
    text_field: str = "text"
    """Field of a JSONL line or Parquet column that holds the document."""
    id_field: str = "id"
    """Field with the document's id, unique in its file; where it is missing, file and line make one."""
    seed: int = 0
    """Of the targets drawn from a document, and of the sample that Punkt learns from."""
    part_megabytes: float = 64.0
    """Files are taken together up to this size on disk, and worked on as one part."""
    clean: CleanConfig = field(default_factory=CleanConfig)
    quality: QualityConfig = field(default_factory=QualityConfig)
    split: SplitConfig = field(default_factory=SplitConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    executor: ExecutorConfig = field(default_factory=ExecutorConfig)

    def __post_init__(self) -> None:
        require(self.part_megabytes > 0, f"part_megabytes is {self.part_megabytes}; expected > 0")
