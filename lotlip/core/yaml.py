"""YAML, parsed by libyaml."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from lotlip.core.section import ConfigError


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]  # PyYAML's wheels have libyaml
    """Refuses repeated keys: PyYAML keeps the last value and drops the others silently."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._checked: set[yaml.MappingNode] = set()

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Checks a mapping before the mappings of its `<<` keys become part of it, which it may override."""
        if node not in self._checked:  # one with an anchor comes again, when it has been merged
            self._checked.add(node)
            marks: dict[tuple[str, str], Any] = {}
            for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
                if first := marks.get((key.tag, key.value)):
                    raise yaml.YAMLError(
                        f"the key {key.value!r} is on line {first.line + 1} and again on line "
                        f"{key.start_mark.line + 1}; rename or remove one of them"
                    )
                marks[key.tag, key.value] = key.start_mark
        super().flatten_mapping(node)


def parse_yaml(text: str, place: str) -> Any:
    """Parses YAML; refuses repeated keys, and tags that would create objects of Python.

    Every stage parses params.yaml twice; libyaml takes a seventh of the time of the parser in Python.

    Args:
        text: YAML or JSON.
        place: name of the file in error messages.

    Raises:
        ConfigError: it is not YAML; the message quotes the line.
    """
    try:
        try:
            return yaml.load(text, Loader=_Loader)  # noqa: S506 (a safe loader)
        except yaml.YAMLError:
            yaml.safe_load(text)  # libyaml's message lacks the line
            raise
    except yaml.YAMLError as error:
        raise ConfigError(f"{place} is not YAML: {error}") from error


def read_yaml(path: Path) -> Any:
    """Reads a YAML file.

    Raises:
        ConfigError: it is not YAML in UTF-8; the message names the file and the line.
        OSError: it cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8; save it as UTF-8") from error
    return parse_yaml(text, str(path))
