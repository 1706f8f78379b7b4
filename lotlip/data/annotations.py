"""Reads texts from annotation files: the formats of the paper's data sets, this project's own tables, and others.

A file is a sequence of records; a record has one text or several. Formats differ only in where the records are and
which fields have their texts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from lotlip.core.files import not_a_file
from lotlip.core.listing import files_with_endings
from lotlip.data.fields import listed, values_at
from lotlip.data.rows import TABLES, CsvTable, as_name, has_object_lines, is_text

# The fields of one text; the contents of several fields become the lines of one text.
_Fields = tuple[str, ...]

# Per format, the fields of each text. The first format with a field that the record has is used.
_KNOWN: tuple[tuple[_Fields, ...], ...] = (
    (("conversations.1.value",),),  # ShareGPT4V
    (("short_caption", "extra_caption"),),  # DCI
    (("IIW",),),  # ImageInWords
    (("sentences.raw",),),  # COCO and Flickr30k, as Karpathy split them
    (("short_caption",),),  # this project's partitions
    (("text",),),  # this project's long captions
    (  # DreamLIP's and LoTLIP's long captions
        ("raw_caption",),
        ("shortIB_captions",),
        ("longIB_captions",),
        ("shortSV_captions",),
        ("longSV_captions",),
        ("shortLLA_captions",),
        ("longLLA_captions",),
    ),
)

# Fields that name a record's image.
_NAMES = ("key", "image", "image/key", "filename", "Image Path", "ImagePath", "image_path", "filepath", "id")

_BATCH = 1024
_LONGEST_CELL = 2**31 - 1  # characters of a text in a CSV file
_SURROGATE = re.compile("[\ud800-\udfff]")


class Text(NamedTuple):
    """One text of an annotation file.

    Attributes:
        name: the image's key or path if the record has one, else `file:record`; if a record has several texts, `#` and
            the field or the number of the text follow. A file with one text is named by its path without the ending.
        text: as in the file, with unpaired surrogates replaced by U+FFFD; "" if it is null or blank.
    """

    name: str
    text: str


def read_texts(path: Path, fields: Sequence[str] = (), split: str | None = None) -> Iterator[Text]:
    """The texts of a file or folder, in order. JSONL, CSV and Parquet are streamed; any other JSON is loaded at once.

    Args:
        path: a table (`TABLES`; a .json file has a list of objects, an object per line, a Karpathy split, one object,
            or DCI's `splits.json`), a .txt file (all of it is one text), or a folder of them: DCI's, Urban-1k's, IIW's,
            a stage's partitions, or any folder in which all such files have one ending.
        fields: names of the fields to read, each a separate text; a dot leads into an object or (with a number, counted
            from 0) to an element of a list, and a list gives one text per element. If empty, the fields of the formats
            above.
        split: read only this split of Karpathy's files, DCI's `splits.json`, partitions, or records with a field
            `split`; None: all of them.

    Raises:
        ValueError: the file does not exist, has an unknown ending or is broken; no text field is known; a record lacks
            a field or a field is not text; or there is no such split.
    """
    query = _Query(fields, split)
    if path.is_dir():
        yield from _read_folder(path, query)
    elif path.name == "splits.json":
        yield from _read_dci(path, query)
    else:
        yield from _read_file(path, query, path.parent)
    if split is not None and split not in query.splits:
        raise ValueError(f"{path} has no split {split!r} (it has {listed(sorted(query.splits))})")


def read_records(path: Path) -> Iterator[tuple[int, Any]]:
    """The records of a .json (see `read_texts`), .jsonl or .jsonlines file, in order.

    Returns:
        Number, counted from 1, and record, which may be any JSON value.

    Raises:
        ValueError: the file does not exist, has another ending, or is broken.
    """
    with _readable(path):
        yield from _READERS[TABLES[path.suffix.lower()]](path, _Query())


def dci_annotations(splits: Path, split: str | None = None) -> list[Path]:
    """The annotation files that DCI's `splits.json` names, without duplicates; they may not exist.

    Raises:
        ValueError: the file does not exist, is not DCI's, or a name leads out of its folder.
    """
    with _readable(splits):
        return _dci_annotations(splits, _Query(split=split))


class _Query:
    """The requested fields and split, and the splits found while reading."""

    def __init__(self, fields: Sequence[str] = (), split: str | None = None) -> None:
        self.fields = list(fields)
        self.split = split
        self.splits: set[str] = set()

    def keeps(self, split: str) -> bool:
        self.splits.add(split)
        return self.split is None or split == self.split

    def choose(self, path: Path, names: Collection[str]) -> list[_Fields]:
        """The fields of each text of a record with the fields `names`."""
        if self.fields:
            return [(field,) for field in self.fields]
        for known in _KNOWN:
            if present := [fields for fields in known if all(field.split(".")[0] in names for field in fields)]:
                return present
        raise ValueError(f"{path} has no known text field; name one with --field (there are: {listed(list(names))})")


# --- folders ------------------------------------------------------------------------------------------------------


def _read_folder(folder: Path, query: _Query) -> Iterator[Text]:
    for splits in (folder / "splits.json", folder / "densely_captioned_images" / "splits.json"):
        if splits.is_file():
            yield from _read_dci(splits, query)
            return
    for inner in ("annotations", "caption"):  # DCI's without its splits, and Urban-1k's
        if (folder / inner).is_dir():
            folder = folder / inner
    files = [file for file in files_with_endings(folder, _ENDINGS) if file.is_file()]
    partitions = [file for file in files if _is_partition(file)]
    if partitions:
        for file in partitions:
            if query.keeps(file.parent.name):
                yield from _read_file(file, _Query(query.fields), folder)
        return
    endings = sorted({file.suffix.lower() for file in files})
    if len(endings) != 1:
        raise ValueError(
            f"the folder {folder} has {'files of ' + ' and '.join(endings) if endings else 'no annotations'}; "
            f"name a file, or a folder in which all annotations have one of the endings {', '.join(_ENDINGS)}"
        )
    for file in files:
        yield from _read_file(file, query, folder)


def _is_partition(file: Path) -> bool:
    """Whether a file is the table of a finished unit, which has a marker beside it; the marker is not an annotation."""
    return file.suffix == ".parquet" and file.name.startswith("part-") and file.with_suffix(".json").is_file()


def _read_dci(path: Path, query: _Query) -> Iterator[Text]:
    """The texts of every annotation that `splits.json` names, once."""
    for file in _dci_annotations(path, query):
        if not file.is_file():
            raise ValueError(f"{path} names {file.name}, but {file} {not_a_file(file)}")
        yield from _read_file(file, _Query(query.fields), path.parent)


def _dci_annotations(path: Path, query: _Query) -> list[Path]:
    from lotlip.data.keys import escapes_folder

    splits = _load(path, path.read_text(encoding="utf-8-sig"))
    if not isinstance(splits, dict) or not all(isinstance(names, list) for names in splits.values()):
        raise ValueError(f"{path} is not DCI's splits.json: expected a list of annotation files for each split")
    names = dict.fromkeys(str(name) for split, names in splits.items() if query.keeps(split) for name in names)
    for name in names:
        if escapes_folder(name):
            raise ValueError(f"{path} names {name!r}, which leads out of its folder; check who made this file")
    return [path.parent / "annotations" / name for name in names]


# --- files --------------------------------------------------------------------------------------------------------


def _read_file(path: Path, query: _Query, root: Path) -> Iterator[Text]:
    ending = path.suffix.lower()
    with _readable(path, _ENDINGS):
        if ending == ".txt":
            yield _read_text(path, query, root)
        else:
            yield from _record_texts(path, _READERS[TABLES[ending]](path, query), query)


@contextmanager
def _readable(path: Path, endings: Sequence[str] = (".json", ".jsonl", ".jsonlines")) -> Iterator[None]:
    """Raises ValueError for a file that does not exist, has another ending, or is not UTF-8."""
    if not path.is_file():
        raise ValueError(f"{path} {not_a_file(path)}")
    if path.suffix.lower() not in endings:
        raise ValueError(f"{path} has none of the endings {', '.join(endings)}")
    try:
        yield
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error.reason})") from error


def _read_text(path: Path, query: _Query, root: Path) -> Text:
    if query.fields or query.split is not None:
        raise ValueError(f"{path} is a single text, without fields or splits; remove --field and --split")
    return Text(path.relative_to(root).with_suffix("").as_posix(), clean(path.read_text(encoding="utf-8-sig")))


def _read_json(path: Path, query: _Query) -> Iterator[tuple[int, Any]]:
    if has_object_lines(path):
        return _read_jsonl(path, query)
    data = _load(path, path.read_text(encoding="utf-8-sig"))
    if isinstance(data, dict):
        images = data.get("images")
        first = images[0] if isinstance(images, list) and images else None
        karpathy = isinstance(first, dict) and "sentences" in first
        data = images if karpathy else [data]
    if not isinstance(data, list):
        raise ValueError(f"{path} is neither a list of objects nor an object")
    return enumerate(data, start=1)


def _read_jsonl(path: Path, _: _Query) -> Iterator[tuple[int, Any]]:
    """Records are numbered by line, counting blank lines, so that they can be found in the file."""
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, _load(path, line.rstrip(), number)


_REMEDIES = {
    "row": "put quotes around texts with separators, quotes or newlines",
    "encoding": "convert the file to UTF-8",
}


def _read_csv(path: Path, query: _Query) -> Iterator[tuple[int, Any]]:
    try:
        table = CsvTable(path, _LONGEST_CELL)
    except ValueError as error:
        raise ValueError(f"{path} cannot be read as CSV: {error}") from error
    query.choose(path, table.columns)  # an unknown header is an error even without rows
    for number, row in enumerate(table.rows(table.columns), start=1):
        if row.problem is not None:
            problem, kind = row.problem
            raise ValueError(f"{path}, line {row.number}: {problem}; {_REMEDIES[kind]}")
        yield number, dict(zip(table.columns, row.values, strict=True))


def _read_parquet(path: Path, query: _Query) -> Iterator[tuple[int, Any]]:
    """Reads only the needed columns: others may hold images."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            schema = file.schema_arrow
            columns = {"split"} if query.split is not None else set()
            for field in (field for fields in query.choose(path, schema.names) for field in fields):
                column = field if field in schema.names else field.split(".")[0]
                if column not in schema.names:
                    raise ValueError(f"{path} has no field {field!r} (it has {listed(schema.names)})")
                columns.add(column)
            types = {name: schema.field(name).type for name in _NAMES if name in schema.names}
            columns.update(
                name
                for name, kind in types.items()
                if is_text(kind) or pa.types.is_integer(kind) or pa.types.is_floating(kind)
            )
            number = 0
            for batch in file.iter_batches(_BATCH, columns=sorted(columns)):
                yield from enumerate(batch.to_pylist(), start=number + 1)
                number += len(batch)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} cannot be read as Parquet ({error})") from error


_READERS: Mapping[str, Callable[[Path, _Query], Iterator[tuple[int, Any]]]] = {
    "csv": _read_csv,
    "jsonl": _read_jsonl,
    "json": _read_json,
    "parquet": _read_parquet,
}
_ENDINGS = (*TABLES, ".txt")


def _load(path: Path, text: str, line: int = 1) -> Any:
    """Parses JSON that starts at a line of a file."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}, line {line + error.lineno - 1}: broken JSON ({error.msg} at column {error.colno})"
        ) from error


# --- records ------------------------------------------------------------------------------------------------------


def _record_texts(path: Path, records: Iterator[tuple[int, Any]], query: _Query) -> Iterator[Text]:
    """The texts of a file's records; the first record decides which fields are read."""
    chosen: list[_Fields] = []
    for number, record in records:
        where = f"{path}, record {number}"
        if not isinstance(record, dict):
            raise ValueError(f"{where} is not an object with fields")
        chosen = chosen or query.choose(path, record)
        if query.split is not None:
            if not isinstance(record.get("split"), str):
                raise ValueError(f"{where} has no field 'split': remove --split")
            if not query.keeps(record["split"]):
                continue
        name = _name(record) or f"{path.as_posix()}:{number}"
        for fields in chosen:
            suffix = f"#{fields[0]}" if len(chosen) > 1 else ""
            texts = [(index, text) for field in fields for index, text in _field_texts(record, field, where)]
            if len(fields) > 1:
                texts = [("", "\n".join(text for _, text in texts))]
            for index, text in texts:
                yield Text(name + suffix + index, clean(text))


def _name(record: Mapping[str, Any]) -> str:
    """The image's name that a record gives; "" if there is none."""
    values = (record.get(name) for name in _NAMES)
    return next(filter(None, (as_name(value) for value in values if isinstance(value, str | int | float))), "")


def _field_texts(record: Mapping[str, Any], field: str, where: str) -> list[tuple[str, str]]:
    """The texts in a field, each with a suffix that distinguishes it: "" or "#0", "#1", …"""
    try:
        values = values_at(record, field)
    except LookupError:
        raise ValueError(f"{where} has no field {field!r} (it has {listed(list(record))})") from None
    for _, value in values:
        if value is not None and not isinstance(value, str):
            raise ValueError(f"{where}: field {field!r} is of type {type(value).__name__}, not text")
    return [(index, value or "") for index, value in values]


def clean(text: str) -> str:
    """Replaces unpaired surrogates, which cannot be encoded, as in a caption cut inside an emoji; "" for blank text."""
    return _SURROGATE.sub("\ufffd", text) if text.strip() else ""
