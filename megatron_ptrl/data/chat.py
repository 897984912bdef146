"""Chat messages -> the text and the tokens that a model reads and writes."""

from collections.abc import Sequence
from typing import Protocol

Message = dict[str, str]


class ChatTemplate(Protocol):
    """How a conversation is written for a model."""

    name: str

    def render(self, messages: Sequence[Message], *, ask: bool) -> str:
        """The conversation as text; with `ask` up to where the assistant's next turn begins."""


class PlainTemplate:
    """Turns headed by their role, in ordinary text that any tokenizer knows; an end-of-document token ends a response.

    <|user|>
    content
    <|assistant|>
    content
    """

    name = "plain"

    def render(self, messages: Sequence[Message], *, ask: bool) -> str:
        turns = [f"<|{message['role']}|>\n{message['content']}\n" for message in messages]
        return "".join(turns) + ("<|assistant|>\n" if ask else "")
