"""Mappings and lists that refuse to change, and are otherwise as those they were made of: equal, printed alike."""

from collections.abc import Mapping
from typing import Any, NoReturn

DEEPEST = 100
"""Most mappings and lists within each other. Python's own limit would be another one in every place that walks through."""


def frozen(value: Any, depth: int = 0) -> Any:
    """A copy that cannot be changed of mappings and lists, and of those within; all else as it is.

    Raises:
        ValueError: if more than 100 are within each other.
    """
    if depth > DEEPEST:
        raise ValueError(f"`metadata` must not nest more than {DEEPEST} mappings and lists. Found more. Flatten it.")
    if isinstance(value, Mapping):
        return FrozenDict({key: frozen(part, depth + 1) for key, part in value.items()})
    if isinstance(value, list):
        return FrozenList(frozen(part, depth + 1) for part in value)
    return tuple(frozen(part, depth + 1) for part in value) if type(value) is tuple else value


def _refuse(*_: Any, **__: Any) -> NoReturn:
    raise TypeError(
        "A prompt's `metadata` must stay as it is: rewards share it. Found an attempt to change it. "
        "Change a copy: json.loads(json.dumps(prompt.metadata))."
    )


class FrozenDict(dict[Any, Any]):
    """A dict that refuses to change."""

    __slots__ = ()
    __setitem__ = __delitem__ = __ior__ = clear = pop = popitem = setdefault = update = _refuse  # type: ignore[assignment]

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled as a whole; pickle would fill an empty one."""
        return FrozenDict, (dict(self),)


class FrozenList(list[Any]):
    """A list that refuses to change."""

    __slots__ = ()
    __setitem__ = __delitem__ = __iadd__ = __imul__ = _refuse  # type: ignore[assignment]
    append = clear = extend = insert = pop = remove = reverse = sort = _refuse  # type: ignore[assignment]

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled as a whole; pickle would fill an empty one."""
        return FrozenList, (list(self),)
