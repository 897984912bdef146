"""The configuration dataclasses -> docs/configuration.md: every field of every stage, its type, default and meaning.

    python docs/make_configuration.py

A group that several stages have with the same fields and defaults stands in the page once.
"""

import dataclasses
import functools
import html
import json
import re
import types
import typing
from pathlib import Path
from typing import Any

import docstring_parser

from megatron_ptrl import __main__ as stages
from megatron_ptrl import config

PAGE = Path(__file__).parent / "configuration.md"
HEAD = """# Configuration

Made by `python docs/make_configuration.py` from the dataclasses of `megatron_ptrl/config`: change those, not this page.

A field is a flag (`--loss.beta -0.25`) and a key of the file that `--config` names. A flag goes before the file, the
file before the default. `ptrl STAGE --print_config` prints all fields with the values that they have; an unknown one is
an error that names the nearest. Under `model.` any field of Megatron-Core's `TransformerConfig` works by its own name.

| stage | what it does |
|---|---|
"""
COLUMNS = "| field | type | default | meaning |\n|---|---|---|---|\n"


@dataclasses.dataclass(frozen=True)
class Group:
    """Fields that share a prefix."""

    name: str
    """The prefix, such as `loss`; empty for the fields of the stage itself."""
    about: str
    table: str


def render() -> str:
    """The page."""
    groups = {name: _groups(getattr(config, stage.config)) for name, stage in stages._STAGES.items()}
    users: dict[Group, list[str]] = {}
    for name, own in groups.items():
        for group in own:
            users.setdefault(group, []).append(name)
    shared = [group for group, names in users.items() if len(names) > 1]
    text = HEAD + "".join(
        f"| [{name}](#ptrl-{name}) | {_cell(stage.help)} |\n" for name, stage in stages._STAGES.items()
    )
    for name, own in groups.items():
        text += f"\n## ptrl {name}\n\n{_prose(getattr(config, stages._STAGES[name].config).__doc__)}\n"
        elsewhere = [f"[{group.name}](#{_anchor(group, users)})" for group in own if group in shared]
        text += f"\nFields that other stages have too: {', '.join(elsewhere)}.\n" if elsewhere else ""
        for group in own:
            if group not in shared:
                heading = f"\n### {name}: {group.name}\n\n{group.about}\n" if group.name else ""
                text += f"{heading}\n{group.table}"
    text += "\n## Shared by several stages\n"
    for group in shared:
        text += f"\n### {', '.join(users[group])}: {group.name}\n\n{group.about}\n\n{group.table}"
    return text


def _anchor(group: Group, users: dict[Group, list[str]]) -> str:
    """What the heading of a shared group is linked by, on the site and where the repository is read."""
    return re.sub(r"[:,]", "", f"{' '.join(users[group])} {group.name}").replace(" ", "-")


def _groups(stage: type) -> list[Group]:
    """The stage's own fields, then one group for each dataclass among them, nested ones within it."""
    defaults = _defaults(stage)
    own = "".join(_row(stage, name, value, "") for name, value in defaults.items() if not _nested(value))
    found = [Group("", "", COLUMNS + own)] if own else []
    for name, part in defaults.items():
        if _nested(part):
            rows = "".join(_rows(part, f"{name}."))
            found.append(Group(name, _prose(type(part).__doc__), COLUMNS + rows))
    return found


def _defaults(stage: type) -> dict[str, Any]:
    """By field: not every stage can be made of its defaults alone."""
    missing = dataclasses.MISSING
    return {
        field.name: field.default if field.default_factory is missing else field.default_factory()
        for field in dataclasses.fields(stage)
    }


def _rows(part: Any, prefix: str) -> typing.Iterator[str]:
    for field in dataclasses.fields(part):
        value = getattr(part, field.name)
        if _nested(value):
            yield from _rows(value, f"{prefix}{field.name}.")
        else:
            yield _row(type(part), field.name, value, prefix)


def _nested(value: Any) -> bool:
    return dataclasses.is_dataclass(value)


def _row(owner: type, name: str, value: Any, prefix: str) -> str:
    kind = _type(typing.get_type_hints(owner)[name])
    default = _cell(f"`{_value(value)}`")
    return f"| `{prefix}{name}` | {kind} | {default} | {_cell(_meanings(owner)[name])} |\n"


@functools.cache
def _meanings(owner: type) -> dict[str, str]:
    """The docstrings under the fields of a dataclass and of what it inherits from."""
    found: dict[str, str] = {}
    for cls in reversed(owner.__mro__[:-1]):
        found |= {p.arg_name: p.description or "" for p in docstring_parser.parse_from_object(cls).params}
    return found


def _type(hint: Any) -> str:
    arguments = typing.get_args(hint)
    origin = typing.get_origin(hint)
    if hint is types.NoneType:
        return "null"
    if origin is typing.Literal:
        return ", ".join(f"`{choice}`" for choice in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(_type, arguments))
    if origin is list:
        return f"list of {_type(arguments[0])}"
    if origin is dict:
        return "mapping"
    return str(hint.__name__)


def _value(value: Any) -> str:
    return value if isinstance(value, str) and value else json.dumps(value)


def _prose(text: str | None) -> str:
    """Text in which nothing but `code` means anything to Markdown."""
    parts = re.split(r"(`[^`]*`)", " ".join((text or "").split()))
    return "".join(part if i % 2 else re.sub(r"([*_<\[\]])", r"\\\1", part) for i, part in enumerate(parts))


def _cell(text: str) -> str:
    """The same in a table, where readers of Markdown differ about a bar in code."""
    return re.sub(r"`([^`]*[|][^`]*)`", lambda m: f"<code>{html.escape(m[1])}</code>", _prose(text)).replace(
        "|", "&#124;"
    )


if __name__ == "__main__":
    PAGE.write_text(render())
