"""Texts out of annotation files: the formats of the paper's data sets, this project's own tables, and any other.

A file is a sequence of records; a record has one text or several. What differs from format to format is only where
the records are and in which fields their texts are.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from lotlip.core.files import not_a_file
from lotlip.core.listing import files_below

# A text's fields; where there are several, their contents are lines of one text.
_Fields = tuple[str, ...]

# Per format, the fields of its texts. The first format of which a record has a field is the record's.
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

# Fields that say which image a record is of.
_NAMES = ("key", "image", "image/key", "filename", "Image Path", "ImagePath", "image_path", "filepath", "id")

_SHOWN = 20
_BATCH = 1024
_SURROGATE = re.compile("[\ud800-\udfff]")


class Text(NamedTuple):
    """One text of an annotation file.

    Attributes:
        name: of its image (key or path) where the record has one, else `file:record`; where a record has several
            texts, `#` with the field or the number of the text follows. A file of one text is named by its path
            without the ending.
        text: as it was written, half surrogate pairs replaced by U+FFFD; "" where it is null or blank.
    """

    name: str
    text: str


def read_texts(path: Path, fields: Sequence[str] = (), split: str | None = None) -> Iterator[Text]:
    """The texts of a file or folder, in order. JSONL, CSV and Parquet are streamed, a JSON file is read whole.

    Args:
        path: a .json (a list of objects, a Karpathy split, one object, or DCI's `splits.json`), .jsonl (or .jsonlines),
            .csv, .parquet or .txt (all of it is one text) file, or a folder of them: DCI's, Urban-1k's, IIW's, a
            stage's partitions, or any folder in which all such files have one ending.
        fields: names of the fields whose texts are read, each a text of its own; a dot leads into an object or (with
            a number, counted from 0) to an element of a list, and a list gives as many texts as it has. Where none
            is named, those of the formats above.
        split: read only this one of Karpathy's files, DCI's `splits.json`, partitions, or of records that have a
            field `split`; all of them where None.

    Raises:
        ValueError: there is no such file, its ending is not known, it is broken, no text field is known, a record
            lacks a field or has something else than text in it, or there is no such split.
    """
    wanted = _Wanted(fields, split)
    if path.is_dir():
        yield from _read_folder(path, wanted)
    elif path.name == "splits.json":
        yield from _read_dci(path, wanted)
    else:
        yield from _read_file(path, wanted, path.parent)
    if split is not None and split not in wanted.splits:
        raise ValueError(f"{path} has no split {split!r} (it has {_listed(sorted(wanted.splits))})")


def read_records(path: Path) -> Iterator[tuple[int, Any]]:
    """The records of a .json (a list of objects, a Karpathy split, or one object), .jsonl or .jsonlines file, in order.

    Returns:
        Number, from 1, and record, an object or whatever else stands there.

    Raises:
        ValueError: there is no such file, its ending is another, or it is broken.
    """
    with _readable(path):
        yield from _READERS[path.suffix.lower()](path, _Wanted())


def dci_annotations(splits: Path, split: str | None = None) -> list[Path]:
    """The annotation files that DCI's `splits.json` names, each once, whether they are there or not.

    Raises:
        ValueError: it is not there, not DCI's, or a name leads out of its folder.
    """
    with _readable(splits):
        return _dci_annotations(splits, _Wanted(split=split))


class _Wanted:
    """What was asked for, and the splits that were met on the way."""

    def __init__(self, fields: Sequence[str] = (), split: str | None = None) -> None:
        self.fields = list(fields)
        self.split = split
        self.splits: set[str] = set()

    def keeps(self, split: str) -> bool:
        self.splits.add(split)
        return self.split is None or split == self.split

    def choose(self, path: Path, names: Collection[str]) -> list[_Fields]:
        """The fields of each text of a record that has these."""
        if self.fields:
            return [(field,) for field in self.fields]
        for known in _KNOWN:
            if found := [fields for fields in known if all(field.split(".")[0] in names for field in fields)]:
                return found
        raise ValueError(
            f"{path} has no text field that is known; name it with --field (there are: {_listed(list(names))})"
        )


# --- folders ------------------------------------------------------------------------------------------------------


def _read_folder(folder: Path, wanted: _Wanted) -> Iterator[Text]:
    for splits in (folder / "splits.json", folder / "densely_captioned_images" / "splits.json"):
        if splits.is_file():
            yield from _read_dci(splits, wanted)
            return
    for inner in ("annotations", "caption"):  # DCI's without its splits, Urban-1k's
        if (folder / inner).is_dir():
            folder = folder / inner
    files = sorted(file for file in files_below(folder) if file.suffix.lower() in _ENDINGS and file.is_file())
    partitions = [file for file in files if _is_partition(file)]
    if partitions:
        for file in partitions:
            if wanted.keeps(file.parent.name):
                yield from _read_file(file, _Wanted(wanted.fields), folder)
        return
    endings = sorted({file.suffix.lower() for file in files})
    if len(endings) != 1:
        raise ValueError(
            f"the folder {folder} has {'files of ' + ' and '.join(endings) if endings else 'no annotations'}; "
            f"give the files, or a folder in which all annotations have one ending of {', '.join(_ENDINGS)}"
        )
    for file in files:
        yield from _read_file(file, wanted, folder)


def _is_partition(file: Path) -> bool:
    """A finished unit of a stage is a table with a marker beside it; the marker is no annotation."""
    return file.suffix == ".parquet" and file.name.startswith("part-") and file.with_suffix(".json").is_file()


def _read_dci(path: Path, wanted: _Wanted) -> Iterator[Text]:
    """Every annotation that `splits.json` names, once."""
    for file in _dci_annotations(path, wanted):
        if not file.is_file():
            raise ValueError(f"{path} names {file.name}, but {file} {not_a_file(file)}")
        yield from _read_file(file, _Wanted(wanted.fields), path.parent)


def _dci_annotations(path: Path, wanted: _Wanted) -> list[Path]:
    from lotlip.data.keys import leaves

    splits = _load(path, path.read_text(encoding="utf-8-sig"))
    if not isinstance(splits, dict) or not all(isinstance(names, list) for names in splits.values()):
        raise ValueError(f"{path} is not DCI's: it should have a list of annotation files for each split")
    names = dict.fromkeys(str(name) for split, names in splits.items() if wanted.keeps(split) for name in names)
    for name in names:
        if leaves(name):
            raise ValueError(f"{path} names {name!r}, which leads out of its folder; find out who made it")
    return [path.parent / "annotations" / name for name in names]


# --- files --------------------------------------------------------------------------------------------------------


def _read_file(path: Path, wanted: _Wanted, root: Path) -> Iterator[Text]:
    ending = path.suffix.lower()
    with _readable(path, _ENDINGS):
        if ending == ".txt":
            yield _read_text(path, wanted, root)
        else:
            yield from _record_texts(path, _READERS[ending](path, wanted), wanted)


@contextmanager
def _readable(path: Path, endings: Sequence[str] = (".json", ".jsonl", ".jsonlines")) -> Iterator[None]:
    """Complains of a file that is not there, has another ending, or turns out not to be UTF-8 when it is read."""
    if not path.is_file():
        raise ValueError(f"{path} {not_a_file(path)}")
    if path.suffix.lower() not in endings:
        raise ValueError(f"{path} has none of the endings {', '.join(endings)}")
    try:
        yield
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error.reason})") from error


def _read_text(path: Path, wanted: _Wanted, root: Path) -> Text:
    if wanted.fields or wanted.split is not None:
        raise ValueError(f"{path} is one text, without fields or splits: leave --field and --split out")
    return Text(path.relative_to(root).with_suffix("").as_posix(), clean(path.read_text(encoding="utf-8-sig")))


def _read_json(path: Path, _: _Wanted) -> Iterator[tuple[int, Any]]:
    data = _load(path, path.read_text(encoding="utf-8-sig"))
    if isinstance(data, dict):
        images = data.get("images")
        first = images[0] if isinstance(images, list) and images else None
        karpathy = isinstance(first, dict) and "sentences" in first
        data = images if karpathy else [data]
    if not isinstance(data, list):
        raise ValueError(f"{path} is neither a list of objects nor an object")
    return enumerate(data, start=1)


def _read_jsonl(path: Path, _: _Wanted) -> Iterator[tuple[int, Any]]:
    """Records are counted as lines, blank ones too, so that they are found again."""
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, _load(path, line.rstrip(), number)


def _read_csv(path: Path, wanted: _Wanted) -> Iterator[tuple[int, Any]]:
    csv.field_size_limit(2**31 - 1)  # a long text is longer than the 128 KiB that csv allows
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.reader(file, strict=True)
        try:
            filled = filter(None, rows)  # a blank line is not a row
            header = next(filled, [])
            wanted.choose(path, header)  # a table that is not known is an error without rows, too
            for number, row in enumerate(filled, start=1):
                if len(row) != len(header):
                    raise ValueError(
                        f"{path}, record {number} (line {rows.line_num}) has {len(row)} cells, but the header has "
                        f"{len(header)}; a text with commas, quotes or newlines needs quotes around it"
                    )
                yield number, dict(zip(header, row, strict=True))
        except csv.Error as error:
            raise ValueError(f"{path}, line {rows.line_num}: broken CSV ({error})") from error


def _read_parquet(path: Path, wanted: _Wanted) -> Iterator[tuple[int, Any]]:
    """Only the columns that are needed: others may hold images."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from lotlip.data.rows import is_text

    try:
        with pq.ParquetFile(path) as file:
            schema = file.schema_arrow
            columns = {"split"} if wanted.split is not None else set()
            for field in (field for fields in wanted.choose(path, schema.names) for field in fields):
                column = field if field in schema.names else field.split(".")[0]
                if column not in schema.names:
                    raise ValueError(f"{path} has no field {field!r} (it has {_listed(schema.names)})")
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


_READERS: Mapping[str, Callable[[Path, _Wanted], Iterator[tuple[int, Any]]]] = {
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".jsonlines": _read_jsonl,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
_ENDINGS = (*_READERS, ".txt")


def _load(path: Path, text: str, line: int = 1) -> Any:
    """Parses JSON that starts in a line of a file."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}, line {line + error.lineno - 1}: broken JSON ({error.msg} at column {error.colno})"
        ) from error


# --- records ------------------------------------------------------------------------------------------------------


def _record_texts(path: Path, records: Iterator[tuple[int, Any]], wanted: _Wanted) -> Iterator[Text]:
    """The texts of a file's records; the first record decides which fields they are in."""
    chosen: list[_Fields] = []
    for number, record in records:
        where = f"{path}, record {number}"
        if not isinstance(record, dict):
            raise ValueError(f"{where} is not an object with fields")
        chosen = chosen or wanted.choose(path, record)
        if wanted.split is not None:
            if not isinstance(record.get("split"), str):
                raise ValueError(f"{where} has no field 'split': leave --split out")
            if not wanted.keeps(record["split"]):
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
    """What a record says of which image it is; "" where it does not."""
    from lotlip.data.rows import as_name

    found = (record.get(name) for name in _NAMES)
    return next(filter(None, (as_name(name) for name in found if isinstance(name, str | int | float))), "")


def _field_texts(record: Mapping[str, Any], field: str, where: str) -> list[tuple[str, str]]:
    """The texts in a field, each with what tells it from the others: "" or "#0", "#1", …"""
    try:
        found = _values(record, field)
    except LookupError:
        raise ValueError(f"{where} has no field {field!r} (it has {_listed(list(record))})") from None
    for _, value in found:
        if value is not None and not isinstance(value, str):
            raise ValueError(f"{where}: field {field!r} is of type {type(value).__name__}, not text")
    return [(index, value or "") for index, value in found]


def _values(value: Any, field: str) -> list[tuple[str, Any]]:
    """What is at a nested name below a value: a list without a number gives all its elements, an empty one a null.

    Raises:
        LookupError: there is nothing at that name.
    """
    first, _, rest = field.partition(".")
    if value is None:
        return [("", None)]
    if isinstance(value, list) and first.isdecimal():
        return _values(value[int(first)], rest)
    if isinstance(value, list):
        found = [(f"#{i}{index}", one) for i, item in enumerate(value) for index, one in _values(item, field)]
        return found or [("", None)]
    if not field:
        return [("", value)]
    if not isinstance(value, dict):
        raise LookupError
    if field in value:  # a name may itself have a dot
        return _values(value[field], "")
    return _values(value[first], rest)


def clean(text: str) -> str:
    """Half a surrogate pair, left by a caption that was cut inside an emoji, is not text that can be encoded."""
    return _SURROGATE.sub("\ufffd", text) if text.strip() else ""


def _listed(names: Sequence[str]) -> str:
    more = [f"… {len(names) - _SHOWN} more"] if len(names) > _SHOWN else []
    return ", ".join([*(str(name) for name in names[:_SHOWN]), *more]) or "none"
