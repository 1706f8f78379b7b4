"""Base class, types and helpers for the sections of params.yaml."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from types import NoneType
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Precision = Literal["fp32", "bf16"]
# numpy takes no others.
Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]
Port = Annotated[int, Field(ge=1, le=65535)]
# A commit on the model hub: branches and tags move.
Commit = Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")]
# YAML 1.2, which DVC reads, takes these for numbers, and YAML 1.1 for text.
_NUMBER = re.compile(r"[0-9][0-9_]*e-?[0-9]+|0o[0-7]+")


def _no_number(name: str) -> str:
    if _NUMBER.fullmatch(name):
        raise ValueError(f"should be a name that is no number in YAML 1.2, such as n-{name}")
    return name


# It becomes part of file names; filesystems limit their length.
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$", max_length=64), AfterValidator(_no_number)]


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
    """A section of params.yaml: frozen; an unknown key is an error.

    So is a boolean where a number belongs, and an infinite number or NaN.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _refuse_booleans_as_numbers(cls, data: Any) -> Any:
        """Replaces booleans by text, which numbers refuse; pydantic would take true for 1."""
        if not isinstance(data, Mapping):
            return data
        numbers = _number_fields(cls)
        return {name: _booleans_as_text(value) if name in numbers else value for name, value in data.items()}


@cache
def _number_fields(section: type[Section]) -> frozenset[str]:
    """The fields of a section that take numbers, or lists or mappings of numbers, and nothing else but null."""
    kinds = {name: {*_kinds(field.annotation)} - {NoneType} for name, field in section.model_fields.items()}
    return frozenset(name for name, found in kinds.items() if found and found <= {int, float})


def _kinds(annotation: Any) -> Iterator[Any]:
    """The types of an annotation's values, such as int and NoneType for `dict[str, int] | None`."""
    if get_origin(annotation) is Literal:
        yield from map(type, get_args(annotation))
    elif get_origin(annotation) is Annotated:
        yield from _kinds(get_args(annotation)[0])
    elif parts := get_args(annotation):
        for part in parts[1:] if get_origin(annotation) is dict else parts:
            yield from _kinds(part)
    else:
        yield annotation


def _booleans_as_text(value: Any) -> Any:
    if isinstance(value, list):
        return [_booleans_as_text(item) for item in value]
    if isinstance(value, Mapping):
        return {key: _booleans_as_text(item) for key, item in value.items()}
    return str(value).lower() if isinstance(value, bool) else value


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
