"""The stages that do not train."""

from dataclasses import dataclass, field

from megatron_ptrl.config.checks import require


@dataclass(frozen=True, kw_only=True)
class TokenizeConfig:
    """Raw text -> tokenizer, `.bin/.idx`."""

    input: list[str] = field(default_factory=list)
    """Files or folders: .txt (one document a file), .jsonl or .json (one a line), any of them .gz or .zst, .parquet."""
    output: str = ""
    """Prefix of the files to write: PREFIX.bin, PREFIX.idx, PREFIX.json, PREFIX.tokenizer.json."""
    text_field: str = "text"
    """Field of a JSONL line or Parquet column that holds the document."""
    tokenizer: str | None = None
    """A Hugging Face tokenizer.json to use; null to train a byte-level BPE on the input."""
    vocab_size: int = 8192
    """Size of a newly trained vocabulary, special tokens included."""
    eod_token: str = "<|endoftext|>"
    """End-of-document token; it must exist in a given tokenizer."""
    append_eod: bool = True
    """Close every document with the end-of-document token."""
    workers: int = 1
    """Processes that tokenize, 1 for this one with the tokenizer's own threads; the output does not depend on it."""
    strict: bool = False
    """Stop at the first bad document instead of writing it to PREFIX.rejects.jsonl."""

    def __post_init__(self) -> None:
        require(self.workers >= 1, f"workers is {self.workers}; expected >= 1")
        require(self.vocab_size >= 257, f"vocab_size is {self.vocab_size}; expected >= 257 (256 bytes and the EOD)")


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Run directories -> plots and one table, the runs side by side."""

    runs: list[str] = field(default_factory=list)
    """Run directories, each with its metrics.jsonl."""
    output: str | None = None
    """Folder for the plots and the table; null for plots/ in the run directory, when there is just one."""
    scaling: list[str] = field(default_factory=list)
    """Metrics to fit scaling laws to, over training tokens: keys of metrics.jsonl such as `valid_ce` or `reward`, or of
    the results of `ptrl evaluate` in RUN/evaluations/, such as `gsm8k/pass@1`."""
    scaling_unit: float | None = None
    """Tokens that the laws' x is counted in: 1e9 for parameters like those in papers; null for the middle of the data,
    where their intervals are the least entangled."""
    bootstrap: int = 200
    """Resampled fits behind an interval."""

    def __post_init__(self) -> None:
        unit = self.scaling_unit
        require(unit is None or unit > 0, f"scaling_unit is {unit}; expected > 0 tokens")
        require(self.bootstrap >= 20, f"bootstrap is {self.bootstrap}; expected >= 20")


@dataclass(frozen=True, kw_only=True)
class DoctorConfig:
    """What is installed and built, what is missing, what that costs."""

    json: bool = False
    """Print one JSON object a line, for a script to read."""
