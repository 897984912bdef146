"""Instruction files -> conversations: a list of messages from each line of JSONL.

    {"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}, ...]}
    {"prompt": ..., "response": ...}
    {"instruction": ..., "input": ..., "output": ...}      input may be missing; it follows after a blank line

Other fields of a record are passed over.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from megatron_ptrl.data.chat import Message
from megatron_ptrl.data.corpus import Rejects, find_files, uncompressed
from megatron_ptrl.errors import InputError

ROLES = ("system", "user", "assistant")
_SUFFIXES = tuple(text + packed for text in (".jsonl", ".json") for packed in ("", ".gz", ".zst"))


def find_conversation_files(inputs: Iterable[str], field: str) -> list[Path]:
    """The JSONL files named, and those in the folders named. Raises InputError for none, or one of another kind."""
    inputs = list(inputs)
    if not inputs:
        raise InputError(f"{field} is empty; expected JSONL files of conversations")
    files = find_files(inputs)
    other = next((file for file in files if not file.name.endswith(_SUFFIXES)), None)
    if other:
        raise InputError(f"{field}: {other} is no JSONL; expected conversations in {' '.join(_SUFFIXES)}")
    return files


def read_conversations(files: Iterable[Path], rejects: Rejects) -> Iterator[tuple[list[Message], str, int]]:
    """(messages, file, line) of every usable line; each has a response, and none is empty.

    Blank lines are passed over, what is wrong goes to the rejects. Raises InputError for a file that cannot be read to
    its end.
    """
    for file in files:
        try:
            with file.open("rb") as raw, uncompressed(file.name, raw) as stream:
                for line, content in enumerate(stream, start=1):
                    if content.strip():
                        try:
                            messages = messages_of(content.removeprefix(b"\xef\xbb\xbf"))
                        except _Unusable as reason:
                            rejects.add(str(file), line, str(reason))
                        else:
                            yield messages, str(file), line
        except (OSError, EOFError) as error:
            raise InputError(f"{file}: cannot be read to its end: {error}") from error


class _Unusable(Exception):
    """Why a line is put aside."""


def messages_of(content: bytes) -> list[Message]:
    """The messages of one line of JSON; raises the reason against it."""
    try:
        record = json.loads(content)
        # Escapes can spell half of a surrogate pair, which no tokenizer reads.
        json.dumps(record, ensure_ascii=False).encode("utf-8")
    except UnicodeError as error:
        raise _Unusable("invalid UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise _Unusable("not JSON") from error
    if not isinstance(record, dict):
        raise _Unusable("not a JSON object")
    if "messages" in record:
        messages = record["messages"]
    elif "prompt" in record and "response" in record:
        messages = _exchange(record["prompt"], record["response"])
    elif "instruction" in record and "output" in record:
        question = [record["instruction"], record["input"]] if record.get("input") else [record["instruction"]]
        texts = all(isinstance(text, str) for text in question)
        messages = _exchange("\n\n".join(question) if texts else None, record["output"])
    else:
        raise _Unusable("no messages, no prompt and response, no instruction and output")
    return _checked(messages)


def _exchange(prompt: Any, response: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]


def _checked(messages: Any) -> list[Message]:
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise _Unusable("messages is not a list of objects")
    for message in messages:
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise _Unusable(f"role {json.dumps(role)[:40]}; expected {', '.join(ROLES)}")
        if not isinstance(content, str):
            raise _Unusable(f"the content of role {role} is not a string")
        if not content.strip():
            raise _Unusable("empty response" if role == "assistant" else f"empty content of role {role}")
    if not any(message["role"] == "assistant" for message in messages):
        raise _Unusable("no response: no message has the role assistant")
    return [{"role": message["role"], "content": message["content"]} for message in messages]
