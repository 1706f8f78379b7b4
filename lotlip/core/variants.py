"""Sections of params.yaml with several kinds: `kind` chooses a configuration class and the code that it configures.

Other packages add kinds through entry points. An entry point has the kind's name and points to the implementation, a
class or function whose attribute `Config` is the kind's section:

    [project.entry-points."lotlip.sources"]
    bucket = "my_package.bucket:BucketSource"
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any, get_args

from pydantic import GetCoreSchemaHandler
from pydantic_core import PydanticCustomError, SchemaValidator, core_schema

from lotlip.core.section import Section


@dataclass(frozen=True)
class Variants:
    """Annotation for a union of the built-in kinds' sections; it also accepts sections of other packages.

    Attributes:
        group: of the entry points, such as "lotlip.sources".
        required_fields: fields that every section of the group must have.
    """

    group: str
    required_fields: tuple[str, ...] = ()

    def installed_kinds(self) -> set[str]:
        """The kinds that installed packages add; no package is loaded."""
        return {point.name for point in entry_points(group=self.group)}

    def section(self, kind: str) -> type[Section]:
        """The section of a kind that another package adds.

        Raises:
            ValueError: its entry point cannot be used.
        """
        section = getattr(_load(_entry_point(self.group, kind)), "Config", None)
        place = f"entry point {kind} of {self.group}"
        if not (isinstance(section, type) and issubclass(section, Section)):
            raise ValueError(f"{place}: its object needs an attribute Config, a subclass of lotlip's Section")
        if kinds_of(section) != (kind,):
            raise ValueError(f'{place}: {section.__name__} needs the field `kind: Literal["{kind}"]`')
        if missing := [name for name in self.required_fields if name not in section.model_fields]:
            raise ValueError(f"{place}: {section.__name__} lacks the field {', '.join(missing)}")
        return section

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        """A union discriminated by `kind`; kinds of other packages are looked up when one is used."""
        built_in = {kind: handler(section) for section in get_args(source) for kind in kinds_of(section)}

        def choose(value: Any, built_in_section: core_schema.ValidatorFunctionWrapHandler) -> Any:
            kind = value.get("kind") if isinstance(value, Mapping) else getattr(value, "kind", None)
            if not isinstance(kind, str) or kind in built_in:
                return built_in_section(value)
            known = [*built_in, *sorted(self.installed_kinds() - set(built_in))]
            if kind not in known:
                matches = difflib.get_close_matches(kind, known, n=1)
                hint = f"; did you mean {matches[0]!r}?" if matches else ""
                reason = f"unknown kind {kind!r}{hint} (there are: {', '.join(known)})"
                raise PydanticCustomError("unknown_kind", "{reason}", {"reason": reason})
            try:
                section = self.section(kind)
            except ValueError as error:
                raise PydanticCustomError("unusable_kind", "{reason}", {"reason": str(error)}) from error
            # a union of one, so that errors have the same locations as those of the built-in kinds
            union = core_schema.tagged_union_schema({kind: section.__pydantic_core_schema__}, discriminator="kind")
            return SchemaValidator(union).validate_python(value)

        return core_schema.no_info_wrap_validator_function(
            choose,
            core_schema.tagged_union_schema(built_in, discriminator="kind"),
            serialization=core_schema.simple_ser_schema("any"),  # also serializes sections of other packages
        )


def implementation(group: str, kind: str, built_in: Mapping[str, str]) -> Callable[..., Any]:
    """Imports the code of a kind.

    Args:
        group: of the entry points.
        kind: of the section.
        built_in: kind → "package.module:NAME".

    Raises:
        ValueError: the entry point of another package cannot be used.
    """
    if kind not in built_in:
        return _load(_entry_point(group, kind))
    module, _, name = built_in[kind].partition(":")
    return getattr(import_module(module), name)


def kinds_of(section: Any) -> tuple[str, ...]:
    """The kinds of a section; empty if it has no field `kind`."""
    field = section.model_fields.get("kind") if isinstance(section, type) and issubclass(section, Section) else None
    return get_args(field.annotation) if field else ()


def _entry_point(group: str, kind: str) -> EntryPoint:
    points = list(entry_points(group=group, name=kind))
    if len({point.value for point in points}) > 1:
        packages = ", ".join(sorted(point.dist.name if point.dist else point.value for point in points))
        raise ValueError(f"several packages add {kind} to {group} ({packages}); uninstall all but one")
    if not points:
        raise ValueError(f"no installed package adds {kind} to {group} any more; install it again")
    return points[0]


def _load(point: EntryPoint) -> Any:
    try:
        return point.load()
    except Exception as error:  # whatever the package's modules raise
        package = f" of {point.dist.name}" if point.dist else ""
        raise ValueError(
            f"entry point {point.name} of {point.group}: {point.value}{package} cannot be imported "
            f"({type(error).__name__}: {error})"
        ) from error
