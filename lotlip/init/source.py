"""Finds out how own data is stored: the kind of source, and the columns of images and captions."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow.types as kinds

from lotlip.caption.quality import words_of
from lotlip.core.listing import files_below, files_with_endings
from lotlip.data.fields import listed
from lotlip.data.images import ENDINGS, is_encoded
from lotlip.data.rows import TABLES, ParquetTable, TableFile, as_name, find_tables, open_table, require
from lotlip.data.text import split_sub_captions
from lotlip.ingest.sources.folder import CAPTIONS
from lotlip.ingest.sources.table import is_inside, outward_link
from lotlip.ingest.sources.webdataset import TARS

_ROWS = 200  # that are read to find the columns
_IMAGES = 10  # cells that are tried to find a column of images
_KEY_NAMES = ("key", "id", "name", "image_id", "uid")
_PLACEHOLDER = "<image>"  # for the image in a prompt to a model, as LLaVA and ShareGPT4V write it
# A column with this many times as many words as the short caption has long captions.
_LONGER = 1.5
_FILLED = 0.9
NO_LONG_CAPTIONS = "long captions: none; the short captions' own sentences are used"
_FEWEST_WORDS = 2  # on average, in a column of captions


@dataclass(frozen=True)
class DataSource:
    """How own data is stored.

    Attributes:
        source: section `ingest.source` of params.yaml, without shares.
        captioners: section `caption.captioners`: a table captioner per column of long captions, or one for all.
        found: what was guessed, one line each.
    """

    source: dict[str, Any]
    captioners: dict[str, dict[str, Any]] = field(default_factory=dict)
    found: list[str] = field(default_factory=list)

    def in_terms_of(self, place: Callable[[str], str]) -> DataSource:
        """The same source with other paths.

        Args:
            place: returns the new path for a path.
        """

        def moved(section: dict[str, Any]) -> dict[str, Any]:
            paths: list[str] = [name for name in ("path", "images") if name in section]
            if section.get("model") == section["path"]:  # a captioner's folder
                paths.append("model")
            return section | {name: place(section[name]) for name in paths}

        captioners = {name: moved(section) for name, section in self.captioners.items()}
        return replace(self, source=moved(self.source), captioners=captioners)


def relative_to(folder: Path) -> Callable[[str], str]:
    """Returns a function that takes a relative path, or a model's name with one, and returns it as seen from a folder.

    The modules of this package stay: they are in every folder in which the pipeline runs.
    """

    def place(name: str) -> str:
        kind, colon, file = name.rpartition(":") if name.startswith("open_clip:") else ("", "", name)
        stays = Path(file).is_absolute() or not Path(file).exists() or file.startswith("lotlip/caption/")
        if stays or folder.resolve() == Path.cwd():
            return name
        return f"{kind}{colon}{os.path.relpath(Path(file).resolve(), folder.resolve())}"

    return place


@dataclass(frozen=True)
class Columns:
    """Columns that the user names; None: to be found."""

    image: str | None = None
    caption: str | None = None
    long: Sequence[str] = ()


def find_source(data: Path, images: Path | None, columns: Columns = Columns()) -> DataSource:
    """Finds out how data is stored.

    Args:
        data: a table (`TABLES`) or a folder of such, a tar or a folder of tars, or a folder of images with captions in
            .txt files.
        images: folder that the paths in a table start from; None: to be found.
        columns: columns of a table that are known.

    Raises:
        ValueError: the data has none of these forms, or its columns cannot be found.
    """
    kind = _kind(data, images)
    named = [columns.image, columns.caption, *columns.long]
    if kind in TABLES.values():
        return _table_source(data, kind, images, columns)
    if images is not None or any(named):
        raise ValueError(f"--images and columns are for tables, but {data} is {_WHAT[kind]}; remove them")
    return DataSource({"kind": kind, "path": data.as_posix()}, found=[f"{data} is {_WHAT[kind]}", NO_LONG_CAPTIONS])


_WHAT = {
    "folder": "a folder of images with captions in .txt files",
    "webdataset": "tars of images with captions (WebDataset, img2dataset)",
}


def _kind(data: Path, images: Path | None) -> str:
    if not data.exists():
        raise ValueError(f"--data {data} does not exist; name a table, a tar, or a folder")
    forms = f"{', '.join(TABLES)}, tars, or a folder of images, each with a .txt of the same stem"
    if data.is_file():
        if data.suffix.lower() in TABLES:
            return TABLES[data.suffix.lower()]
        if data.name.lower().endswith(TARS):
            return "webdataset"
        raise ValueError(f"--data {data} is of another form than {forms}; convert it")
    files = list(files_below(data))
    pictures = {file.with_suffix("") for file in files if file.suffix[1:].lower() in ENDINGS}
    captioned = pictures & {file.with_suffix("") for file in files if file.suffix in CAPTIONS}
    tars = {file.with_name(file.name.split(".")[0]) for file in files if file.name.lower().endswith(TARS)}
    # img2dataset writes a table with metadata beside each tar
    tables = [file for file in files_below(data, images) if file.suffix.lower() in TABLES]
    tables = sorted(table for table in tables if table.with_suffix("") not in tars)
    tables = [table for table in tables if table.suffix.lower() != ".json"] or tables
    if captioned and (2 * len(captioned) > len(pictures) or not (tables or tars)):
        return "folder"
    if tars and not (tables and (pictures or images)):
        return "webdataset"
    if tars and images is None:
        raise ValueError(
            f"--data {data} has tars, and images with a table ({tables[0]}); name the table, or move the tars into a "
            "folder of their own and name that"
        )
    found = sorted({TABLES[table.suffix.lower()] for table in tables})
    if len(found) == 1:
        return found[0]
    files_with_endings(data, (*TABLES, *TARS))  # raises if they are compressed
    raise ValueError(f"--data {data} has {' and '.join(found) or 'none'} of {forms}; name the file with the captions")


# --- tables -------------------------------------------------------------------------------------------------------


def _table_source(data: Path, kind: str, images: Path | None, columns: Columns) -> DataSource:
    tables = find_tables(data, kind, images)
    if data.is_dir() and len(folders := {table.parent for table in tables}) == 1:
        data = folders.pop()  # paths in a table often start from its folder
    table = open_table(tables[0])
    named = [name for name in (columns.image, columns.caption, *columns.long) if name]
    require(table, named, "name columns it has")
    embedded = _embedded_images(table)
    texts = _texts(table, embedded, named)
    for name in named:
        if name not in texts and not (name in embedded and name == columns.image):
            raise ValueError(f"column {name} of {data} has nested values or binary data; name a column of texts")
    found = [f"{data} is a table ({kind}) with the columns {listed(table.columns)}"]
    if repeated := [name for name in dict.fromkeys(table.columns) if table.columns.count(name) > 1]:
        found.append(f"not used: column {', '.join(repeated)}, of which there are several; rename them to use them")
    if columns.image in embedded or (columns.image is None and embedded):
        image = columns.image or embedded[0]
        found.append(f"images: in column {image}")
        source = {"kind": kind, "path": data.as_posix(), "image": image}
    else:
        image, folder = _image_paths(data, texts, images, columns.image)
        if kind == "csv" and _is_image(folder, image):
            raise ValueError(
                f"{tables[0]} has no header: its first line names the image {image}; add a line with names of columns, "
                "such as image and caption, before it"
            )
        found.append(f"images: files below {folder}, named by column {image}")
        source = {"kind": kind, "path": data.as_posix(), "image": image, "images": folder.as_posix()}
    caption, long = _captions(data, {name: cells for name, cells in texts.items() if name != image}, columns)
    found.append(f"short captions: column {caption}")
    source["caption"] = caption
    if not long:
        return DataSource(source, found=[*found, NO_LONG_CAPTIONS])
    found.append(f"long captions: column {', '.join(long)}")
    key = image
    if image in embedded:
        key = _key_column(data, texts, [caption, *long])
        source["key"] = key
        found.append(f"keys: column {key}")
    elif any(cell.startswith("/") for cell in texts[image]):
        source["key"] = image  # the whole path, as the captioners read it
    section: dict[str, Any] = {
        "kind": "table",
        "path": data.as_posix(),
        **({"images": source["images"]} if data.is_dir() and image not in embedded else {}),
        "key": key,
        "captioner": None,
        "repeated": "first",
    }
    if all(_is_long_caption(texts[name]) for name in long):
        captioners = {captioner_name(name, number): {**section, "text": name} for number, name in enumerate(long)}
    else:
        captioners = {"own": {**section, "text": long}}
        if len(long) > 1:
            found.append("these columns are joined into one long caption, because some are empty or of one sentence")
    return DataSource(source, captioners, found)


def _is_long_caption(cells: Sequence[str]) -> bool:
    """Whether nearly every cell has a text, and of two sub-captions or more on average."""
    counts = [len(split_sub_captions(cell, "unicode")) for cell in cells if cell.strip()]
    return len(counts) >= _FILLED * len(cells) and sum(counts) >= 2 * len(counts)


def _embedded_images(table: TableFile) -> list[str]:
    """Columns of a Parquet file that hold encoded images."""
    if not isinstance(table, ParquetTable):
        return []
    tests = (kinds.is_binary, kinds.is_large_binary, kinds.is_binary_view, kinds.is_struct)
    columns = [
        column.name
        for column in table.schema
        if table.columns.count(column.name) == 1 and any(test(column.type) for test in tests)
    ]
    return [name for name in columns if _has_images(row.values for row in islice(table.rows([name]), _ROWS))]


def _has_images(rows: Iterable[Sequence[Any]]) -> bool:
    """Whether the first cells with binary data are mostly encoded images; others are hashes, features or metadata."""
    cells = (value.get("bytes") if isinstance(value, dict) else value for value, *_ in rows)
    images = [is_encoded(cell) for cell in islice((cell for cell in cells if isinstance(cell, bytes)), _IMAGES)]
    return 2 * sum(images) > len(images)


def _texts(table: TableFile, without: Sequence[str], named: Sequence[str]) -> dict[str, list[str]]:
    """The first cells of each column as text; columns that mostly have nested values or binary data are left out.

    Such a cell of another column is unreadable: it counts as empty here, and ingest reports its row. Its nested values
    are columns only if the user named them.
    """
    columns = [name for name in table.columns if name not in without and table.columns.count(name) == 1]
    rows = list(islice(table.rows(columns), _ROWS))
    valid = [row.values for row in rows if row.problem is None]
    if not valid:
        first = next((f"{table.unit} {row.number}: {row.problem[0]}" for row in rows if row.problem), "it has none")
        raise ValueError(f"{table.path} has no rows that can be read ({first}); correct it")
    cells = {name: [row[number] for row in valid] for number, name in enumerate(columns)}
    flat = {name: values for name, values in cells.items() if _is_mostly_flat(values)}
    mixed = tuple(f"{name}." for name, values in flat.items() if not all(map(_is_flat, values)))
    return {
        name: [as_name(value) if _is_flat(value) else "" for value in values]
        for name, values in flat.items()
        if name in named or not name.startswith(mixed)
    }


def _is_mostly_flat(values: Sequence[Any]) -> bool:
    filled = [_is_flat(value) for value in values if value is not None]
    return 2 * sum(filled) > len(filled) or not filled


def _is_flat(value: Any) -> bool:
    if isinstance(value, bytes):
        return value.decode("utf-8", "ignore").encode() == value
    return not isinstance(value, dict | list)


def _image_paths(data: Path, texts: dict[str, list[str]], images: Path | None, column: str | None) -> tuple[str, Path]:
    """The column of paths, and the folder that they start from."""
    parent = data if data.is_dir() else data.parent
    folders = [images] if images is not None else [parent, *(parent / name for name in ("images", "pictures"))]
    if images is not None and not images.is_dir():
        raise ValueError(f"--images {images} is not a folder; name the folder that the paths in {data} start from")
    names = [column] if column is not None else list(texts)
    shares = {
        (name, folder): sum(_is_image(folder, cell) for cell in texts[name]) / len(texts[name])
        for name in names
        for folder in (folders if images is not None else [*folders, *_common_folder(texts[name])])
        if folder.is_dir()
    }
    best = max(shares, key=lambda place: shares[place], default=None)
    if best is None or shares[best] < 0.5:
        for name, folder in [*shares, *((name, parent) for name in names)]:
            if link := next(filter(None, (_outward_link(folder, cell) for cell in texts[name])), None):
                other = f", or remove {link.relative_to(folder)}/ from the paths and add --images {link}"
                raise ValueError(
                    f"column {name} of {data} has paths that lead out of {folder}, through the link {link} → "
                    f"{link.readlink()}; replace the link by what it leads to{other if link.is_dir() else ''}"
                )
        where = ", ".join(str(folder) for folder in folders)
        what = f"column {column} of {data}" if column else f"no column of {data}"
        raise ValueError(
            f"{what} {'does not have' if column else 'has'} paths of images below {where}"
            f"{_not_found({name: texts[name] for name in names})}; name the folder with --images and the column with "
            "--image-column"
        )
    return best


def _common_folder(cells: Sequence[str]) -> list[Path]:
    """The folder that all absolute paths are in, if there are any."""
    folders = {Path(cell).parent for cell in cells if cell.startswith("/")}
    return [Path(os.path.commonpath(folders))] if folders else []


def _not_found(texts: dict[str, list[str]]) -> str:
    """Says which column has names of images that are no files, if one does, or which columns there are."""
    named = [(name, cell) for name, cells in texts.items() for cell in cells if cell]
    for name, cell in named:
        if "://" not in cell and cell.rpartition(".")[2].lower() in ENDINGS:
            return f"; column {name} has {cell}, which is not there"
    for name, cell in named:
        if "://" in cell:
            return f"; column {name} has addresses, such as {cell}: download the images, for example with img2dataset"
    return f" (it has: {listed(list(texts))})"


def _is_image(folder: Path, cell: str) -> bool:
    """Whether ingest accepts a path in a folder."""
    try:
        # an absolute path is made relative to the folder
        path = Path(cell).resolve().relative_to(folder.resolve()).as_posix() if cell.startswith("/") else cell
        return bool(cell) and is_inside(folder, path) and (folder / path).is_file()
    except (OSError, ValueError):  # no file can have this name
        return False


def _outward_link(folder: Path, cell: str) -> Path | None:
    """The link by which a path of a file leads out of the folder, so that ingest does not accept it."""
    try:
        return outward_link(folder, cell) if (folder / cell).is_file() else None
    except (OSError, ValueError):  # no file can have this name
        return None


def _captions(data: Path, texts: dict[str, list[str]], columns: Columns) -> tuple[str, list[str]]:
    """The column of short captions, and those of long captions."""
    lengths = {name: _words(cells) for name, cells in texts.items()}
    prose = {name: length for name, length in lengths.items() if length >= _FEWEST_WORDS and _is_prose(texts[name])}
    if columns.caption is not None:
        caption = columns.caption
    else:
        candidates = {name: length for name, length in prose.items() if name not in columns.long}
        if not candidates:
            raise ValueError(
                f"{data} has no column of captions (different texts of {_FEWEST_WORDS} words or more) among "
                f"{listed(list(texts) or ['those besides images'])}; name it with --caption-column"
            )
        likely = [name for name in candidates if _is_mostly_distinct(texts[name])] or list(candidates)
        named = [name for name in likely if re.search("caption|text|title|alt", name, re.IGNORECASE)]
        caption = min(named or likely, key=lambda name: candidates[name])
    if columns.long:
        return caption, list(columns.long)
    shortest = lengths.get(caption, 0)
    return caption, [name for name, length in prose.items() if name != caption and length >= _LONGER * shortest]


def _words(cells: Sequence[str]) -> float:
    filled = [cell for cell in cells if cell.strip()]
    return sum(len(words_of(cell)) for cell in filled) / len(filled) if filled else 0.0


def _is_prose(cells: Sequence[str]) -> bool:
    """Whether cells are captions, not URLs, paths, prompts, numbers or a few categories."""
    filled = [cell for cell in cells if cell.strip()]
    others = sum("://" in cell or _PLACEHOLDER in cell for cell in filled)
    return 2 * others < len(filled) and (len(filled) < 10 or len(set(filled)) > len(filled) / 10)


def _is_mostly_distinct(cells: Sequence[str]) -> bool:
    """Whether most cells have a text of their own, as captions do; prompts and categories repeat."""
    return 2 * len({cell for cell in cells if cell.strip()}) > len(cells)


def _key_column(data: Path, texts: dict[str, list[str]], others: Sequence[str]) -> str:
    """A column of unique names, which connects images in a table with their long captions."""
    unique = [name for name in texts if name not in others and _is_unique(texts[name])]
    for name in (*(name for name in unique if name.lower() in _KEY_NAMES), *unique):
        return name
    raise ValueError(
        f"{data} has images and long captions, but no column with a unique name in each row; add one, such as `key`"
    )


def _is_unique(cells: Sequence[str]) -> bool:
    return all(cells) and len(set(cells)) == len(cells)


def captioner_name(column: str, number: int) -> str:
    """A valid name of a captioner from a column's name."""
    name = re.sub(r"[^a-z0-9]+", "-", column.lower()).strip("-")[:40]
    return name if name and name != "raw" else f"long-{number + 1}"


def unit_shares(units: int, wanted: int) -> Iterator[int]:
    """Numbers of up to `wanted` of `units` units, evenly spaced.

    >>> list(unit_shares(10, 3)), list(unit_shares(2, 3))
    ([0, 3, 6], [0, 1])
    """
    step = max(units / wanted, 1)
    return (int(number * step) for number in range(min(units, wanted)))
