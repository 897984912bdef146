"""Text <-> token ids, by a Hugging Face tokenizer file that was given or trained here.

Text is only text: a document that spells the EOD token, or any other special token, gets the ids of its letters, so
that the EOD id marks ends of documents and nothing else, and decoding gives the document back. A vocabulary that has
the EOD token among its ordinary words can still produce it; `tokenize_stage` puts such documents aside. Only in what a
chat template writes, its markup, a special token's name means that token.

The worker processes of `tokenize_stage` import this module, so it stays free of torch.
"""

import functools
import hashlib
import itertools
import os
import re
import threading
from collections.abc import Iterable, Sequence
from multiprocessing import parent_process
from pathlib import Path

import numpy
import tokenizers

from megatron_ptrl.errors import InputError

DEFAULT_EOD = "<|endoftext|>"
# Prose has four to five.
CHARACTERS_PER_TOKEN = 6


class Tokenizer:
    """A tokenizer file with its end-of-document token.

    `vocab_size` is the largest id + 1, which counts ids that a vocabulary with holes leaves unused;
    `sha256` is that of the file's bytes. Raises InputError for a file that is none, or a missing EOD token.
    """

    def __init__(self, path: str | Path, eod_token: str = DEFAULT_EOD) -> None:
        self.path = str(path)
        self.eod_token = eod_token
        try:
            content = Path(path).read_bytes()
        except OSError as error:
            raise InputError(f"tokenizer {path}: {error.strerror}") from error
        self.sha256 = hashlib.sha256(content).hexdigest()
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(content)
        except Exception as error:  # the Rust library raises Exception itself
            raise InputError(f"tokenizer {path}: {error}; expected a Hugging Face tokenizer.json") from error
        # A file may carry the truncation and padding of the task it was last used for.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.eod = self._find_eod()
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    def _find_eod(self) -> int:
        eod = self._tokenizer.token_to_id(self.eod_token)
        if eod is None:
            raise InputError(f"tokenizer {self.path} has no token {self.eod_token!r}; {self._candidates()}")
        self._tokenizer.add_special_tokens([self.eod_token])
        self._tokenizer.encode_special_tokens = True
        return eod

    def _candidates(self) -> str:
        added = [token.content for token in self._tokenizer.get_added_tokens_decoder().values()]
        ends = [token for token in added if re.search(r"end|eos|eod|eot|sep|</s>", token, re.IGNORECASE)]
        likely = ", ".join(repr(token) for token in (ends or added)[:8])
        return f"set --eod_token to one of its own, likely {likely}" if likely else "it has no special tokens at all"

    def encode(self, text: str) -> list[int]:
        """Ids of the text alone: no EOD, nothing that the tokenizer's template would add."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str], *, markup: bool = False) -> tuple[numpy.ndarray, numpy.ndarray]:
        """(ids, lengths): the ids of all texts end to end, uint16 or int32 (`dtype`), and how many each has, int64.

        markup: the names of special tokens mean those tokens
        """
        tokenizer = self._reads_markup if markup else self._tokenizer
        encoded = [encoding.ids for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
        lengths = numpy.array([len(ids) for ids in encoded], dtype=numpy.int64)
        return numpy.fromiter(itertools.chain.from_iterable(encoded), dtype=self.dtype), lengths

    def find_special(self, text: str) -> str | None:
        """The first special token, EOD among them, that the text spells."""
        found = self._special.search(text)
        return found[0] if found else None

    @functools.cached_property
    def _special(self) -> re.Pattern[str]:
        added = self._tokenizer.get_added_tokens_decoder().values()
        return re.compile("|".join(re.escape(token.content) for token in added if token.special))

    @functools.cached_property
    def _reads_markup(self) -> tokenizers.Tokenizer:
        copy = tokenizers.Tokenizer.from_str(self._tokenizer.to_str())
        copy.encode_special_tokens = False
        return copy

    def end_of_tokens(self, text: str, tokens: int, begin: int = 0) -> int:
        """Character of `text` at which the first `tokens` tokens from `begin` on end; len(text) when it has no more.

        At least one character further, and never within one, so an emoji of four tokens can be one too many.
        Cost: tokenizes no more than a few times as much as it finds.
        """
        characters = CHARACTERS_PER_TOKEN * tokens
        while True:
            offsets = self._tokenizer.encode(text[begin : begin + characters], add_special_tokens=False).offsets
            if len(offsets) > tokens:
                return begin + max(min(offsets[tokens - 1][1], offsets[tokens][0]), 1)
            if begin + characters >= len(text):
                return len(text)
            characters *= 2

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids; special tokens are spelled out."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=False)

    @property
    def dtype(self) -> type[numpy.uint16] | type[numpy.int32]:
        """Smallest type of Megatron's `.bin` files that holds every id."""
        return numpy.uint16 if self.vocab_size <= 1 << 16 else numpy.int32


def token_of(path: str | Path, number: int) -> str | None:
    """The token with this id in a tokenizer file, None where it has none. Raises InputError for a file that is none."""
    try:
        return tokenizers.Tokenizer.from_file(str(path)).id_to_token(number)
    except Exception as error:  # the Rust library raises Exception itself
        raise InputError(f"tokenizer {path}: {error}; expected a Hugging Face tokenizer.json") from error


def train_tokenizer(texts: Iterable[str], path: Path, vocab_size: int, eod_token: str = DEFAULT_EOD) -> None:
    """Train a byte-level BPE, of at most `vocab_size` tokens with the EOD token among them, and save it to `path`.

    The same texts give the same file. It knows all 256 bytes, so any text round-trips.
    """
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[eod_token],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.save(str(path))


_worker_tokenizer: Tokenizer


def start_worker(path: str, eod_token: str) -> Tokenizer:
    """Initialise a process that encodes: one thread each, gone when its parent is. Returns its tokenizer."""
    global _worker_tokenizer
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _worker_tokenizer = Tokenizer(path, eod_token)
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    return _worker_tokenizer


def _exit_with_parent() -> None:
    # A parent killed with SIGKILL cannot tell its children, which would wait for work for ever.
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def encode_in_worker(texts: Sequence[str]) -> tuple[numpy.ndarray, numpy.ndarray]:
    """`Tokenizer.encode_batch` in a process started by `start_worker`."""
    return _worker_tokenizer.encode_batch(texts)
