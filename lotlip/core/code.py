"""Finds the source files that decide what a stage writes, for DVC's graph, fingerprints and the fork server."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from lotlip.core.files import sha256_files
from lotlip.core.listing import files_below
from lotlip.core.stages import section

ROOT = Path(__file__).parents[2]
_TRIES = 20
_MODULE = re.compile(r"((?:lotlip|flows)(?:\.\w+)+)(?::\w+)?")
# Packages that store, show, start and check what others compute. Changing them does not change what a stage computes.
INFRASTRUCTURE = (
    "flows/runtime",
    "lotlip/config",
    "lotlip/core",
    "lotlip/tracking",
    "lotlip/__init__.py",
    "lotlip/_auto.py",
)


def stage_files(stage: str) -> list[Path]:
    """The files that decide what a stage writes: its flow, its package and everything these import, sorted.

    All imports of a file are followed, except those under TYPE_CHECKING. A string that names a module, or an object in
    one (`lotlip.demo.source:SceneSource`), counts as an import. A package's data files (word lists, tokenizers) are
    included.

    Args:
        stage: "ingest", "image-tower", …
    """
    name = section(stage)
    pending = [ROOT / "flows" / "stages" / f"{name}.py", *source_files(ROOT / "lotlip" / name)]
    sources = set(pending)
    while pending:
        for file in _imported(pending.pop().read_text(encoding="utf-8")):
            if file not in sources and not file.relative_to(ROOT).as_posix().startswith(INFRASTRUCTURE):
                sources.add(file)
                pending.append(file)
    packages = {file.parent for file in sources}
    others = (path for path in _files_of(ROOT / "lotlip") if path.suffix != ".py")
    return sorted({*sources, *(path for path in others if _package(path) in packages)})


def source_files(package: Path) -> list[Path]:
    """The Python files of a package and its subpackages, sorted."""
    return sorted(path for path in _files_of(package) if path.suffix == ".py")


def _files_of(package: Path) -> Iterator[Path]:
    """The files of a package. Other processes write compiled code beside them, and editors write hidden files."""
    return (path for path in files_below(package) if path.parent.name != "__pycache__")


def _package(path: Path) -> Path:
    """The folder of the package that a file belongs to."""
    return next(folder for folder in path.parents if (folder / "__init__.py").is_file())


@cache
def code_hash(*stages: str) -> str:
    """The hash of the files that decide what stages write. Work is not resumed with other code."""
    return sha256_files(_files(*stages))


def is_edited(*stages: str) -> bool:
    """Whether these files differ from those whose hash `code_hash` returned first in this process."""
    before = code_hash(*stages)
    try:
        return sha256_files(_files(*stages)) != before
    except FileNotFoundError:
        return True


@cache
def _files(*stages: str) -> list[Path]:
    return sorted({file for stage in stages for file in stage_files(stage)})


def _imported(source: str) -> Iterator[Path]:
    """The project's files that source code imports or names in a string."""
    for name in _modules(source):
        place = ROOT.joinpath(*name.split("."))
        yield from (path for path in (place.with_suffix(".py"), place / "__init__.py") if path.is_file())


@cache
def _modules(source: str) -> tuple[str, ...]:
    """The names that source code imports, or has in a string, as programs to start and variants are named.

    Parsing is most of the time that a hash takes. Forks have the results of the fork server.
    """
    found: list[str] = []
    pending: list[ast.AST] = [_parse(source)]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        pending += ast.iter_child_nodes(node)
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and (named := _MODULE.fullmatch(node.value)):
            names = [named[1]]
        found += (name for name in names if name.split(".")[0] in ("lotlip", "flows"))
    return tuple(dict.fromkeys(found))


def _parse(source: str) -> ast.AST:
    """Parses source code, again where Python 3.11 fails because another thread parses something at the same moment.

    It counts the depth of recursion for all threads together (CPython issue 106905).
    """
    for _ in range(_TRIES):
        try:
            return ast.parse(source)
        except SystemError:
            continue
    return ast.parse(source)
