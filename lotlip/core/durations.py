"""Durations in words."""

from __future__ import annotations


def in_words(seconds: float) -> str:
    """Describes an estimated duration.

    >>> in_words(30), in_words(300), in_words(9000), in_words(900_000)
    ('a minute', '5 minutes', '2.5 hours', '250 hours')
    """
    minutes = seconds / 60
    if minutes < 1.5:
        return "a minute"
    if minutes < 120:
        return f"{minutes:.0f} minutes"
    hours = minutes / 60
    return f"{hours:,.0f} hours" if hours >= 100 else f"{hours:.1f} hours"
