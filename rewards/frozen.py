"""Immutable mappings and lists that compare and print like the originals."""

from collections.abc import Mapping
from typing import Any, NoReturn

DEEPEST = 100
"""Maximum nesting of mappings and lists. Python's recursion limit would be reached at a different depth in each function."""


def freeze(value: Any, depth: int = 0) -> Any:
    """Copy mappings and lists recursively into immutable ones; return any other value unchanged.

    Raises:
        ValueError: if mappings and lists nest more than 100 levels deep.
    """
    if depth > DEEPEST:
        raise ValueError(f"`metadata` must not nest more than {DEEPEST} mappings and lists. Found more. Flatten it.")
    if isinstance(value, Mapping):
        return FrozenDict({key: freeze(part, depth + 1) for key, part in value.items()})
    if isinstance(value, list):
        return FrozenList(freeze(part, depth + 1) for part in value)
    return tuple(freeze(part, depth + 1) for part in value) if type(value) is tuple else value


def _refuse(*_: Any, **__: Any) -> NoReturn:
    raise TypeError(
        "A prompt's `metadata` must stay as it is: rewards share it. Found an attempt to change it. "
        "Change a copy: json.loads(json.dumps(prompt.metadata))."
    )


class FrozenDict(dict[Any, Any]):
    """A dict that raises TypeError on every attempt to change it."""

    __slots__ = ()
    __setitem__ = __delitem__ = __ior__ = clear = pop = popitem = setdefault = update = _refuse  # type: ignore[assignment]

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the whole dict at once; by default pickle would add items to an empty dict."""
        return FrozenDict, (dict(self),)


class FrozenList(list[Any]):
    """A list that raises TypeError on every attempt to change it."""

    __slots__ = ()
    __setitem__ = __delitem__ = __iadd__ = __imul__ = _refuse  # type: ignore[assignment]
    append = clear = extend = insert = pop = remove = reverse = sort = _refuse  # type: ignore[assignment]

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the whole list at once; by default pickle would append items to an empty list."""
        return FrozenList, (list(self),)
