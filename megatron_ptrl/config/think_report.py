"""What is to be known about thinking and its documents."""

from dataclasses import dataclass, field

from megatron_ptrl.config.checks import require
from megatron_ptrl.config.think import GeneratorConfig


@dataclass(frozen=True, kw_only=True)
class AskConfig(GeneratorConfig):
    """A generator to ask for the labels that the metadata lacks; its answers are kept in labels.jsonl."""

    documents: int = 0
    """Documents to ask about, a sample of those that are measured; 0 to ask nobody. An answer in labels.jsonl is not
    asked for again: delete the file to ask another model."""
    prompt_tokens: int = 2048
    """The prompt shows this much of a document, 4 bytes counting as a token."""
    max_tokens: int = 4096
    """Tokens of an answer at most, for models that think first."""
    seed: int = 0
    """Decides which documents are asked about. A larger sample of the same seed has all of a smaller one."""

    def __post_init__(self) -> None:
        GeneratorConfig.__post_init__(self)
        require(self.documents >= 0, f"ask.documents is {self.documents}; expected >= 0")
        require(
            self.documents > 0 or not (self.servers or self.checkpoint),
            "ask.documents is 0 and there is somebody to ask; set it to the number of documents to ask about",
        )
        for name in ("prompt_tokens", "max_tokens"):
            require(getattr(self, name) >= 1, f"ask.{name} is {getattr(self, name)}; expected >= 1")


@dataclass(frozen=True, kw_only=True)
class ThinkReportConfig:
    """Thinking and what became of it -> a table and plots."""

    runs: list[str] = field(default_factory=list)
    """Output directories of `ptrl think`: thoughts/, rejects/, train.*."""
    output: str | None = None
    """Folder for the plots, the table and labels.jsonl; null for plots/ in the directory."""
    sample: int = 20_000
    """Documents to measure, spread evenly over all by a hash of their lines; the paper has 20,000."""
    domain_field: str = "domain"
    """Metadata field with a document's domain; dots lead into nested ones."""
    reasoning_field: str = "reasoning"
    """Metadata field with how much reasoning a document asks for."""
    audience_field: str = "audience"
    """Metadata field with whom a document is written for."""
    ask: AskConfig = field(default_factory=AskConfig)

    def __post_init__(self) -> None:
        require(self.sample >= 1, f"sample is {self.sample}; expected >= 1")
