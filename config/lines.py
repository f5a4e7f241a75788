"""Lines that come in masses: texts put between texts. Compiled; what such lines look like is `config.logs`."""

from typing import Final

_USUAL: Final = [str(number) for number in range(1024)]
"""Most statuses, counts and milliseconds."""


def digits(number: int) -> str:
    """As `str` writes it, in a fourth of the time if it is a usual one."""
    return _USUAL[number] if 0 <= number < len(_USUAL) else str(number)


def interleaved(gaps: list[str], rows: list[list[str]]) -> list[str]:
    """For each row its values, with one of the gaps before each and the last one behind them."""
    lines: list[str] = []
    last = len(gaps) - 1
    for row in rows:
        parts: list[str] = []
        for at in range(last):
            parts.append(gaps[at])
            parts.append(row[at])
        parts.append(gaps[last])
        lines.append("".join(parts))
    return lines
