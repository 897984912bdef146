"""How the dataclasses refuse a value."""

from megatron_ptrl.errors import InputError


def require(condition: bool, message: str) -> None:
    """Raise InputError with `message` unless `condition`."""
    if not condition:
        raise InputError(message)
