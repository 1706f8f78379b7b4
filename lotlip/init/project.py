"""Sets up a folder in which the pipeline runs: the command `lotlip run`."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import lotlip
from lotlip.core.files import atomic_write
from lotlip.core.yaml import read_yaml

_PACKAGE = Path(lotlip.__file__).parent
_PACKED = _PACKAGE / "_pipeline"  # in the wheel; see hatch_build.py
_BESIDE = _PACKED if _PACKED.is_dir() else _PACKAGE.parent
# What a project consists of besides its data and params.yaml. DVC needs the code in the project: it decides what is
# stale, also after an upgrade of the package.
_FILES = {
    "lotlip": _PACKAGE,
    "flows": _BESIDE / "flows",
    "dvc.yaml": _BESIDE / "dvc.yaml",
    ".dvcignore": _BESIDE / ".dvcignore",
    ".dvc/config": _BESIDE / ".dvc" / "config",
}
_KNOWN_BY = {"lotlip": "cli.py", "flows": "reproduce.py"}
_LAST = "python -m flows report"  # the last stage of dvc.yaml
# Packages of the extra `pipeline` that start everything else.
_NEEDED = ("dvc", "prefect")


def set_up(folder: Path, show: Callable[[str], object]) -> None:
    """Copies the pipeline's code and DVC's configuration into a folder, unless it has them, as a checkout does.

    Args:
        folder: with params.yaml.
        show: prints a line.

    Raises:
        ValueError: params.yaml is missing, or a file or folder of the same name as one of the pipeline's is in the way.
        ModuleNotFoundError: the extra `pipeline` is not installed.
    """
    if not (folder / "params.yaml").is_file():
        raise ValueError(
            f"{folder.resolve()} has no params.yaml; write one with `lotlip init`, or change to the project's folder"
        )
    for name in _NEEDED:
        if find_spec(name) is None:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    for name, file in _KNOWN_BY.items():
        if (folder / name).exists() and not (folder / name / file).is_file():
            raise ValueError(
                f"{(folder / name).resolve()} is not the pipeline's code, which must be there; run in another folder"
            )
    graph = folder / "dvc.yaml"
    if graph.exists() and not _is_ours(read_yaml(graph)):
        raise ValueError(f"{graph.resolve()} is another pipeline's, which would run instead; run in another folder")
    missing = {name: source for name, source in _FILES.items() if not (folder / name).exists()}
    for name, source in missing.items():
        with atomic_write(folder / name) as partial:
            if source.is_dir():
                shutil.copytree(source, partial, ignore=shutil.ignore_patterns("__pycache__", _PACKED.name))
            else:
                shutil.copyfile(source, partial)
    if missing:
        show(f"copied from the installed package: {', '.join(missing)}")
    old = [name for name in _KNOWN_BY if _code(folder / name) != _code(_FILES[name])]
    if old:
        show(
            f"note: {' and '.join(old)} here and in the installed package differ, perhaps after an upgrade or an edit; "
            "to use the installed code, remove lotlip, flows and dvc.yaml here and run again"
        )


def _is_ours(graph: Any) -> bool:
    """Whether the content of a dvc.yaml has this pipeline's last stage, as those of earlier versions do."""
    stages = graph.get("stages") if isinstance(graph, dict) else None
    return isinstance(stages, dict) and any(
        isinstance(stage, dict) and stage.get("cmd") == _LAST for stage in stages.values()
    )


def _code(folder: Path) -> dict[Path, bytes]:
    files = (file.relative_to(folder) for file in folder.rglob("*.py"))
    return {file: (folder / file).read_bytes() for file in files if file.parts[0] != _PACKED.name}
