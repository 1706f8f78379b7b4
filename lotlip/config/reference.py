"""Generates docs/params.md from the configuration types: every key with type, default, limits and meaning.

`python -m lotlip.config.reference` (or `make docs`) writes the page.
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

This page is generated from the types in `lotlip/config`: do not edit it, run `make docs`. Any other key is an error.
Keys marked "required" have no default. `NAME` stands for a name that you choose. If a section has several kinds, `kind`
chooses one, and each kind has its own table.
"""


@dataclass(frozen=True)
class Key:
    """One key: its dotted name, type, default (or "required"), limits and meaning, as text."""

    name: str
    type: str
    default: str
    limits: str
    meaning: str


@dataclass(frozen=True)
class SectionKeys:
    """The keys of one section, with its dotted name, its kind if there are several, and its docstring."""

    name: str
    kind: str
    about: str
    keys: list[Key]


def sections(model: type[BaseModel] = Params, name: str = "", kind: str = "") -> Iterator[SectionKeys]:
    """Every section below a type, depth first; the kinds of a discriminated union follow one another."""
    keys, subsections = [], []
    for field_name, info in model.model_fields.items():
        full = f"{name}.{field_name}" if name else field_name
        annotation = _annotation(info)
        keys.append(Key(full, _type(annotation), _default(info), _limits(annotation), _meaning(info)))
        subsections += [(section, place) for section, place in _sections(annotation, full)]
    yield SectionKeys(name, kind, " ".join((model.__doc__ or "").split()), keys)
    for section, place in subsections:
        yield from sections(section, place, _kind(section))


def reference() -> str:
    """The page, as Markdown."""
    lines = [_HEAD]
    for section in sections():
        title = f"`{section.name}`" if section.name else "The file"
        lines += [f"## {title}{f', kind `{section.kind}`' if section.kind else ''}\n", f"{_cell(section.about)}\n"]
        lines += ["| key | type | default | limits | meaning |", "|---|---|---|---|---|"]
        lines += [
            f"| `{key.name}` | {_cell(key.type)} | {_cell(key.default)} | {_cell(key.limits)} | {_cell(key.meaning)} |"
            for key in section.keys
        ]
        lines.append("")
    return "\n".join(lines)


def _annotation(info: FieldInfo) -> Any:
    """A field's type together with its limits."""
    return Annotated[info.annotation, *info.metadata] if info.metadata else info.annotation


def _parts(kind: Any) -> tuple[Any, list[Any]]:
    """A type without its annotations, and the annotations."""
    if get_origin(kind) is Annotated:
        inner, *notes = get_args(kind)
        bare, inner_notes = _parts(inner)
        return bare, [*inner_notes, *notes]
    return kind, []


def _is_union(kind: Any) -> bool:
    return get_origin(kind) in (Union, UnionType)


def _sections(kind: Any, place: str) -> Iterator[tuple[type[BaseModel], str]]:
    """The sections inside a type, with their keys."""
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
    """Limits of a type and of its parts."""
    bare, notes = _parts(kind)
    limits = []
    flat = [one for note in notes for one in (note.metadata if isinstance(note, FieldInfo) else [note])]
    for note in flat:
        for name, sign in _SIGNS.items():
            value = getattr(note, name, None)
            if value is not None and isinstance(note, annotated_types.BaseMetadata | annotated_types.GroupedMetadata):
                limits.append(f"{sign} {value}")
        if pattern := getattr(note, "pattern", None):
            limits.append(f"pattern `{pattern}`")
    if not (isinstance(bare, type) and issubclass(bare, BaseModel)) and get_origin(bare) is not Literal:
        for option in get_args(bare):
            limits += [limit for limit in _limits(option).split("; ") if limit]
    return "; ".join(dict.fromkeys(limits))


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
    """The description of a field; if it has none, the docstring of its section, or a text for `kind`."""
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
