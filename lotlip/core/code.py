"""Which of the project's files decide what a stage writes: DVC's graph, fingerprints and the fork server ask here."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from lotlip.core.files import sha256_files
from lotlip.core.stages import section

ROOT = Path(__file__).parents[2]
_MODULE = re.compile(r"((?:lotlip|flows)(?:\.\w+)+)(?::\w+)?")
# Packages that store, show, start and check what others compute. No change to them changes what a stage computes.
INFRASTRUCTURE = (
    "flows/runtime",
    "lotlip/config",
    "lotlip/core",
    "lotlip/tracking",
    "lotlip/__init__.py",
    "lotlip/_auto.py",
)


def stage_files(stage: str) -> list[Path]:
    """The files that decide what a stage writes: its flow, its package and all that these import, sorted.

    Imports are followed wherever they are in a file, except for those that are for types only. Strings that
    name a module, or something in it (`lotlip.demo.source:SceneSource`), count as imports. A package's files that are
    not Python (word lists, tokenizers) belong to it.

    Args:
        stage: "ingest", "image-tower", …
    """
    name = section(stage)
    flow, package = ROOT / "flows" / "stages" / f"{name}.py", ROOT / "lotlip" / name
    waiting = [flow, *package.rglob("*.py")]
    found = set(waiting)
    while waiting:
        for file in _imported(waiting.pop()):
            if file not in found and not file.relative_to(ROOT).as_posix().startswith(INFRASTRUCTURE):
                found.add(file)
                waiting.append(file)
    packages = {file.parent for file in found}
    others = (path for path in (ROOT / "lotlip").rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc"))
    return sorted({*found, *(path for path in others if _package(path) in packages)})


def _package(path: Path) -> Path:
    """The folder of the package that a file belongs to."""
    return next(folder for folder in path.parents if (folder / "__init__.py").is_file())


@cache
def code_hash(*stages: str) -> str:
    """The hash of the files that decide what stages write: work done by other code is not resumed."""
    return sha256_files(sorted({file for stage in stages for file in stage_files(stage)}))


def _imported(file: Path) -> Iterator[Path]:
    """The project's files that a file imports, or names as a string: a program to start, a variant of some `kind`."""
    waiting: list[ast.AST] = [ast.parse(file.read_text(encoding="utf-8"))]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        waiting += ast.iter_child_nodes(node)
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and (named := _MODULE.fullmatch(node.value)):
            names = [named[1]]
        for name in names:
            place = ROOT.joinpath(*name.split("."))
            yield from (path for path in (place.with_suffix(".py"), place / "__init__.py") if path.is_file())
