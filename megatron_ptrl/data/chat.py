"""Chat messages -> the text and the tokens that a model reads and writes.

    messages --ChatTemplate.render--> text --cut where responses begin and end, each part tokenized apart--> ids

`encode_prompt` asks a model; `encode_chat` gives what it was trained on before that moment, token by token: no token
reaches over the place where a response begins, and earlier responses end as the model ends them, with the
end-of-document token.
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy

from megatron_ptrl.data.tokenizer import Tokenizer
from megatron_ptrl.errors import InputError

Message = dict[str, str]
Part = tuple[str, bool]
"""Text, and whether it is a response, behind which the end-of-document token follows."""
Encoded = tuple[numpy.ndarray, numpy.ndarray]
"""Token ids, int32, and whether each is of a response, bool."""


class Rewritten(InputError):
    """A template that writes earlier turns otherwise than when they were asked for, as without their thinking."""


class ChatTemplate(Protocol):
    """How a conversation is written for a model."""

    name: str
    identity: str
    """Templates that write the same have the same one."""
    markup: bool
    """Whether the names of special tokens in what it writes mean those tokens."""

    def render(self, messages: Sequence[Message], *, ask: bool) -> str:
        """The conversation as text; with `ask` up to where the assistant's next turn begins."""


class PlainTemplate:
    """Turns headed by their role, in ordinary text that any tokenizer knows; an end-of-document token ends a response.

    <|user|>
    content
    <|assistant|>
    content
    """

    name = identity = "plain"
    markup = False

    def render(self, messages: Sequence[Message], *, ask: bool) -> str:
        turns = [f"<|{message['role']}|>\n{message['content']}\n" for message in messages]
        return "".join(turns) + ("<|assistant|>\n" if ask else "")


def make_template(name: str, tokenizer: Tokenizer) -> ChatTemplate:
    """`plain`, or the Jinja template of a tokenizer_config.json or .jinja file. Raises InputError for anything else."""
    if name == PlainTemplate.name:
        return PlainTemplate()
    if Path(name).suffix not in (".json", ".jinja"):
        raise InputError(
            f"data.template is {name}; expected plain, a tokenizer_config.json or a .jinja file of a Hugging Face model"
        )
    from megatron_ptrl.data.jinja_template import JinjaTemplate

    return JinjaTemplate(Path(name), eos_token=tokenizer.eod_token)


def encode_prompt(template: ChatTemplate, tokenizer: Tokenizer, messages: Sequence[Message]) -> numpy.ndarray:
    """Ids, int32, of the conversation up to where the assistant's next turn begins.

    Without earlier responses these are the ids of `template.render(messages, ask=True)`, and so they are where the
    template rewrites earlier turns. Raises InputError as `chat_parts` for anything else.
    """
    return next(encode_parts(template, tokenizer, [_prompt_parts(template, tokenizer, messages)]))[0]


def encode_chat(template: ChatTemplate, tokenizer: Tokenizer, messages: Sequence[Message]) -> Encoded:
    """(ids, is_response) up to the end of the last response, which is an end-of-document token, as all others' are.

    For every assistant turn k the ids begin with `encode_prompt(messages[:k])`, and is_response begins there. White
    space that a template puts at the end of a response belongs to what comes after it.
    Raises InputError as `chat_parts`, and for a response that holds the end-of-document token.
    """
    (encoded,) = encode_parts(template, tokenizer, [chat_parts(template, tokenizer, messages)])
    check_ends(encoded, tokenizer)
    return encoded


def chat_parts(
    template: ChatTemplate, tokenizer: Tokenizer, messages: Sequence[Message], *, ask: bool = False
) -> list[Part]:
    """The text of a conversation, cut where responses begin and end; with `ask` also what follows the last one.

    Raises InputError for a message that spells a special token where the template's names of them mean them, and for
    a template that rewrites earlier turns, leaves a response out or ends it by another token than `eod_token`.
    """
    _check_spelling(template, tokenizer, messages)
    parts: list[Part] = []
    done = ""
    for turn, message in enumerate(messages):
        if message["role"] == "assistant":
            question = _continued(template, messages[:turn], done, ask=True)
            answered = _continued(template, messages[: turn + 1], question, ask=False)
            response, written = _response(answered[len(question) :], template, tokenizer)
            parts += [(question[len(done) :], False), (response, True)]
            done = question + written
    if ask:
        parts.append((_continued(template, messages, done, ask=True)[len(done) :], False))
    return parts


def turns_apart(template: ChatTemplate, tokenizer: Tokenizer, messages: Sequence[Message]) -> list[list[Part]]:
    """For each response a conversation that ends with it, behind the prompt that `encode_prompt` asks with.

    For templates that rewrite earlier turns: what stands before a response is as the template has it at that moment.
    Raises InputError as `chat_parts` for anything else.
    """
    _check_spelling(template, tokenizer, messages)
    found: list[list[Part]] = []
    for turn, message in enumerate(messages):
        if message["role"] == "assistant":
            question = template.render(messages[:turn], ask=True)
            answered = _continued(template, messages[: turn + 1], question, ask=False)
            response, _ = _response(answered[len(question) :], template, tokenizer)
            found.append([*_prompt_parts(template, tokenizer, messages[:turn]), (response, True)])
    return found


def last_response(encoded: Encoded) -> Encoded:
    """`encoded` with no response marked but the last."""
    ids, is_response = encoded
    begin = numpy.flatnonzero(~is_response)[-1] + 1
    return ids, is_response & (numpy.arange(len(ids)) >= begin)


def _prompt_parts(template: ChatTemplate, tokenizer: Tokenizer, messages: Sequence[Message]) -> list[Part]:
    try:
        return chat_parts(template, tokenizer, messages, ask=True)
    except Rewritten:
        return [(template.render(messages, ask=True), False)]


def _check_spelling(template: ChatTemplate, tokenizer: Tokenizer, messages: Sequence[Message]) -> None:
    if template.markup:
        spelled = next(filter(None, (tokenizer.find_special(message["content"]) for message in messages)), None)
        if spelled:
            raise InputError(f"a message spells the special token {spelled}")


def _continued(template: ChatTemplate, messages: Sequence[Message], begin: str, *, ask: bool) -> str:
    text = template.render(messages, ask=ask)
    if not text.startswith(begin):
        raise Rewritten(
            f"template {template.name} rewrites what stood there when an earlier turn was asked for; data.turns apart "
            "trains on each response by itself, behind what the template writes before it"
        )
    return text


def _response(rest: str, template: ChatTemplate, tokenizer: Tokenizer) -> tuple[str, str]:
    """(the response, how much of `rest` it takes with the token that ends it)."""
    response = rest.rstrip()
    written = response
    if template.markup and tokenizer.eod_token in rest:
        response = rest.partition(tokenizer.eod_token)[0]
        written = response + tokenizer.eod_token
    elif template.markup and tokenizer.find_special(rest):
        raise InputError(
            f"template {template.name} ends a response with {tokenizer.find_special(rest)} and the end-of-document "
            f"token is {tokenizer.eod_token}; set data.eod_token to the one that ends a response"
        )
    if not response.strip():
        raise InputError(f"template {template.name} leaves a response out")
    return response, written


def encode_parts(template: ChatTemplate, tokenizer: Tokenizer, chats: Iterable[list[Part]]) -> Iterator[Encoded]:
    """Each conversation's ids and is_response; all texts are tokenized at once, by several threads."""
    chats = list(chats)
    ids, lengths = tokenizer.encode_batch([text for parts in chats for text, _ in parts], markup=template.markup)
    pieces = iter(numpy.split(ids.astype(numpy.int32), numpy.cumsum(lengths)[:-1]))
    end = numpy.array([tokenizer.eod], numpy.int32)
    for parts in chats:
        found = [(next(pieces), is_response) for _, is_response in parts]
        whole = [piece for piece, is_response in found for piece in ((piece, end) if is_response else (piece,))]
        marks = [numpy.full(len(piece) + is_response, is_response) for piece, is_response in found]
        yield numpy.concatenate(whole), numpy.concatenate(marks)


def check_ends(encoded: Encoded, tokenizer: Tokenizer) -> None:
    """InputError where the end-of-document token stands within a response: a model would learn to stop there."""
    ids, is_response = encoded
    ends = numpy.flatnonzero(is_response & (ids == tokenizer.eod))
    followed = numpy.append(is_response, False)[ends + 1]
    if followed.any():
        raise InputError("a response holds the end-of-document token")
