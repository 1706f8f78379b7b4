"""Splits samples at random, by key and seed."""

from __future__ import annotations

import hashlib

from lotlip.ingest.config import SplitByKey


def split_of(key: str, settings: SplitByKey) -> str:
    """The split of a sample: a function of its key and `split_seed` only."""
    digest = hashlib.sha256(f"{settings.split_seed}:{key}".encode()).digest()
    place = int.from_bytes(digest[:8], "big") / 2**64
    if place < settings.test_share:
        return "test"
    return "val" if place < settings.test_share + settings.val_share else "train"
