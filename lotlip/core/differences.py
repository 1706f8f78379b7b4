"""Differences between settings, and settings as params.yaml writes them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from lotlip.core.section import flatten


def differences(settings: Mapping[str, Any], base: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted key → value in `settings`, for every key whose value differs from `base`."""
    ours, theirs = flatten(settings), flatten(base)
    return {key: ours.get(key) for key in {**ours, **theirs} if ours.get(key) != theirs.get(key)}


def replacements(
    settings: Mapping[str, Any], base: Mapping[str, Any], given: Mapping[str, Any], prefix: str = ""
) -> dict[str, Any]:
    """Dotted key → value, which turn `base` into `settings`; a mapping with other keys is replaced as a whole.

    Args:
        settings: all settings, with defaults.
        base: likewise.
        given: `settings` without the defaults, as a mapping is written.
        prefix: of the dotted keys.
    """
    changes: dict[str, Any] = {}
    for key, value in settings.items():
        old, short = base[key], given.get(key, value)
        if isinstance(value, Mapping) and isinstance(old, Mapping) and value.keys() == old.keys():
            changes |= replacements(value, old, short, f"{prefix}{key}.")
        elif value != old:
            changes[f"{prefix}{key}"] = short
    return changes


def format_differences(differs: Mapping[str, Any]) -> str:
    """Differences as params.yaml writes them: "text.corner_tokens = 4, optimizer.betas = [0.9, 0.98]"."""
    return ", ".join(f"{key} = {format_value(value)}" for key, value in differs.items()) or "the base"


def format_value(value: Any) -> str:
    """A value as params.yaml writes it: "true", "null", "[0.9, 0.98]"; strings are not quoted."""
    if isinstance(value, list):
        return f"[{', '.join(map(format_value, value))}]"
    return value if isinstance(value, str) else json.dumps(value, allow_nan=False)
