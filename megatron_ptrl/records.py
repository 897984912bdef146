"""The nouns that travel between the stages."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Document:
    """One text of a corpus, and where it came from."""

    text: str
    source: str
    """File it was read from, as given or found."""
    line: int
    """Line of a JSONL file or row of a Parquet file, from 1; 1 for a file that is one document."""
