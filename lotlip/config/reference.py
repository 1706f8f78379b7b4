"""docs/params.md, made from the configuration types: every key with type, default, limits and meaning.

`python -m lotlip.config.reference` (or `make docs`) writes it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic import BaseModel, PlainValidator
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from lotlip.config.params import Params

PAGE = Path("docs/params.md")
_SIGNS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<", "min_length": "length ≥", "max_length": "length ≤"}
_HEAD = """# Every key of params.yaml

This page is generated from the types in `lotlip/config`: do not edit it, run `make docs`. A key that is not here is an
error. Keys marked "required" have no default. `NAME` stands for a name that you choose. Where a section has several
kinds, `kind` chooses one, and each kind has its own table.
"""


@dataclass(frozen=True)
class Key:
    """One key: its dotted name, type, default, limits and meaning, as text; `default` is empty where it is required."""

    name: str
    type: str
    default: str
    limits: str
    meaning: str


@dataclass(frozen=True)
class Group:
    """The keys of one section: its dotted name, its kind where it has several, and its docstring."""

    name: str
    kind: str
    about: str
    keys: list[Key]


def groups(model: type[BaseModel] = Params, name: str = "", kind: str = "") -> Iterator[Group]:
    """Every section below a type, depth first; those of a discriminated union one after another."""
    keys, below = [], []
    for field_name, info in model.model_fields.items():
        full = f"{name}.{field_name}" if name else field_name
        keys.append(Key(full, _type(_whole(info)), _default(info), _limits(_whole(info)), _meaning(info)))
        below += [(section, place) for section, place in _sections(_whole(info), full)]
    yield Group(name, kind, " ".join((model.__doc__ or "").split()), keys)
    for section, place in below:
        yield from groups(section, place, _kind(section))


def reference() -> str:
    """The page, as Markdown."""
    lines = [_HEAD]
    for group in groups():
        title = f"`{group.name}`" if group.name else "The file"
        lines += [f"## {title}{f', kind `{group.kind}`' if group.kind else ''}\n", f"{_cell(group.about)}\n"]
        lines += ["| key | type | default | limits | meaning |", "|---|---|---|---|---|"]
        lines += [
            f"| `{key.name}` | {_cell(key.type)} | {_cell(key.default)} | {_cell(key.limits)} | {_cell(key.meaning)} |"
            for key in group.keys
        ]
        lines.append("")
    return "\n".join(lines)


def _whole(info: FieldInfo) -> Any:
    """A field's type together with its limits."""
    return Annotated[info.annotation, *info.metadata] if info.metadata else info.annotation


def _parts(kind: Any) -> tuple[Any, list[Any]]:
    """A type without its annotations, and those."""
    if get_origin(kind) is Annotated:
        inner, *more = get_args(kind)
        bare, below = _parts(inner)
        return bare, [*below, *more]
    return kind, []


def _is_union(kind: Any) -> bool:
    return get_origin(kind) in (Union, UnionType)


def _sections(kind: Any, place: str) -> Iterator[tuple[type[BaseModel], str]]:
    """The sections inside a type and where they stand."""
    bare, _ = _parts(kind)
    if isinstance(bare, type) and issubclass(bare, BaseModel):
        yield bare, place
    elif get_origin(bare) is dict:
        yield from _sections(get_args(bare)[1], f"{place}.NAME")
    elif _is_union(bare):
        for option in get_args(bare):
            yield from _sections(option, place)


def _kind(section: type[BaseModel]) -> str:
    field = section.model_fields.get("kind")
    return " or ".join(map(str, get_args(field.annotation))) if field else ""


def _type(kind: Any) -> str:
    bare, notes = _parts(kind)
    if any(isinstance(note, PlainValidator) for note in notes) and _is_union(bare):
        return " or ".join(_type(option) for option in get_args(bare))
    if _is_union(bare):
        options = [_type(option) for option in get_args(bare)]
        return " or ".join(dict.fromkeys(options))
    origin = get_origin(bare)
    if origin is Literal:
        return " or ".join(f"`{json.dumps(option, allow_nan=False)}`" for option in get_args(bare))
    if origin is list:
        return f"list of {_type(get_args(bare)[0])}"
    if origin is tuple:
        return f"list of {len(get_args(bare))}: {', '.join(_type(option) for option in get_args(bare))}"
    if origin is dict:
        return f"mapping: name → {_type(get_args(bare)[1])}"
    if isinstance(bare, type) and issubclass(bare, BaseModel):
        return "section"
    simple = {int: "integer", float: "number", str: "text", bool: "true or false", Path: "path", NoneType: "null"}
    return simple.get(bare, "any value")


def _limits(kind: Any) -> str:
    """Limits of a type and of what it is made of."""
    bare, notes = _parts(kind)
    found = []
    flat = [one for note in notes for one in (note.metadata if isinstance(note, FieldInfo) else [note])]
    for note in flat:
        for name, sign in _SIGNS.items():
            value = getattr(note, name, None)
            if value is not None and isinstance(note, annotated_types.BaseMetadata | annotated_types.GroupedMetadata):
                found.append(f"{sign} {value}")
        if pattern := getattr(note, "pattern", None):
            found.append(f"pattern `{pattern}`")
    if not (isinstance(bare, type) and issubclass(bare, BaseModel)) and get_origin(bare) is not Literal:
        for option in get_args(bare):
            found += [limit for limit in _limits(option).split("; ") if limit]
    return "; ".join(dict.fromkeys(found))


def _default(info: FieldInfo) -> str:
    if info.is_required():
        return "required"
    value = info.get_default(call_default_factory=True)  # type: ignore[call-arg]
    if value is PydanticUndefined:
        return "required"
    if isinstance(value, BaseModel):
        return f"kind `{kind}`" if (kind := getattr(value, "kind", "")) else "the defaults below"
    plain = str(value) if isinstance(value, Path) else value
    return f"`{json.dumps(plain, ensure_ascii=False, allow_nan=False)}`"


def _meaning(info: FieldInfo) -> str:
    """The description; of a section without one, the section's own; of `kind`, that it chooses."""
    if info.description:
        return info.description
    bare, _ = _parts(info.annotation)
    if get_origin(bare) is Literal and len(get_args(bare)) == 1:
        return "chooses this kind of section"
    if isinstance(bare, type) and issubclass(bare, BaseModel):
        return " ".join((bare.__doc__ or "").split())
    return ""


def _cell(text: str) -> str:
    return text.replace("|", r"\|").replace("<", "&lt;").replace("\n", " ")


if __name__ == "__main__":
    PAGE.write_text(reference(), encoding="utf-8")
    print(f"wrote {PAGE}")
