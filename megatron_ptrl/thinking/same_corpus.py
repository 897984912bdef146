"""Whether a corpus is still the one that thoughts are of, where its files have kept their names and sizes.

Each record has a digest. The journal of a part that was broken off holds those of what is done, and a finished part one
of them all, with the stamps that its files had: only where a stamp is another one is the part read again.
"""

import hashlib

from megatron_ptrl.data.input_parts import Part, Unreadable, read_part
from megatron_ptrl.errors import InputError
from megatron_ptrl.records import Document, to_line
from megatron_ptrl.thinking.journal import Journal, Source

DIGEST_BYTES = 8


def digest_of(record: Document | Unreadable) -> bytes:
    """8 bytes that follow from all that the record holds."""
    # A text of megabytes is hashed ten times as fast as it is written as JSON.
    text, rest = ("", {"why": record.why}) if isinstance(record, Unreadable) else (record.text, record.fields)
    digest = hashlib.blake2b(to_line(rest) + b"\n", digest_size=DIGEST_BYTES)
    digest.update(text.encode())
    return digest.digest()


class PartDigest:
    """Of the records of a part, in their order."""

    def __init__(self) -> None:
        self._hash = hashlib.blake2b(digest_size=16)

    def add(self, digest: bytes) -> None:
        """The next record's, as `digest_of` gives it."""
        self._hash.update(digest)

    def source(self, part: Part) -> Source:
        """What the journal keeps of the part, all records of which were added."""
        return Source([file.stamp for file in part], self._hash.hexdigest())


def check_unchanged(part: Part, journal: Journal, text_field: str) -> None:
    """Raise InputError where a finished part's thoughts are of other documents; reads them where a stamp is new."""
    before = journal.source()
    if before is None or before.stamps == [file.stamp for file in part]:
        return
    digest = PartDigest()
    for _, record in read_part(part, text_field):
        digest.add(digest_of(record))
    now = digest.source(part)
    if now.digest != before.digest:
        changed = [file.path for file, stamp in zip(part, before.stamps, strict=True) if file.stamp != stamp]
        raise InputError(
            f"{journal.output} has thinking about other documents than {', '.join(changed)} hold now; restore them, "
            "or choose another output"
        )
    journal.note_source(now)
