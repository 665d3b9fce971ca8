"""Refusing values by name."""

from __future__ import annotations

from typing import Any, get_args


def require(holds: bool, what: str, found: object) -> None:
    """Refuse a value by its name.

    Raises:
        ValueError: It does not hold; with what must, and what was found.
    """
    if not holds:
        raise ValueError(f"{what}. Found {found}.")


def require_one_of(choices: Any, name: str, found: str) -> None:
    """Refuse a value that is none of a Literal's."""
    require(found in get_args(choices), f"{name} must be one of {', '.join(get_args(choices))}", repr(found))
