"""Names of values in nested objects: a dot leads into an object or, with a number from 0, to an element of a list."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

_SHOWN = 20
_ELEMENTS = 100  # of a list, whose values have names
_DEEPEST = 20  # levels


def values_at(value: Any, name: str) -> list[tuple[str, Any]]:
    """The values at a name, each with a suffix that distinguishes it: "" or "#0", "#1", …

    A list without an index gives all its elements, an empty list gives one null.

    >>> record = {"turns": [{"text": "Hello"}, {"text": "Bye"}]}
    >>> values_at(record, "turns.1.text"), values_at(record, "turns.text")
    ([('', 'Bye')], [('#0', 'Hello'), ('#1', 'Bye')])

    Raises:
        LookupError: there is no value at that name.
    """
    first, _, rest = name.partition(".")
    if value is None:
        return [("", None)]
    if isinstance(value, list) and first.isdecimal():
        return values_at(value[int(first)], rest)
    if isinstance(value, list):
        elements = [(f"#{i}{index}", one) for i, item in enumerate(value) for index, one in values_at(item, name)]
        return elements or [("", None)]
    if not name:
        return [("", value)]
    if not isinstance(value, dict):
        raise LookupError
    if name in value:  # a key may contain a dot
        return values_at(value[name], "")
    return values_at(value[first], rest)


def leaf_names(value: Mapping[str, Any] | list[Any], prefix: str = "") -> Iterator[str]:
    """The names of an object's texts, numbers, nulls, and lists of such.

    >>> list(leaf_names({"id": 1, "tags": ["a", "b"], "turns": [{"text": "Hello"}, {"text": "Bye"}]}))
    ['id', 'tags', 'turns.0.text', 'turns.1.text']
    """
    for name, part in value.items() if isinstance(value, Mapping) else enumerate(value[:_ELEMENTS]):
        parts = part if isinstance(part, list) else []
        if not isinstance(part, dict) and not any(isinstance(item, dict | list) for item in parts):
            yield f"{prefix}{name}"
        elif "." not in str(name) and prefix.count(".") < _DEEPEST:  # a name does not say which of its dots lead on
            yield from leaf_names(part, f"{prefix}{name}.")


def listed(names: Sequence[str]) -> str:
    """Names for a message: the first ones, and how many more there are."""
    more = [f"… {len(names) - _SHOWN} more"] if len(names) > _SHOWN else []
    return ", ".join([*(str(name) for name in names[:_SHOWN]), *more]) or "none"
