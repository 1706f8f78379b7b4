"""Base class, types and helpers for the sections of params.yaml."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field

Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Port = Annotated[int, Field(ge=1, le=65535)]
# A commit on the model hub: branches and tags move.
Commit = Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")]
# It becomes part of file names; filesystems limit their length.
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$", max_length=64)]


class ConfigError(ValueError):
    """params.yaml is not valid; the message lists every problem with its key and remedy.

    Args:
        message: names what is not valid.
        problems: one line per problem.
    """

    def __init__(self, message: str, problems: Sequence[str] = ()) -> None:
        super().__init__("\n  - ".join([message, *problems]))
        self.problems = list(problems)


class Section(BaseModel):
    """A section of params.yaml: frozen; an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


SectionT = TypeVar("SectionT", bound=Section)


def merge(base: Mapping[str, Any], differences: Mapping[str, Any]) -> dict[str, Any]:
    """`base` updated with `differences`: mappings are merged recursively, other values are replaced."""
    merged = dict(base)
    for key, value in differences.items():
        old = merged.get(key)
        merged[key] = merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged


def flatten(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flattens nested mappings to one level with dotted keys.

    >>> flatten({"text": {"corner_tokens": 2}, "steps": 5})
    {'text.corner_tokens': 2, 'steps': 5}
    """
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of an error about an unknown name: "; did you mean 'steps'?", or "" if no known name is similar."""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {matches[0]!r}?" if matches else ""
