"""Which of two versions of the agent is older: `1.10.2` is newer than `1.9`. Pure."""

import re

PARTS_MAX = 4


def is_older(version: str, than: str) -> bool:
    """By their numbers, as far as there are any. A version without one is not known, so it is not older."""
    mine, other = _numbers(version), _numbers(than)
    return bool(mine) and mine < other


def _numbers(version: str) -> tuple[int, ...]:
    match = re.match(r"\s*v?(\d{1,9}(?:\.\d{1,9})*)", version)
    if match is None:
        return ()
    numbers = [int(part) for part in match[1].split(".")][:PARTS_MAX]
    return tuple(numbers + [0] * (PARTS_MAX - len(numbers)))
