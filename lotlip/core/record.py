"""Typed JSON files: one definition for the stage or process that writes a file and for all that read it."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, Self, TypeVar

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from lotlip.core.files import read_json, write_json

_SHOWN_PROBLEMS = 3

T = TypeVar("T")
RecordT = TypeVar("RecordT", bound="Record")


class Record(BaseModel):
    """A JSON file that only this project writes: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")

    @classmethod
    def load(cls, path: Path) -> Self:
        """Reads a file; raises what `read_record` raises."""
        return read_record(path, cls)

    def write(self, path: Path) -> None:
        """Writes the file whole, so that equal records give equal bytes.

        Raises:
            ValueError: a number is NaN or infinite.
        """
        write_json(path, self.model_dump())


def read_record(path: Path, kind: type[T]) -> T:
    """Reads a JSON file of any type that pydantic can check.

    Args:
        path: of the file.
        kind: a `Record`, a dataclass, or a type such as `list[dict[str, float]]`.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not JSON, or not of this kind; the message names the file, the problem and the remedy.
    """
    return as_record(read_json(path), kind, path)


def as_record(data: Any, kind: type[T], place: Path) -> T:
    """The record that JSON from a file holds; raises the ValueError of `read_record`."""
    try:
        checked: T = _adapter(kind).validate_python(data)  # type: ignore[arg-type]  # a class can be hashed
        return checked
    except ValidationError as error:
        found = error.errors(include_url=False, include_input=False)
        problems = [": ".join([".".join(map(str, one["loc"])) or "the file", one["msg"]]) for one in found]
        more = f"; and {len(found) - _SHOWN_PROBLEMS} more" if len(found) > _SHOWN_PROBLEMS else ""
        raise ValueError(
            f"{place} is not what its stage writes ({'; '.join(problems[:_SHOWN_PROBLEMS])}{more}); restore it with "
            "`dvc checkout --force`, or remove it and run its stage again"
        ) from error


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)
