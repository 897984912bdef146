"""argv and YAML -> a stage's config dataclass. jsonargparse does the parsing; this file names the nearest field.

`--config FILE` reads YAML, any field is a dotted flag (`--loss.beta -0.25`), `--print_config` prints the whole.
"""

import dataclasses
import difflib
import json
import re
import typing
from argparse import SUPPRESS
from typing import Any

from jsonargparse import ArgumentParser, set_parsing_settings

from megatron_ptrl.config import ModelConfig, RunConfig
from megatron_ptrl.errors import InputError

set_parsing_settings(docstring_parse_attribute_docstrings=True)

_UNKNOWN_KEY = re.compile(
    r"(?:Group '(?P<group>[\w.]+)' does not accept )?(?:Key|[Oo]ption|Nested key) '(?P<key>[\w.]+)'"
    r"|[Uu]nrecognized arguments: --(?P<flag>[\w.-]+)"
)


class _Parser(ArgumentParser):
    """Raises instead of printing the usage: a wrong key gets one line, like every other bad input."""

    def error(self, message: str, ex: Exception | None = None) -> typing.NoReturn:
        raise InputError(" ".join(message.split()))

    def dump(self, cfg: Any, **options: Any) -> str:
        """YAML of `cfg`; jsonargparse drops what the help page hides, of which the fields that were set must stay."""
        defaults = self.get_defaults()
        for action in self._actions:
            if action.help == SUPPRESS and action.dest in cfg and cfg[action.dest] != defaults[action.dest]:
                action.help = ""
        return super().dump(cfg, **options)


def parse(config_class: type, argv: list[str], *, prog: str, positional: str | None = None) -> Any:
    """`config_class` filled from flags and YAML; `positional` is the list field that bare arguments go to.

    Raises InputError for a key that does not exist (naming the nearest one) or a value of the wrong type.
    """
    lists, switches = _fields_of_type("list[", config_class), _fields_of_type("bool", config_class)
    flags, bare = _complete_values(argv, lists, switches)
    if bare and positional is None:
        raise InputError(f"{' '.join(bare)} stands behind no flag; expected --field value, --help lists the fields")
    parser = _Parser(prog=prog, description=config_class.__doc__, exit_on_error=True, allow_abbrev=False)
    parser.add_argument("--config", action="config", help="YAML file with any of the fields below.")
    parser.add_class_arguments(_with_megatron_fields(config_class), None, as_group=True)
    _hide_undocumented(parser)
    fields = [action.dest for action in parser._actions]
    try:
        values = parser.parse_args(flags)
        config = parser.instantiate_classes(values)
    except InputError as error:
        raise InputError(_name_nearest(str(error), fields)) from None
    except UnicodeDecodeError:
        raise InputError("the file that --config names is no text; expected YAML with fields of this stage") from None
    settings = {key: value for key, value in vars(config).items() if key in _field_names(config_class)}
    if bare:
        settings[typing.cast(str, positional)] = bare
    return config_class(**settings)


def _fields_of_type(words: str, config_class: type, prefix: str = "") -> set[str]:
    """Dotted names of the fields whose type contains `words`."""
    found = set()
    for name, hint in typing.get_type_hints(config_class).items():
        if dataclasses.is_dataclass(hint):
            found |= _fields_of_type(words, typing.cast(type, hint), f"{prefix}{name}.")
        elif words in str(hint):
            found.add(prefix + name)
    return found


def _complete_values(argv: list[str], lists: set[str], switches: set[str]) -> tuple[list[str], list[str]]:
    """Flags as jsonargparse takes them, and the bare words between them.

    `--input A B` -> `--input=["A", "B"]`, a bare `--dry_run` -> `--dry_run=true`.
    """
    flags, bare = [], []
    for flag, values in _by_flag(argv):
        name = flag.removeprefix("--")
        if not flag.startswith("-"):
            bare += [flag, *values]
        elif name in lists and not (len(values) == 1 and (values[0].startswith("[") or values[0] == "null")):
            flags.append(f"{flag}={json.dumps(values)}")
        elif name in switches and not values:
            flags.append(f"{flag}=true")
        else:
            flags.append(f"{flag}={values[0]}" if values else flag)
            bare += values[1:]
    return flags, bare


def _by_flag(argv: list[str]) -> list[tuple[str, list[str]]]:
    """Each word that starts with `--`, and what stands behind its `=` or before the next one."""
    found: list[tuple[str, list[str]]] = []
    for word in argv:
        if word.startswith("--") or word == "-h" or not found:
            flag, equals, value = word.partition("=")
            found.append((flag, [value] if equals else []))
        else:
            found[-1][1].append(word)
    return found


def _field_names(config_class: type) -> set[str]:
    return {field.name for field in dataclasses.fields(config_class)}


def _name_nearest(message: str, fields: list[str]) -> str:
    if message.startswith("Unexpected config:"):
        return "the file that --config names has no fields in it; expected YAML with fields of this stage"
    found = _UNKNOWN_KEY.search(message)
    if not found:
        return message
    key = ".".join(part for part in found.groups() if part)
    known = fields + [f for name in fields for f in [name.rpartition(".")[2]] if f != name]
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    near = near or difflib.get_close_matches(key.rpartition(".")[2], known, n=1, cutoff=0.6)
    whole = next((f for f in fields if near and (f == near[0] or f.endswith("." + near[0]))), None)
    hint = f"; the nearest field is {whole}" if whole else ""
    return f"there is no configuration key {key}{hint}; --help lists them all"


def _with_megatron_fields(config_class: type) -> type:
    """`config_class`, its `model` extended by the fields of Megatron-Core's TransformerConfig that YAML can hold."""
    if not issubclass(config_class, RunConfig):
        return config_class
    from megatron_ptrl.training.mcore import transformer_fields

    extra = [
        (field.name, hint, dataclasses.field(default=field.default))
        for field, hint in transformer_fields()
        if field.name not in _field_names(ModelConfig)
    ]
    model = dataclasses.make_dataclass("ModelConfig", extra, bases=(ModelConfig,), frozen=True, kw_only=True)
    model.__doc__ = ModelConfig.__doc__
    replaced = ("model", model, dataclasses.field(default_factory=model))
    whole = dataclasses.make_dataclass(
        config_class.__name__, [replaced], bases=(config_class,), frozen=True, kw_only=True
    )
    whole.__doc__ = config_class.__doc__
    return whole


def _hide_undocumented(parser: ArgumentParser) -> None:
    """Megatron-Core's own 200 fields work but are documented there; a help page with them hides ours."""
    own = _field_names(ModelConfig)
    for action in parser._actions:
        group, _, name = action.dest.rpartition(".")
        if group == "model" and name not in own:
            action.help = SUPPRESS
