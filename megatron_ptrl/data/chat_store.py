"""Conversations as tokens on disk, made once: what a run and its continuations map into memory.

    files --read_conversations, chat_parts, encode_parts--> a folder: tokens.bin, is_response.bin, ends.npy, about.json,
        rejects.jsonl

The folder's name is a hash of the files' bytes, the tokenizer, the template and what else the tokens follow from.
"""

import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy

from megatron_ptrl.data.chat import (
    ChatTemplate,
    Encoded,
    Part,
    chat_parts,
    check_ends,
    encode_parts,
    last_response,
    turns_apart,
)
from megatron_ptrl.data.conversations import read_conversations
from megatron_ptrl.data.corpus import Rejects
from megatron_ptrl.data.tokenizer import Tokenizer
from megatron_ptrl.errors import InputError

# What the folders hold; another number for another content.
_FORMAT = 1
# Enough texts for the tokenizer's threads, few enough to hold.
_ENCODED_AT_ONCE = 1024


class Conversations:
    """The tokenized conversations of a folder.

    about: how many conversations, tokens, responses' tokens; `cut`, `rejected` by reason
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.about: dict[str, Any] = json.loads((folder / "about.json").read_text())
        self._tokens = numpy.memmap(folder / "tokens.bin", numpy.int32, "r")
        self._is_response = numpy.memmap(folder / "is_response.bin", numpy.bool_, "r")
        self._ends = numpy.load(folder / "ends.npy")
        self.sizes: numpy.ndarray = numpy.diff(self._ends, prepend=0) - 1
        """Positions of each in a row: every token but the last one is an input."""

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, number: int) -> Encoded:
        """(ids, is_response) of one conversation, in the order of the files."""
        begin, end = (int(self._ends[number - 1]) if number else 0), int(self._ends[number])
        return self._tokens[begin:end], self._is_response[begin:end]

    def describe(self) -> str:
        """One line for the log."""
        about = self.about
        text = f"{about['conversations']:,} conversations, {about['tokens']:,} tokens, {about['response_tokens']:,} of "
        text += f"responses; {about['cut']:,} cut"
        reasons = "; ".join(f"{count:,} x {reason}" for reason, count in about["rejected"].items())
        return text + (f"; put aside: {reasons}" if reasons else "")


def build_conversations(
    files: Sequence[Path],
    cache: Path,
    *,
    tokenizer: Tokenizer,
    template: ChatTemplate,
    seq_length: int,
    too_long: Literal["reject", "cut"],
    turns: Literal["together", "apart"] = "together",
) -> Path:
    """Folder of the tokenized conversations of `files`, made in `cache` unless it is there already. For one process.

    too_long: what becomes of a conversation with more than `seq_length` + 1 tokens; one that is cut loses its end, and
    goes to the rejects where no response is left
    turns: `apart` makes a conversation of each response, behind what was said before it
    Cost: reads the files twice; holds a thousand conversations. Raises InputError where none is usable.
    """
    identity = {
        "format": _FORMAT,
        "files": [_sha256(file) for file in files],
        "tokenizer": [tokenizer.sha256, tokenizer.eod_token],
        "template": template.identity,
        "seq_length": seq_length,
        "too_long": too_long,
        # Not named by default, so that a run keeps the folder that it was begun with.
        **({"turns": turns} if turns != "together" else {}),
    }
    name = "conversations-" + hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
    folder, partial = cache / name, cache / f".{name}.partial"
    if folder.exists():
        return folder
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        with Rejects(partial / "rejects.jsonl") as rejects:
            encoded = _encode(files, tokenizer, template, rejects, turns)
            about = _write(partial, _fitting(encoded, seq_length, too_long, rejects))
        about["rejected"] = dict(rejects.counts.most_common())
        if not about["conversations"]:
            reasons = "; ".join(f"{count:,} x {reason}" for reason, count in about["rejected"].items())
            raise InputError(f"{', '.join(map(str, files))}: no usable conversation in it: {reasons or 'no line'}")
        (partial / "about.json").write_text(json.dumps(about))
        os.replace(partial, folder)
    except OSError as error:
        raise InputError(f"data.cache {cache}: {error.strerror}; name a folder that can be written") from error
    return folder


_Placed = tuple[Encoded, str, int]
"""A conversation, its file and line."""


def _encode(
    files: Sequence[Path],
    tokenizer: Tokenizer,
    template: ChatTemplate,
    rejects: Rejects,
    turns: Literal["together", "apart"],
) -> Iterator[_Placed]:
    """The conversations, or with `apart` one for each response, marked alone: the others have theirs."""
    read = read_conversations(files, rejects)
    while several := list(itertools.islice(read, _ENCODED_AT_ONCE)):
        chats: list[list[Part]] = []
        places: list[tuple[str, int]] = []
        for messages, file, line in several:
            try:
                if turns == "apart":
                    found = turns_apart(template, tokenizer, messages)
                else:
                    found = [chat_parts(template, tokenizer, messages)]
                chats += found
                places += [(file, line)] * len(found)
            except InputError as reason:
                rejects.add(file, line, str(reason))
        for encoded, (file, line) in zip(encode_parts(template, tokenizer, chats), places, strict=True):
            try:
                if turns == "apart":
                    encoded = last_response(encoded)
                check_ends(encoded, tokenizer)
                yield encoded, file, line
            except InputError as reason:
                rejects.add(file, line, str(reason))


def _fitting(
    placed: Iterator[_Placed], seq_length: int, too_long: Literal["reject", "cut"], rejects: Rejects
) -> Iterator[tuple[Encoded, bool]]:
    """(what fits into a row, whether it was cut)."""
    for (ids, is_response), file, line in placed:
        # The last token is no input.
        if len(ids) <= seq_length + 1:
            yield (ids, is_response), False
        elif too_long == "reject":
            rejects.add(file, line, f"longer than data.seq_length {seq_length}")
        elif not is_response[1 : seq_length + 1].any():
            rejects.add(file, line, f"no response within data.seq_length {seq_length}")
        else:
            yield (ids[: seq_length + 1], is_response[: seq_length + 1]), True


def _write(folder: Path, fitting: Iterator[tuple[Encoded, bool]]) -> dict[str, Any]:
    ends, responses, num_cut = [0], 0, 0
    with (folder / "tokens.bin").open("wb") as tokens, (folder / "is_response.bin").open("wb") as marks:
        for (ids, is_response), cut in fitting:
            tokens.write(ids.tobytes())
            marks.write(is_response.tobytes())
            ends.append(ends[-1] + len(ids))
            responses += int(is_response.sum())
            num_cut += cut
    numpy.save(folder / "ends.npy", numpy.array(ends[1:], numpy.int64))
    return {"conversations": len(ends) - 1, "tokens": ends[-1], "response_tokens": responses, "cut": num_cut}


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    try:
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise InputError(f"{file}: {error.strerror}") from error
    return digest.hexdigest()
