"""YAML, parsed by libyaml."""

from __future__ import annotations

from typing import Any

import yaml

_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # PyYAML's wheels have it


def parse_yaml(text: str) -> Any:
    """Parses YAML; refuses tags that would create objects of Python.

    Every stage parses params.yaml twice; libyaml takes a seventh of the time of the parser in Python.

    Raises:
        yaml.YAMLError: it is not YAML; the message quotes the line.
    """
    try:
        return yaml.load(text, Loader=_LOADER)  # noqa: S506 (a safe loader)
    except yaml.YAMLError:
        yaml.safe_load(text)  # libyaml's message lacks the line
        raise
