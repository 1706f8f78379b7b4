"""Numbers in environment variables."""

import os


def number_of(variable: str, default: int, largest: int) -> int:
    """Returns the number in an environment variable, or the default if it is not set.

    Raises:
        ValueError: it is not a whole number from 1 to `largest`.
    """
    given = os.environ.get(variable, "").strip()
    if not given:
        return default
    if not given.isdecimal() or not 1 <= int(given) <= largest:
        raise ValueError(
            f"{variable} is {given!r} in the environment; set it to a number in 1 to {largest}, or unset it"
        )
    return int(given)
