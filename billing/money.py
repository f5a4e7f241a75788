"""Amounts of money as integers of nano: 10⁻⁹ of the currency's major unit, read from and written for people.

Nothing here knows a price, an account or a wire format; a float never meets an amount.
"""

import re
from typing import Final

NANO: Final = 10**9
"""Nano in one major unit."""

AMOUNT = re.compile(r"(-?)([0-9]{1,9})(?:\.([0-9]{1,9}))?")  # the largest fits a bigint ninefold


def parse_amount(text: object) -> int:
    """Nano of a plain decimal number of major units ("0.40", "-12"); exact, ValueError for anything else."""
    if not isinstance(text, str) or (match := AMOUNT.fullmatch(text.strip())) is None:
        raise ValueError(
            f'amount {text!r}: write a plain decimal number such as "12.50", '
            "with at most 9 digits before and 9 after the point"
        )
    sign, major, fraction = match.groups()
    nano = int(major) * NANO + int((fraction or "").ljust(9, "0"))
    return -nano if sign else nano


def format_amount(nano: int, currency: str) -> str:
    """For people, exact, with at least two decimals: "0.40 SAR"."""
    major, fraction = divmod(abs(nano), NANO)
    decimals = f"{fraction:09d}".rstrip("0").ljust(2, "0")
    return f"{'-' if nano < 0 else ''}{major}.{decimals} {currency}"


def to_minor_up(nano: int, minor_per_major: int) -> int:
    """Whole minor units (halala, cents), rounded up: what the wire tells; the wallet moves in nano."""
    return -(-nano * minor_per_major // NANO)
