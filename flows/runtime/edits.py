"""Checks the parameters that DVC watches, and notices edits of a stage's parameters and code during its run.

When a stage ends, DVC records the parameters and code that it then finds. If they were edited in the meantime, it would
take the outputs for those of the edited ones, and never run the stage with them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import reduce
from pathlib import Path
from typing import Any

from flows.runtime.scratch import StageFailed
from lotlip.config.params import Params
from lotlip.core.code import code_hash, is_edited
from lotlip.core.differences import differences, format_differences
from lotlip.core.section import ConfigError
from lotlip.core.yaml import read_yaml

GRAPH, PARAMS = Path("dvc.yaml"), Path("params.yaml")


class Inputs:
    """The parameters and code of a stage, as they are now.

    Args:
        stage: "ingest", "pretrain", …
        item: the captioner or ablation, for a stage that has one.
    """

    def __init__(self, stage: str, item: str | None = None) -> None:
        self._stage, self._item = stage, item
        self._parameters = parameters(stage, item)
        code_hash(stage)  # reads the code

    def check(self) -> None:
        """Compares them with what they were.

        Raises:
            StageFailed: they were edited.
        """
        remedy = "undo the edit and run again, which continues this run, or run again to use it"
        try:
            edited = differences(parameters(self._stage, self._item), self._parameters)
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise StageFailed(f"{PARAMS} was edited during this run and cannot be read ({error}); {remedy}") from error
        if edited:
            raise StageFailed(f"{PARAMS} was edited during this run ({format_differences(edited)}); {remedy}")
        if is_edited(self._stage):
            raise StageFailed(f"the code of this stage was edited during this run; {remedy}")


def check_watched_parameters(params: Params) -> None:
    """Checks that params.yaml has every key of its own that dvc.yaml watches.

    DVC would fail at the first stage that lacks one. It names other problems of dvc.yaml itself.

    Args:
        params: params.yaml, with the defaults of the keys that it lacks.

    Raises:
        ConfigError: a key is missing.
    """
    try:
        given = [name for entry in _stages() for name in entry.get("params") or ()]
    except (OSError, ConfigError, AttributeError, TypeError):
        return
    watched = [name for name in given if isinstance(name, str) and "${" not in name]
    values = read_yaml(PARAMS)
    defaults = params.model_dump(mode="json")
    missing = [
        f"{name}: {json.dumps(reduce(_member, name.split('.'), defaults), allow_nan=False)}"
        for name in dict.fromkeys(watched)
        if _has(defaults, name) and not _has(values, name)
    ]
    if missing:
        raise ConfigError(f"{PARAMS} lacks keys that DVC watches; add them with these defaults:", missing)


def _has(values: Any, name: str) -> bool:
    """Whether a mapping of mappings has a dotted key, also if its value is null."""
    *sections, key = name.split(".")
    section = reduce(_member, sections, values)
    return isinstance(section, dict) and key in section


def _stages() -> Iterator[dict[str, Any]]:
    """Yields the definition of each stage of dvc.yaml."""
    graph = read_yaml(GRAPH) or {}
    for entry in graph.get("stages", {}).values():
        yield entry.get("do", entry)


def parameters(stage: str, item: str | None) -> dict[str, Any]:
    """Returns the values of the parameters that dvc.yaml lists for a stage; nothing if there are no such files.

    A parameter that params.yaml lacks is null: ablations with and without `init_from` are in different sections.
    """
    if not (GRAPH.is_file() and PARAMS.is_file()):
        return {}
    names: list[str] = []
    for entry in _stages():
        if str(entry.get("cmd")).split()[:4] == ["python", "-m", "flows", stage]:
            names += [name.replace("${key}", item or "") for name in entry["params"]]
    values = read_yaml(PARAMS)
    return {name: reduce(_member, name.split("."), values) for name in names}


def _member(values: Any, name: str) -> Any:
    return values.get(name) if isinstance(values, dict) else None
