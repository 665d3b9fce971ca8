"""Support for old attribute names in custom classes, for one release."""

from __future__ import annotations

import warnings
from typing import Any


class Renamed:
    """A class attribute under its old name: reading it warns and returns the attribute with the new name.

    Args:
        new: The new name.
    """

    def __init__(self, new: str) -> None:
        self.new = new

    def __set_name__(self, owner: type, name: str) -> None:
        self.old = name

    def __get__(self, instance: object | None, owner: type) -> Any:
        self.warn(owner)
        return getattr(owner if instance is None else instance, self.new)

    def warn(self, owner: type) -> None:
        """Warn that the attribute has a new name."""
        warnings.warn(f"`{owner.__name__}.{self.old}` is now `{self.new}`. Use that name.", FutureWarning, stacklevel=3)


def adopt_old_names(owner: type) -> None:
    """Copy attributes that a subclass defines under old names to the new names, and warn.

    Args:
        owner: The subclass, passed by its `__init_subclass__`.
    """
    for base in owner.__mro__[1:]:
        for old, renamed in vars(base).items():
            if isinstance(renamed, Renamed) and old in vars(owner):
                renamed.warn(owner)
                setattr(owner, renamed.new, vars(owner)[old])
