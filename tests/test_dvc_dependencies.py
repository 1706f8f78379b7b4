"""dvc.yaml: every module that decides what a stage writes is among the stage's dependencies."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parent.parent
STAGES: dict[str, Any] = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]

# These run, check, store and show what other modules make: a change of theirs changes no result.
MACHINERY = (
    "flows/",
    "lotlip/__init__.py",
    "lotlip/caches.py",
    "lotlip/config/",  # params.yaml is watched by itself
    "lotlip/console.py",
    "lotlip/files.py",
    "lotlip/gate.py",
    "lotlip/lifetime.py",
    "lotlip/loopback.py",
    "lotlip/outputs.py",
    "lotlip/temporary.py",
    "lotlip/tracking.py",
    "lotlip/validation.py",
)
# Started as a program of its own.
PROGRAMS = {"pretrain": ["lotlip/training/pretrain.py"], "continue": ["lotlip/training/pretrain.py"]}
_SCENES_ONLY = {  # imported by scenes.py for its source, of which other stages use the drawing alone
    "lotlip/records.py",
    "lotlip/sources/intake.py",
    "lotlip/text.py",
}
OTHERWISE_WATCHED = {
    "ingest": {"lotlip/sources/scenes.py"},  # `path` of the source that uses it
    "image-tower": _SCENES_ONLY,
    "caption": {  # `path` of the captioners that use them, and what only these import
        "lotlip/batches.py",
        "lotlip/captioning/endpoint.py",
        "lotlip/captioning/mllm.py",
        "lotlip/captioning/scenes.py",
        "lotlip/models/weights.py",
        "lotlip/sources/intake.py",
        "lotlip/sources/scenes.py",
    },
    "report": _SCENES_ONLY,
}


def imported(file: Path) -> Iterator[str]:
    """The project's files that a file imports, anywhere in it, but not for its types alone."""
    waiting: list[ast.AST] = [ast.parse(file.read_text(encoding="utf-8"))]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        waiting += ast.iter_child_nodes(node)
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        for name in names:
            place = name.replace(".", "/")
            yield from (found for found in (f"{place}.py", f"{place}/__init__.py") if (ROOT / found).is_file())


def needed(stage: str) -> set[str]:
    """The files that decide what a stage writes."""
    command = STAGES[stage].get("do", STAGES[stage])["cmd"].split()
    start = [f"{command[2].replace('.', '/')}.py", *PROGRAMS.get(stage, [])]
    found, waiting = set(start), start
    while waiting:
        for file in imported(ROOT / waiting.pop()):
            if file not in found and not file.startswith(MACHINERY):
                found.add(file)
                waiting.append(file)
    return found


@pytest.mark.parametrize("stage", STAGES)
def test_what_decides_a_stages_results_is_among_its_dependencies(stage: str) -> None:
    listed = [path for path in STAGES[stage].get("do", STAGES[stage])["deps"] if path.startswith(("flows", "lotlip"))]
    assert all((ROOT / path).exists() for path in listed)
    missing = {
        file
        for file in needed(stage) - OTHERWISE_WATCHED.get(stage, set())
        if not any(file == path or file.startswith(f"{path}/") for path in listed)
    }
    assert not missing
