"""How settings differ, and how params.yaml writes them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from lotlip.core.section import flatten


def differences(settings: Mapping[str, Any], base: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted key → value of `settings`, wherever it differs from `base`."""
    ours, theirs = flatten(settings), flatten(base)
    return {key: ours.get(key) for key in {**ours, **theirs} if ours.get(key) != theirs.get(key)}


def in_words(differs: Mapping[str, Any]) -> str:
    """Differences as params.yaml writes them: "text.corner_tokens = 4, optimizer.betas = [0.9, 0.98]"."""
    return ", ".join(f"{key} = {plain(value)}" for key, value in differs.items()) or "the base"


def plain(value: Any) -> str:
    """A value as params.yaml writes it: "true", "null", "[0.9, 0.98]"; strings go without quotes."""
    if isinstance(value, list):
        return f"[{', '.join(map(plain, value))}]"
    return value if isinstance(value, str) else json.dumps(value, allow_nan=False)
