"""Checks of values, with errors that name the setting."""

from __future__ import annotations

from typing import Any, get_args


def require(condition: bool, requirement: str, value: object) -> None:
    """Raise an error unless a condition holds.

    Args:
        condition: Whether the value is valid.
        requirement: Text of the requirement, such as "`steps` must be >= 1".
        value: The value, for the error message.

    Raises:
        ValueError: The condition is false; the message has the requirement and the value.
    """
    if not condition:
        raise ValueError(f"{requirement}. Found {value}.")


def require_positive(**sizes: int) -> None:
    """Raise an error unless all settings are >= 1.

    Raises:
        ValueError: One is not; the message has its name and value.
    """
    for name, size in sizes.items():
        require(size >= 1, f"`{name}` must be >= 1", size)


def require_one_of(choices: Any, name: str, value: str) -> None:
    """Raise an error unless a value is one of a Literal's.

    Args:
        choices: The Literal.
        name: Name of the setting, for the error message.
        value: The value.

    Raises:
        ValueError: The value is not one of the choices.
    """
    require(value in get_args(choices), f"{name} must be one of {', '.join(get_args(choices))}", repr(value))
