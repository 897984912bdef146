"""Chat templates as Hugging Face models bring them: Jinja, run in a sandbox."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from megatron_ptrl.data.chat import Message
from megatron_ptrl.errors import InputError


class _Generation(Extension):
    """`{% generation %}` marks responses for other trainers; here it writes what it holds."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class JinjaTemplate:
    """The chat template of a `tokenizer_config.json`, or of a `.jinja` file with such a config beside it or none.

    eos_token: the template's `eos_token` where no config names one
    Templates see `messages`, `add_generation_prompt`, the config's special tokens and `raise_exception`, and no clock:
    the same conversation is the same text on any day.
    """

    markup = True

    def __init__(self, path: Path, *, eos_token: str) -> None:
        self.name = str(path)
        config = _config(path if path.suffix == ".json" else path.with_name("tokenizer_config.json"))
        source = _read(path) if path.suffix == ".jinja" else _of_config(path, config)
        self._tokens = {"eos_token": eos_token} | _special_tokens(config)
        self.identity = hashlib.sha256(json.dumps([source, self._tokens]).encode()).hexdigest()
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
        )
        environment.globals["raise_exception"] = _raise
        environment.filters["tojson"] = _to_json
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise InputError(f"data.template {path}: {error}; expected a Jinja chat template") from error

    def render(self, messages: Sequence[Message], *, ask: bool) -> str:
        """As `ChatTemplate.render`. Raises InputError where the template refuses the conversation."""
        try:
            return self._template.render(messages=list(messages), add_generation_prompt=ask, **self._tokens)
        except (jinja2.TemplateError, TypeError) as error:
            raise InputError(f"template {self.name} refuses the conversation: {error}") from error


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _to_json(value: Any, indent: int | None = None) -> str:
    # Jinja's own escapes for HTML.
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"data.template {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"data.template {path}: not UTF-8; expected a Jinja chat template") from error


def _config(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        config = json.loads(_read(path))
    except ValueError as error:
        raise InputError(f"{path}: not JSON; expected a tokenizer_config.json") from error
    if not isinstance(config, dict):
        raise InputError(f"{path}: no JSON object; expected a tokenizer_config.json")
    return config


def _of_config(path: Path, config: dict[str, Any]) -> str:
    found = config.get("chat_template")
    if isinstance(found, list):
        found = next((entry.get("template") for entry in found if entry.get("name") == "default"), None)
    if not isinstance(found, str):
        raise InputError(
            f"data.template {path}: no such file, or no chat_template in it; expected a tokenizer_config.json with "
            "one, or the chat_template.jinja that newer models have beside it"
        )
    return found


def _special_tokens(config: dict[str, Any]) -> dict[str, str]:
    """bos_token and the like, which are strings or objects with a `content`."""
    named = {name: value for name, value in config.items() if name.endswith("_token")}
    texts = {name: value.get("content") if isinstance(value, dict) else value for name, value in named.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}
