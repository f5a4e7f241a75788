"""Decimal numbers in bytes. Compiled, these take a third of the time of a regular expression."""

from typing import Final

ZERO: Final = 0x30
NINE: Final = 0x39

DIGITS_MAX: Final = 12
"""Of a count of tokens: with more it is none."""


def digits_end(data: bytes, start: int) -> int:
    """Where the digits end that begin there."""
    end = start
    while end < len(data) and ZERO <= data[end] <= NINE:
        end += 1
    return end


def digits_begin(data: bytes, end: int) -> int:
    """Where the digits begin that end there."""
    start = end
    while start > 0 and ZERO <= data[start - 1] <= NINE:
        start -= 1
    return start


def number_of(data: bytes, start: int, end: int) -> int:
    """The number that these digits are."""
    number = 0
    for place in range(start, end):
        number = number * 10 + data[place] - ZERO
    return number
