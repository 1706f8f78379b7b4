"""Tables with a row per image: Parquet, CSV, JSONL and JSON files."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from lotlip.core.files import not_a_file, sha256_json
from lotlip.data.keys import escapes_folder, is_key, key_of, prefix_of, printable
from lotlip.data.paths import file_state
from lotlip.data.records import Failure, ImageRecord, Unit
from lotlip.data.rows import (
    TABLES,
    ParquetTable,
    RowRange,
    TableFile,
    TableRow,
    as_name,
    find_tables,
    open_table,
    require,
)
from lotlip.ingest.config import CsvSourceConfig, ImagesConfig, ParquetSourceConfig
from lotlip.ingest.record_validation import RecordValidator
from lotlip.ingest.split import split_of


class TableSource:
    """Reads ranges of rows; an image is in its row, or is a file below a folder.

    A sample's key is made by `key_of` from its `key` column, else its image's path, else its file and row number, and
    prefixed with its table's folder below `path`. Failures have a kind of `RecordValidator`, "missing" (no image or no
    caption), "row" (no object, or another number of fields than the header), "encoding" (not UTF-8), "duplicate" (the
    key occurred earlier in the unit) or "unsafe" (a path that leads out of `images`).

    Raises:
        ValueError: `path` has no tables, a table lacks a column, or `images` does not exist.
    """

    def __init__(self, settings: ParquetSourceConfig | CsvSourceConfig, images: ImagesConfig) -> None:
        self._settings = settings
        self._validator = RecordValidator(images)
        self._root, self._images = settings.path, settings.images
        self._columns = [settings.image, settings.caption, *([settings.key] if settings.key is not None else [])]
        if self._images is not None and not self._images.is_dir():
            raise ValueError(
                f"the folder {self._images} does not exist; set ingest.source.images in params.yaml to the folder that "
                f"the paths in column {settings.image} start from"
            )
        self._tables = find_tables(self._root, settings.kind, self._images)
        if not self._tables or not self._tables[0].is_file():
            fault = "has no table" if self._root.is_dir() else not_a_file(self._root)
            endings = " or ".join(ending for ending, kind in TABLES.items() if kind == settings.kind)
            raise ValueError(
                f"{self._root} {fault}; set ingest.source.path in params.yaml to a {endings} file or a folder of them"
            )
        for table in self._tables:
            self._check(table)
        self._resolved = None if self._images is None else self._images.resolve()  # a worker may have it elsewhere

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_tables": []}  # `read` does not use them

    def units(self, partition_size: int) -> list[Unit]:
        """Ranges of `partition_size` rows of a file; files other than Parquet are read once to find them."""
        ranges = ((table, part) for table in self._tables for part in open_table(table).ranges(partition_size))
        return [
            Unit(None, index, (f"{part.start}:{part.number}:{part.count}:{table}",))
            for index, (table, part) in enumerate(ranges)
        ]

    def split(self, key: str) -> str:
        """A random split that depends only on the key and the seed."""
        return split_of(key, self._settings)

    def state(self, unit: Unit) -> str:
        """A hash of the state of the unit's tables, and of the images that its rows name."""
        states: list[Any] = [*unit.items]
        for path, table, part in self._parts(unit):
            states.append(file_state(path))
            if self._images is not None:
                states += [file_state(self._images / name) for name in self._image_paths(table, part)]
        return sha256_json(states)

    def _image_paths(self, table: TableFile, part: RowRange) -> Iterator[str]:
        """Paths of the image files that a table's rows name."""
        for row in table.rows([self._settings.image], part):
            data, path = _image(row.values[0]) if row.problem is None else (None, "")
            if path and data is None:
                yield path

    def files(self, unit: Unit) -> Iterator[Path]:
        """The unit's tables, and the images that its rows name."""
        for path, table, part in self._parts(unit):
            yield path
            if self._images is not None:
                for name in map(self._below, self._image_paths(table, part)):
                    with suppress(OSError, ValueError):  # no file can have this name
                        if is_inside(self._images, name):
                            yield self._images / name

    def read(self, unit: Unit) -> Iterator[ImageRecord | Failure]:
        """Each row's record or failure."""
        for path, table, part in self._parts(unit):
            keys: set[str] = set()
            for row in table.rows(self._columns, part):
                yield self._record(row, path, f"{printable(str(path))}: {table.unit} {row.number}", keys)

    def _parts(self, unit: Unit) -> Iterator[tuple[Path, TableFile, RowRange]]:
        for item in unit.items:
            start, number, count, name = item.split(":", 3)
            yield Path(name), open_table(Path(name)), RowRange(int(start), int(number), int(count))

    def _check(self, path: Path) -> None:
        """Checks that a table has the columns, and that the image column holds images."""
        table = open_table(path)
        require(table, self._columns, "set image, caption and key of ingest.source in params.yaml to columns it has")
        if not isinstance(table, ParquetTable):
            return
        import pyarrow.types as kinds

        kind = table.schema.field(self._settings.image).type
        kind = kind.value_type if kinds.is_dictionary(kind) else kind
        if table.is_text(self._settings.image):
            if self._images is None:
                raise ValueError(
                    f"{path}: column {self._settings.image} holds paths; set ingest.source.images in params.yaml to "
                    "the folder that they start from"
                )
        elif not any(
            test(kind) for test in (kinds.is_binary, kinds.is_large_binary, kinds.is_binary_view, kinds.is_struct)
        ):
            raise ValueError(
                f"{path}: column {self._settings.image} holds {kind}, neither encoded images nor paths; set "
                "ingest.source.image in params.yaml to the column of images"
            )

    def _record(self, row: TableRow, table: Path, where: str, keys: set[str]) -> ImageRecord | Failure:
        """Turns a row into a record or failure; adds its key to `keys`."""
        prefix, place = prefix_of(table, self._root), f"{table.stem}-{row.number:09d}"
        if row.problem is not None:
            return Failure(key_of(place, prefix), where, *row.problem)
        image, caption, *named = row.values
        data, path = _image(image)
        path = self._below(path)
        name = as_name(named[0]) if named else path or place
        if not is_key(key_of(name)):
            reason = f"column {self._settings.key} has no name for the sample"
            return Failure(key_of(place, prefix), where, reason, "missing")
        key = key_of(name, prefix)
        if key in keys:
            return Failure(key, where, f"its key {key!r} occurred earlier", "duplicate")
        keys.add(key)
        if not isinstance(caption, str | bytes):
            return Failure(key, where, f"there is no text in column {self._settings.caption}", "missing")
        encoded = data if data is not None else self._file(key, where, path)
        if isinstance(encoded, Failure):
            return encoded
        return self._validator(key, where, encoded, caption, Path(path).suffix[1:])

    def _below(self, path: str) -> str:
        """A path relative to the folder of images, if it is absolute and leads there; any other path unchanged."""
        if self._resolved is None or not path.startswith("/"):
            return path
        try:
            return Path(path).resolve().relative_to(self._resolved).as_posix()
        except (OSError, ValueError):  # it leads elsewhere, or no file can have this name
            return path

    def _file(self, key: str, where: str, path: str) -> bytes | Failure:
        """The image file that a row names."""
        if not path or self._images is None:
            return Failure(key, where, f"there is no image in column {self._settings.image}", "missing")
        try:
            inside = is_inside(self._images, path)
        except (OSError, ValueError) as error:  # no file can have this name
            return Failure(key, where, f"{printable(path)} is not a valid path: {error}", "missing")
        if not inside:
            link = outward_link(self._images, path)
            through = f": it leads out through the link {link} → {link.readlink()}" if link else ""
            reason = printable(f"{path} is not in ingest.source.images, {self._images}{through}")
            return Failure(key, where, reason, "unsafe")
        return self._validator.read(key, where, self._images / path)


def is_inside(folder: Path, path: str) -> bool:
    """Whether a path does not lead out of the folder that it is relative to, not even by links."""
    return not escapes_folder(path) and (folder / path).resolve().is_relative_to(folder.resolve())


def outward_link(folder: Path, path: str) -> Path | None:
    """The link by which a path below a folder leads out of it; None if there is none."""
    if escapes_folder(path):
        return None
    places = (part for part in reversed([Path(path), *Path(path).parents]) if not is_inside(folder, str(part)))
    return next((folder / place for place in places), None)


def _image(value: Any) -> tuple[bytes | None, str]:
    """The encoded image in a cell, None if it holds none, and the path in it, "" if it holds none."""
    if isinstance(value, dict):  # as written by the datasets library
        path = value.get("path")
        return value.get("bytes"), path if isinstance(path, str) else ""
    if isinstance(value, bytes):
        return value, ""
    return None, value if isinstance(value, str) else as_name(value)
